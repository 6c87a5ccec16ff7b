"""LlamaIndex: rerank retrieved nodes in a query engine, a chat engine, or by hand.

>>> from llama_index.core.schema import NodeWithScore, TextNode
>>> from zerank_integrations.llama_index import ZerankRerank
>>> rerank = ZerankRerank("zelo-mini", top_n=1)
>>> found = [NodeWithScore(node=TextNode(text=text)) for text in ("how to boil an egg", "csv.reader reads rows")]
>>> rerank.postprocess_nodes(found, query_str="read a csv file")[0].text
'csv.reader reads rows'
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

try:
    import llama_index.core.instrumentation as instrument
    from llama_index.core.bridge.pydantic import (
        BaseModel,
        ConfigDict,
        Field,
        SerializationInfo,
        SerializerFunctionWrapHandler,
        field_serializer,
        model_serializer,
    )
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation.events.exception import ExceptionEvent
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    from zerank_integrations.errors import MissingPackage

    msg = (
        f"the LlamaIndex integration needs llama-index-core, which could not be imported ({error}). "
        'Install it: pip install "zerank-integrations[llamaindex]"'
    )
    raise MissingPackage(msg) from error

from zerank_integrations.errors import ZerankWarning
from zerank_integrations.reranker import LoadOptions, Reranker, chosen

if TYPE_CHECKING:
    from typing import Unpack

    from zerank_integrations.ranked import Ranked

__all__ = ["ZerankRerank"]

RETRIEVAL_SCORE = "retrieval_score"
"""Metadata: the score a node had before it was first reranked. LlamaIndex's rerankers share this name."""

dispatcher = instrument.get_dispatcher(__name__)  # type: ignore[attr-defined]


class ZerankRerank(BaseNodePostprocessor):
    """Sorts nodes by relevance to the query and leaves out the least relevant.

    Every node comes back in a new NodeWithScore whose score is its relevance in [0, 1], a Python float; equally relevant ones
    keep the order they came in, and what was passed in stays as it was. Nothing is loaded until there is a node to score.
    Postprocessors with equal options share one loaded model.

    Args:
        model: a Hub id, a folder, or "zelo-mini"; by default "zeroentropy/zerank-1-small-reranker".
        reranker: a ready Reranker instead of a model and options.
        top_n: how many nodes to return at most; all by default, none for 0.
        threshold: the least relevance, in [0, 1].
        metadata_mode: which metadata is read along with a node's text; by default what its embedding was made from.
        keep_retrieval_score: put the score a node came with into `metadata["retrieval_score"]` of the node that is returned, a
            copy. Neither its prompt text, its embedding text nor its hash tells of it; a score already kept stays.
        trust_remote_code: accepted for those who come from SentenceTransformerRerank. Code of a checkpoint is never run.
        callback_manager: LlamaIndex's legacy callbacks; engines put theirs here.
        options: any option of Reranker: device, dtype, max_length, instruction, ...

    Raises:
        ValueError: `top_n` or `threshold` is out of range, or both a reranker and a model or options are given.
        TypeError: an option that Reranker does not know.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    # Holds the token, if any. It is written as its options, which do not.
    reranker: Reranker = Field(exclude=True)
    top_n: int | None = Field(default=None, ge=0)
    threshold: float | None = Field(default=None, ge=0, le=1)
    metadata_mode: MetadataMode = MetadataMode.EMBED
    keep_retrieval_score: bool = False

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        reranker: Reranker | None = None,
        top_n: int | None = None,
        threshold: float | None = None,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        keep_retrieval_score: bool = False,
        trust_remote_code: bool = False,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        if trust_remote_code:
            msg = "trust_remote_code=True has no effect: code that comes with a checkpoint is never run. Leave it out"
            warnings.warn(msg, ZerankWarning, stacklevel=2)
        fields: dict[str, Any] = {
            "reranker": chosen(reranker, model, options),
            "top_n": top_n,
            "threshold": threshold,
            "metadata_mode": metadata_mode,
            "keep_retrieval_score": keep_retrieval_score,
            "callback_manager": callback_manager or CallbackManager(),
        }
        super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """The name it is serialised under."""
        return "ZerankRerank"

    @property
    def model(self) -> str:
        """The model's Hub id, folder, or "zelo-mini"."""
        return self.reranker.model

    # LlamaIndex's verbs

    # The base class makes a span of this one, but not of its asynchronous twin.
    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        # An iterator can be read but once, and is read for events, texts and copies.
        query, nodes = _query(query_bundle), list(nodes)
        with self._reported(query, nodes) as reranked:
            ranked = self.reranker.rank(query.query_str, self._texts(nodes), self.top_n, self.threshold)
            reranked += self._reranked(nodes, ranked)
        return reranked

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, nodes = _query(query_bundle), list(nodes)
        with self._reported(query, nodes) as reranked:
            ranked = await self.reranker.arank(query.query_str, self._texts(nodes), self.top_n, self.threshold)
            reranked += self._reranked(nodes, ranked)
        return reranked

    # Life

    def warm_up(self) -> Self:
        """Load the model now, so that the first query is as quick as the next."""
        self.reranker.warm_up()
        return self

    async def awarm_up(self) -> Self:
        """`warm_up` without holding the event loop."""
        await self.reranker.awarm_up()
        return self

    def close(self) -> None:
        """Let go of the model; the last of those that share it frees it. A later query loads it again.

        A reranker that was passed in is closed as well.
        """
        self.reranker.close()

    async def aclose(self) -> None:
        """`close` without holding the event loop."""
        await self.reranker.aclose()

    def __enter__(self) -> Self:
        """The postprocessor itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        """The postprocessor itself; leaving the block closes it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()

    # Copies

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """The constructor's arguments as basic types, without the token, and the class's name."""
        return self.reranker.options | super().custom_model_dump(handler, info)

    @field_serializer("metadata_mode")
    def _basic(self, mode: MetadataMode) -> str:
        return mode.value

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A postprocessor of its own on the same model, heard by the same callbacks."""
        return self.model_copy(update={"reranker": copy.copy(self.reranker)})

    def __getstate__(self) -> dict[Any, Any]:
        # Callbacks belong to their process. LlamaIndex's own __getstate__ finds out whether they can be pickled, and where not
        # takes them from the living object as well.
        state = BaseModel.__getstate__(self)
        return state | {"__dict__": {name: value for name, value in self.__dict__.items() if name != "callback_manager"}}

    # Within

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        return [scored.node.get_content(metadata_mode=self.metadata_mode) for scored in nodes]

    def _reranked(self, nodes: Sequence[NodeWithScore], ranked: Ranked) -> list[NodeWithScore]:
        return [self._copy(nodes[document.index], document.relevance) for document in ranked]

    def _copy(self, scored: NodeWithScore, relevance: float) -> NodeWithScore:
        node = _keep(scored.node, scored.score) if self.keep_retrieval_score else scored.node
        return scored.model_copy(update={"node": node, "score": relevance})

    @contextmanager
    def _reported(self, query: QueryBundle, nodes: list[NodeWithScore]) -> Iterator[list[NodeWithScore]]:
        """Tell both event systems of the start and, when the list given out is filled or the work has failed, of the end."""
        top_n = len(nodes) if self.top_n is None else self.top_n
        reranked: list[NodeWithScore] = []
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.model))
        started: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=started) as event:
            try:
                yield reranked
            except BaseException as error:
                # As LlamaIndex's language models end: an end event with no nodes would look like an answer.
                event.on_end(payload={EventPayload.EXCEPTION: error})
                dispatcher.event(ExceptionEvent(exception=error))
                raise
            event.on_end(payload={EventPayload.NODES: reranked})
        dispatcher.event(ReRankEndEvent(nodes=reranked))


def _query(query_bundle: QueryBundle | None) -> QueryBundle:
    if query_bundle is None:
        msg = "there is no query; nodes are relevant to one. Pass query_bundle=QueryBundle(...) or query_str=..."
        raise ValueError(msg)
    return query_bundle


# The kept retrieval score. Excluding its key keeps it out of prompts and embeddings. But a TextNode's hash reads str(metadata)
# and a Node's reads all keys, so a node seen again with another score would count as another node (QueryFusionRetriever
# removes duplicates by hash). Only the node's class can leave a key out of its hash.


def _keep(node: BaseNode, score: float | None) -> BaseNode:
    """A copy of the node that keeps the score, None included: else a second reranking would take the first's for it."""
    update: dict[str, Any] = {
        name: [*(key for key in getattr(node, name) if key != RETRIEVAL_SCORE), RETRIEVAL_SCORE]
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    if RETRIEVAL_SCORE in node.metadata:
        return node.model_copy(update=update)
    kept = None if score is None else float(score)
    return _unhashed(node.model_copy(update=update | {"metadata": {**node.metadata, RETRIEVAL_SCORE: kept}}))


def _unhashed(node: BaseNode) -> BaseNode:
    """The same node, seen through a class that leaves the kept score out of its hash."""
    object.__setattr__(node, "__class__", _unhashing(type(node)))
    return node


@functools.cache
def _unhashing(kind: type[BaseNode]) -> type[BaseNode]:
    class Node(kind):  # type: ignore[valid-type, misc]
        def _as(self, metadata: dict[str, Any]) -> BaseNode:
            plain = self.model_copy(update={"metadata": metadata})
            object.__setattr__(plain, "__class__", kind)
            return plain

        def _without_score(self) -> BaseNode:
            return self._as({key: value for key, value in self.metadata.items() if key != RETRIEVAL_SCORE})

        @property
        def hash(self) -> str:
            return self._without_score().hash

        def get_metadata_str(self, mode: MetadataMode = MetadataMode.ALL) -> str:
            # With MetadataMode.ALL the excluded keys are read as well, and a score has no place in a text to be scored.
            return self._without_score().get_metadata_str(mode)

        def __reduce__(self) -> tuple[Any, ...]:
            # A class made here cannot be found by name.
            return _unhashed, (self._as(self.metadata),)

    Node.__name__, Node.__qualname__ = kind.__name__, kind.__qualname__
    return Node
