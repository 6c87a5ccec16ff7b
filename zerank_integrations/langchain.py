"""LangChain: rerank retrieved documents in a ContextualCompressionRetriever, in a chain, or through a cross encoder.

>>> from langchain_core.documents import Document
>>> from zerank_integrations.langchain import ZerankCompressor
>>> compressor = ZerankCompressor("zelo-mini", top_n=1)
>>> found = [Document("how to boil an egg"), Document("csv.reader reads rows")]
>>> compressor.compress_documents(found, "read a csv file")[0].page_content
'csv.reader reads rows'
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypedDict

try:
    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun, Callbacks
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables import Runnable, RunnableConfig
    from langchain_core.runnables.config import (
        ensure_config,
        get_async_callback_manager_for_config,
        get_callback_manager_for_config,
    )
    from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

    # Before Python 3.12 pydantic, which describes the runnable's input, refuses typing's own TypedDict.
    from typing_extensions import TypedDict as DescribedDict
except ImportError as error:
    from zerank_integrations.errors import MissingPackage

    msg = (
        f"the LangChain integration needs langchain-core, which could not be imported ({error}). "
        'Install it: pip install "zerank-integrations[langchain]"'
    )
    raise MissingPackage(msg) from error

from zerank_integrations.reranker import LoadOptions, Reranker, chosen

if TYPE_CHECKING:
    from typing import Unpack

    from zerank_integrations.ranked import Ranked, RankedDocument

__all__ = ["RerankInput", "RerankResult", "ZerankCompressor", "ZerankCrossEncoder"]

RELEVANCE = "relevance_score"
"""Metadata: the relevance in [0, 1]. LangChain's rerankers share this name."""
RETRIEVAL_SCORE = "retrieval_score"
"""Metadata: the first `relevance_score` of a document that already had one."""
TRUNCATED = "relevance_truncated"
"""Metadata: True where the document's end was cut; else absent."""
SPAN = "relevance_span"
"""Metadata: [start, end] of the passage that counted, under `max_passage_tokens`; else absent."""

STARTED = "zerank_rerank_start"
ENDED = "zerank_rerank_end"


class RerankResult(TypedDict):
    """A document's place in the list that was passed in, and its relevance in [0, 1]."""

    index: int
    relevance_score: float


class RerankInput(DescribedDict):
    """What `ZerankCompressor.as_runnable()` is invoked with."""

    query: str
    documents: Sequence[Document]


# top_n and threshold of one call.
_Limits = tuple[int | None, float | None]


class ZerankCompressor(BaseDocumentCompressor):
    """Sorts documents by relevance to the query and leaves out the least relevant.

    Documents come back as copies, of the class and with the id and metadata they had, and `metadata["relevance_score"]` in
    [0, 1]; equal ones keep the order they came in. Nothing is loaded until there is a document to score. Compressors with equal
    options share one loaded model: `compressor.reranker` warms it up and closes it.

    Args:
        model: a Hub id, a folder, or "zelo-mini"; by default "zeroentropy/zerank-1-small-reranker".
        reranker: a ready Reranker instead of a model and options.
        top_n: how many documents to return at most; all by default, none for 0.
        threshold: the least relevance, in [0, 1].
        options: any option of Reranker: device, dtype, max_length, instruction, ...

    Raises:
        ValueError: `top_n` or `threshold` is out of range, or both a reranker and a model or options are given.
        TypeError: an option that Reranker does not know.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    # Holds the token, if any. It is written as its options, which do not.
    reranker: Reranker = Field(frozen=True, exclude=True)
    top_n: int | None = Field(default=None, ge=0)
    threshold: float | None = Field(default=None, ge=0, le=1)

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        reranker: Reranker | None = None,
        top_n: int | None = None,
        threshold: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        fields = {"reranker": chosen(reranker, model, options), "top_n": top_n, "threshold": threshold}
        super().__init__(**fields)

    # LangChain's verbs

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        top_n: int | EllipsisType | None = ...,
        threshold: float | EllipsisType | None = ...,
    ) -> list[Document]:
        """Sort documents by relevance to the query.

        Args:
            documents: what was retrieved; left as it is.
            query: what is looked for.
            callbacks: told `zerank_rerank_start` and `zerank_rerank_end`, custom events of the run they belong to.
            top_n: for this call instead of the compressor's own.
            threshold: for this call instead of the compressor's own.

        Returns:
            Copies of the documents, the most relevant first.

        Raises:
            TypeError: the query is not a text, or a document is not a Document; the message names its index.
            ZerankError: the model cannot be loaded, or cannot score this; see `Reranker.rank`.
        """
        return self._compress_all([(query, documents)], [callbacks], self._limits(top_n, threshold))[0]

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        top_n: int | EllipsisType | None = ...,
        threshold: float | EllipsisType | None = ...,
    ) -> list[Document]:
        """`compress_documents` without holding the event loop or one of asyncio's own threads."""
        return (await self._acompress_all([(query, documents)], [callbacks], self._limits(top_n, threshold)))[0]

    def as_runnable(self) -> Runnable[RerankInput, list[Document]]:
        """A Runnable from `{"query": ..., "documents": [...]}` to the documents, the most relevant first.

        `batch` and `abatch` score all their inputs' documents in one go. `.bind(top_n=..., threshold=...)` overrides the
        compressor's own.
        """
        return _Reranking(self)

    # Indices instead of documents

    def rerank(
        self,
        documents: Iterable[str | Document | Mapping[str, Any]],
        query: str,
        *,
        top_n: int | EllipsisType | None = ...,
        threshold: float | EllipsisType | None = ...,
        progress: bool = False,
    ) -> list[RerankResult]:
        """Rank texts, Documents, or dicts with a "page_content" or a "text".

        Args:
            documents: what to rank.
            query: what is looked for.
            top_n: for this call instead of the compressor's own.
            threshold: for this call instead of the compressor's own.
            progress: show a bar on standard error.

        Returns:
            `{"index": ..., "relevance_score": ...}` per document, the most relevant first.
        """
        return self.rerank_batch([(query, documents)], top_n=top_n, threshold=threshold, progress=progress)[0]

    async def arerank(
        self,
        documents: Iterable[str | Document | Mapping[str, Any]],
        query: str,
        *,
        top_n: int | EllipsisType | None = ...,
        threshold: float | EllipsisType | None = ...,
    ) -> list[RerankResult]:
        """`rerank` without holding the event loop."""
        return (await self.arerank_batch([(query, documents)], top_n=top_n, threshold=threshold))[0]

    def rerank_batch(
        self,
        requests: Iterable[tuple[str, Iterable[str | Document | Mapping[str, Any]]]],
        *,
        top_n: int | EllipsisType | None = ...,
        threshold: float | EllipsisType | None = ...,
        progress: bool = False,
    ) -> list[list[RerankResult]]:
        """`rerank` for several (query, documents) at once: one list per request, in order."""
        limits = self._limits(top_n, threshold)
        return [_results(ranked) for ranked in self.reranker.rank_many(_readable(requests), *limits, progress=progress)]

    async def arerank_batch(
        self,
        requests: Iterable[tuple[str, Iterable[str | Document | Mapping[str, Any]]]],
        *,
        top_n: int | EllipsisType | None = ...,
        threshold: float | EllipsisType | None = ...,
    ) -> list[list[RerankResult]]:
        """`rerank_batch` without holding the event loop."""
        limits = self._limits(top_n, threshold)
        return [_results(ranked) for ranked in await self.reranker.arank_many(_readable(requests), *limits)]

    # Within

    def _compress_all(
        self,
        requests: Sequence[tuple[str, Sequence[Document]]],
        callbacks: Sequence[Callbacks | None],
        limits: _Limits,
    ) -> list[list[Document]]:
        listed, texts = _listed(requests)
        for (query, documents), told in zip(listed, callbacks, strict=True):
            _tell(told, STARTED, self._start_event(query, documents, limits))
        rankings = self.reranker.rank_many(texts, *limits)
        for ranked, told in zip(rankings, callbacks, strict=True):
            _tell(told, ENDED, self._end_event(ranked))
        return [_copies(documents, ranked) for (_, documents), ranked in zip(listed, rankings, strict=True)]

    async def _acompress_all(
        self,
        requests: Sequence[tuple[str, Sequence[Document]]],
        callbacks: Sequence[Callbacks | None],
        limits: _Limits,
    ) -> list[list[Document]]:
        listed, texts = _listed(requests)
        for (query, documents), told in zip(listed, callbacks, strict=True):
            await _atell(told, STARTED, self._start_event(query, documents, limits))
        rankings = await self.reranker.arank_many(texts, *limits)
        for ranked, told in zip(rankings, callbacks, strict=True):
            await _atell(told, ENDED, self._end_event(ranked))
        return [_copies(documents, ranked) for (_, documents), ranked in zip(listed, rankings, strict=True)]

    def _limits(self, top_n: int | EllipsisType | None = ..., threshold: float | EllipsisType | None = ...) -> _Limits:
        """Of this call, or where left out the compressor's own."""
        top_n = self.top_n if isinstance(top_n, EllipsisType) else top_n
        if top_n is not None and top_n < 0:
            msg = f"top_n is {top_n!r}; expected a number of documents, 0 or more, or None for all"
            raise ValueError(msg)
        return top_n, self.threshold if isinstance(threshold, EllipsisType) else threshold

    def _start_event(self, query: str, documents: Sequence[Document], limits: _Limits) -> dict[str, Any]:
        top_n, threshold = limits
        return {
            "model": self.reranker.model,
            "query": query,
            "documents": len(documents),
            "top_n": len(documents) if top_n is None else top_n,
            "threshold": threshold,
        }

    def _end_event(self, ranked: Ranked) -> dict[str, Any]:
        return {
            "model": self.reranker.model,
            "query": ranked.query,
            "documents": len(ranked),
            "indices": ranked.indices,
            "relevance_scores": ranked.relevances,
            "truncated": [document.index for document in ranked.truncated],
        }

    @model_serializer(mode="wrap")
    def _as_options(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The constructor's arguments, without the token."""
        return self.reranker.options | fields(self)


class ZerankCrossEncoder(BaseCrossEncoder):
    """Scores (query, document) pairs, for what LangChain builds on a cross encoder, such as CrossEncoderReranker.

    Args:
        model: a Hub id, a folder, or "zelo-mini"; by default "zeroentropy/zerank-1-small-reranker".
        reranker: a ready Reranker instead of a model and options.
        options: any option of Reranker: device, dtype, max_length, instruction, ...

    Raises:
        ValueError: both a reranker and a model or options are given.
        TypeError: an option that Reranker does not know.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        reranker: Reranker | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        self.reranker = chosen(reranker, model, options)

    def score(self, text_pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> list[float]:
        """Relevances in [0, 1] of (query, document) pairs, in their order; pairs of all queries are scored in one go.

        Args:
            text_pairs: queries may differ from pair to pair.
            progress: show a bar on standard error.

        Raises:
            TypeError: a pair is not two texts; the message names its index.
            ZerankError: the model cannot be loaded, or cannot score this; see `Reranker.rank`.
        """
        groups = _by_query(text_pairs)
        return _scores(groups, self.reranker.rank_many(_requests(groups), progress=progress))

    async def ascore(self, text_pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`score` without holding the event loop."""
        groups = _by_query(text_pairs)
        return _scores(groups, await self.reranker.arank_many(_requests(groups)))

    def __repr__(self) -> str:
        """Its reranker's name and state, never the token."""
        return f"ZerankCrossEncoder(reranker={self.reranker!r})"


class _Reranking(Runnable[RerankInput, list[Document]]):
    """A compressor as a link of a chain."""

    def __init__(self, compressor: ZerankCompressor) -> None:
        self.compressor = compressor
        self.name = type(compressor).__name__

    def invoke(self, input: RerankInput, config: RunnableConfig | None = None, **limits: Any) -> list[Document]:  # noqa: ANN401
        return self._call_with_config(self._one, input, config, **limits)

    async def ainvoke(self, input: RerankInput, config: RunnableConfig | None = None, **limits: Any) -> list[Document]:  # noqa: ANN401
        return await self._acall_with_config(self._aone, input, config, **limits)

    def batch(
        self,
        inputs: list[RerankInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **limits: Any,  # noqa: ANN401
    ) -> list[list[Document]]:
        if return_exceptions:
            # One at a time, so that an input that fails does not fail the others.
            return super().batch(inputs, config, return_exceptions=True, **limits)
        return self._batch_with_config(self._all, inputs, config, **limits)

    async def abatch(
        self,
        inputs: list[RerankInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **limits: Any,  # noqa: ANN401
    ) -> list[list[Document]]:
        if return_exceptions:
            return await super().abatch(inputs, config, return_exceptions=True, **limits)
        return await self._abatch_with_config(self._aall, inputs, config, **limits)

    # LangChain hands over the run of each input in a parameter of exactly this name.

    def _one(self, given: RerankInput, run_manager: CallbackManagerForChainRun, **limits: Any) -> list[Document]:  # noqa: ANN401
        query, documents = _asked(given)
        return self.compressor.compress_documents(documents, query, run_manager.get_child(), **limits)

    async def _aone(
        self,
        given: RerankInput,
        run_manager: AsyncCallbackManagerForChainRun,
        **limits: Any,  # noqa: ANN401
    ) -> list[Document]:
        query, documents = _asked(given)
        return await self.compressor.acompress_documents(documents, query, run_manager.get_child(), **limits)

    def _all(
        self,
        given: list[RerankInput],
        run_manager: list[CallbackManagerForChainRun],
        **limits: Any,  # noqa: ANN401
    ) -> list[Exception | list[Document]]:
        requests, callbacks = [_asked(each) for each in given], [run.get_child() for run in run_manager]
        return [*self.compressor._compress_all(requests, callbacks, self.compressor._limits(**limits))]

    async def _aall(
        self,
        given: list[RerankInput],
        run_manager: list[AsyncCallbackManagerForChainRun],
        **limits: Any,  # noqa: ANN401
    ) -> list[Exception | list[Document]]:
        requests, callbacks = [_asked(each) for each in given], [run.get_child() for run in run_manager]
        return [*await self.compressor._acompress_all(requests, callbacks, self.compressor._limits(**limits))]


def _text(index: int, document: object) -> str:
    found: object = document
    if isinstance(document, Document):
        found = document.page_content
    elif isinstance(document, Mapping):
        found = next((document[key] for key in ("page_content", "text") if key in document), document)
    if not isinstance(found, str):
        keys = f" with the keys {list(document)}" if isinstance(document, Mapping) else ""
        msg = (
            f"document {index} is {type(document).__name__}{keys}; expected a str, a Document or a dict with a str under "
            '"page_content" or "text". Leave it out or pass its text'
        )
        raise TypeError(msg)
    return found


def _readable(
    requests: Iterable[tuple[str, Iterable[str | Document | Mapping[str, Any]]]],
) -> Iterable[tuple[str, Iterable[str]]]:
    for query, documents in requests:
        if isinstance(documents, str | Document | Mapping):
            msg = f"documents is one {type(documents).__name__}; expected a list of them: [document]"
            raise TypeError(msg)
        yield query, [_text(index, document) for index, document in enumerate(documents)]


def _listed(
    requests: Sequence[tuple[str, Sequence[Document]]],
) -> tuple[list[tuple[str, list[Document]]], list[tuple[str, list[str]]]]:
    """The requests with their documents as lists (an iterator can be read but once), and with their texts."""
    listed = [(query, list(documents)) for query, documents in requests]
    for _, documents in listed:
        for index, document in enumerate(documents):
            if not isinstance(document, Document):
                msg = (
                    f"document {index} is {type(document).__name__}; expected a langchain_core Document. "
                    "Texts and dicts can be ranked with rerank()"
                )
                raise TypeError(msg)
    return listed, [(query, [document.page_content for document in documents]) for query, documents in listed]


def _copies(documents: Sequence[Document], ranked: Ranked) -> list[Document]:
    return [_copy(documents[scored.index], scored) for scored in ranked]


def _copy(document: Document, scored: RankedDocument) -> Document:
    # What an earlier reranking said of cuts and passages is not true of this one.
    metadata = {key: value for key, value in document.metadata.items() if key not in (TRUNCATED, SPAN)}
    if RELEVANCE in metadata:
        metadata.setdefault(RETRIEVAL_SCORE, metadata[RELEVANCE])
    metadata[RELEVANCE] = scored.relevance
    if scored.truncated:
        metadata[TRUNCATED] = True
    if scored.span is not None:
        metadata[SPAN] = list(scored.span)
    # Keeps the id and a subclass with its fields, as building a new Document would not.
    return document.model_copy(update={"metadata": metadata})


def _results(ranked: Ranked) -> list[RerankResult]:
    return [RerankResult(index=document.index, relevance_score=document.relevance) for document in ranked]


def _asked(given: RerankInput) -> tuple[str, Sequence[Document]]:
    if not isinstance(given, Mapping) or not {"query", "documents"} <= given.keys():
        found = f"a dict with the keys {list(given)}" if isinstance(given, Mapping) else type(given).__name__
        msg = f'the input is {found}; expected {{"query": "...", "documents": [Document, ...]}}'
        raise TypeError(msg)
    return given["query"], given["documents"]


# LangChain's own dispatch_custom_event raises when there is no run to attach an event to, and so would every plain call.


def _tell(callbacks: Callbacks | None, name: str, data: dict[str, Any]) -> None:
    manager = get_callback_manager_for_config(ensure_config({"callbacks": callbacks}))
    if manager.parent_run_id is not None:
        manager.on_custom_event(name, data, run_id=manager.parent_run_id)


async def _atell(callbacks: Callbacks | None, name: str, data: dict[str, Any]) -> None:
    manager = get_async_callback_manager_for_config(ensure_config({"callbacks": callbacks}))
    if manager.parent_run_id is not None:
        await manager.on_custom_event(name, data, run_id=manager.parent_run_id)


# For each query, its documents with the places of their pairs.
_Groups = dict[str, list[tuple[int, str]]]


def _by_query(text_pairs: Sequence[tuple[str, str]]) -> _Groups:
    groups: _Groups = {}
    for index, pair in enumerate(text_pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            msg = f"pair {index} is {pair!r:.200}; expected (query, document), two str"
            raise TypeError(msg)
        query, document = pair
        groups.setdefault(query, []).append((index, document))
    return groups


def _requests(groups: _Groups) -> list[tuple[str, list[str]]]:
    return [(query, [document for _, document in placed]) for query, placed in groups.items()]


def _scores(groups: _Groups, rankings: Sequence[Ranked]) -> list[float]:
    scores = [0.0] * sum(map(len, groups.values()))
    for placed, ranked in zip(groups.values(), rankings, strict=True):
        for document in ranked:
            scores[placed[document.index][0]] = document.relevance
    return scores
