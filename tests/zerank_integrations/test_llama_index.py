"""The LlamaIndex postprocessor in LlamaIndex's own engines, and what it promises of nodes, events and copies."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.events.span import SpanDropEvent
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from tests import reference
from zerank_integrations import ModelUnreachable, QueryTooLong, Reranker, ZerankWarning
from zerank_integrations.llama_index import RETRIEVAL_SCORE, ZerankRerank
from zerank_integrations.reranker import LoadOptions

QUERY = "Who repairs the ancient bridge near the harbour?"
TEXTS = [document for _, document in reference.random_pairs(8, seed=21)]
SECRET = "hf_secret_of_this_test"

Make = Callable[..., ZerankRerank]


@pytest.fixture
def make(tiny_causal_lm: Path) -> Make:
    """A postprocessor on the tiny checkpoint."""

    def made(**options: object) -> ZerankRerank:
        return ZerankRerank(tiny_causal_lm, **{"dtype": "float32", "device": "cpu"} | options)

    return made


@pytest.fixture
def core(tiny_causal_lm: Path) -> Reranker:
    return Reranker(tiny_causal_lm, dtype="float32", device="cpu")


def nodes(texts: list[str] = TEXTS) -> list[NodeWithScore]:
    """As a retriever returns them: with ids, metadata, relationships, an embedding and a retrieval score."""
    source = RelatedNodeInfo(node_id="book")
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"node-{place}",
                text=text,
                metadata={"source": f"page {place}", "file": "private.txt"},
                excluded_embed_metadata_keys=["file"],
                relationships={NodeRelationship.SOURCE: source},
                embedding=[0.5, float(place)],
            ),
            score=1 / (place + 1),
        )
        for place, text in enumerate(texts)
    ]


def ids(found: list[NodeWithScore]) -> list[str]:
    return [scored.node.node_id for scored in found]


def written(given: list[NodeWithScore]) -> list[dict[str, Any]]:
    return [scored.to_dict() for scored in given]


class Heard(BaseEventHandler):
    """An instrumentation handler that keeps what it is told."""

    events: list[Any] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: object) -> None:
        self.events.append(event)

    def names(self) -> list[str]:
        return [event.class_name() for event in self.events]


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    root = get_dispatcher()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


class Shelf(BaseRetriever):
    """A retriever that finds the same nodes for every query."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return nodes()


# MockLLM answers with its prompt, so that the answer shows what a language model would read.
def engine(postprocessor: ZerankRerank, **options: object) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(Shelf(), llm=MockLLM(), node_postprocessors=[postprocessor], **options)


async def both(postprocessor: ZerankRerank, given: list[NodeWithScore], **query: object) -> list[NodeWithScore]:
    """Rerank synchronously and asynchronously; the results are equal, or else the test fails."""
    found = postprocessor.postprocess_nodes(given, **query)
    assert written(await postprocessor.apostprocess_nodes(given, **query)) == written(found)
    return found


# Ranking


async def test_order_and_scores_are_the_cores(make: Make, core: Reranker) -> None:
    given = nodes()
    found = await both(make(), given, query_str=QUERY)
    ranked = core.rank(QUERY, [f"source: page {place}\n\n{text}" for place, text in enumerate(TEXTS)])
    assert [scored.score for scored in found] == ranked.relevances
    assert ids(found) == [f"node-{index}" for index in ranked.indices]
    assert ids(found) != ids(given)


async def test_inputs_stay_as_they_were_and_results_are_new(make: Make) -> None:
    for keep in (False, True):
        given = nodes()
        before, was = written(given), list(given)
        found = await both(make(keep_retrieval_score=keep), given, query_bundle=QueryBundle(QUERY))
        assert written(given) == before
        assert all(a is b for a, b in zip(given, was, strict=True))
        assert not {*map(id, found)} & {*map(id, given)}
        assert all(type(scored) is NodeWithScore and type(scored.score) is float for scored in found)


def test_a_node_with_score_of_another_class_stays_one(make: Make) -> None:
    class Cited(NodeWithScore):
        citation: str

    given = [Cited(node=scored.node, score=scored.score, citation=f"[{place}]") for place, scored in enumerate(nodes())]
    found = make(top_n=2).postprocess_nodes(given, query_str=QUERY)
    assert [type(scored) for scored in found] == [Cited, Cited]
    assert {scored.citation: scored.node.node_id for scored in found}.items() <= {
        f"[{place}]": f"node-{place}" for place in range(8)
    }.items()


def test_equal_texts_keep_their_order_and_none_is_lost(make: Make) -> None:
    given = nodes([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]])
    found = make(metadata_mode=MetadataMode.NONE).postprocess_nodes(given, query_str=QUERY)
    assert [i for i in ids(found) if i != "node-1"] == ["node-0", "node-2", "node-3"]
    assert len(make().postprocess_nodes([given[0], given[0]], query_str=QUERY)) == 2


async def test_top_n_and_threshold(make: Make) -> None:
    every = await both(make(), nodes(), query_str=QUERY)
    assert len(every) == 8
    assert ids(await both(make(top_n=3), nodes(), query_str=QUERY)) == ids(every)[:3]
    assert ids(await both(make(top_n=99), nodes(), query_str=QUERY)) == ids(every)
    threshold = every[4].score
    assert ids(await both(make(threshold=threshold), nodes(), query_str=QUERY)) == ids(every)[:5]
    assert ids(await both(make(threshold=threshold, top_n=2), nodes(), query_str=QUERY)) == ids(every)[:2]
    assert await both(make(threshold=1.0), nodes(), query_str=QUERY) == []


async def test_nothing_to_return_loads_nothing(tiny_causal_lm: Path) -> None:
    nowhere = ZerankRerank(tiny_causal_lm.with_name("nowhere"), top_n=0)
    assert await both(nowhere, nodes(), query_str=QUERY) == []
    nowhere.top_n = None
    assert await both(nowhere, [], query_str=QUERY) == []
    with pytest.raises(ModelUnreachable):
        nowhere.postprocess_nodes(nodes(), query_str=QUERY)


async def test_a_missing_query_says_what_to_pass(make: Make) -> None:
    for given in (nodes(), []):
        with pytest.raises(ValueError, match="Pass query_bundle"):
            make().postprocess_nodes(given)
        with pytest.raises(ValueError, match="Pass query_bundle"):
            await make().apostprocess_nodes(given)


@pytest.mark.parametrize("mode", list(MetadataMode))
async def test_metadata_mode_chooses_what_is_read(make: Make, core: Reranker, mode: MetadataMode) -> None:
    expected = core.rank(QUERY, [scored.node.get_content(mode) for scored in nodes()])
    found = await both(make(metadata_mode=mode), nodes(), query_str=QUERY)
    assert [scored.score for scored in found] == expected.relevances


async def test_nodes_that_are_not_plain_text(make: Make, core: Reranker) -> None:
    """What text and metadata they have is read; one without any is scored as the empty text it is, not lost."""
    kinds: list[BaseNode] = [
        ImageNode(id_="captioned", text=TEXTS[0], image_url="https://example.com/a.png"),
        ImageNode(id_="described", image_path="a.png", metadata={"caption": "a bridge"}),
        ImageNode(id_="bare", image_path="b.png"),
        Node(id_="picture", image_resource=MediaResource(url="https://example.com/c.png")),
        Node(id_="multimodal", text_resource=MediaResource(text=TEXTS[1]), metadata={"caption": "the harbour"}),
        IndexNode(id_="index", text=TEXTS[2], index_id="other"),
        Document(id_="document", text=TEXTS[3]),
        TextNode(id_="empty"),
    ]
    texts = [TEXTS[0], "caption: a bridge", "", "", f"caption: the harbour\n\n{TEXTS[1]}", TEXTS[2], TEXTS[3], ""]
    expected = core.rank(QUERY, texts)
    found = await both(make(keep_retrieval_score=True), [NodeWithScore(node=node) for node in kinds], query_str=QUERY)
    assert ids(found) == [kinds[index].node_id for index in expected.indices]
    assert [scored.score for scored in found] == expected.relevances
    assert all(isinstance(scored.node, type(kinds[index])) for scored, index in zip(found, expected.indices, strict=True))


async def test_a_cut_node_warns_once_a_reranker(make: Make) -> None:
    short = make(max_length=60)
    given = nodes([TEXTS[0] * 30, TEXTS[1]])
    with pytest.warns(ZerankWarning):
        await short.apostprocess_nodes(given, query_str=QUERY)
    short.postprocess_nodes(given, query_str=QUERY)


# The retrieval score

KINDS: list[BaseNode] = [
    TextNode(text=TEXTS[0], metadata={"source": "book"}),
    TextNode(text=TEXTS[0]),
    Node(text_resource=MediaResource(text=TEXTS[0]), metadata={"source": "book"}),
    Document(text=TEXTS[0], metadata={"source": "book"}),
    ImageNode(text=TEXTS[0], image_path="a.png", metadata={"source": "book"}),
    IndexNode(text=TEXTS[0], index_id="other", metadata={"source": "book"}),
]


def test_the_retrieval_score_is_not_kept_unless_asked(make: Make) -> None:
    (scored,) = make(top_n=1).postprocess_nodes(nodes(), query_str=QUERY)
    assert RETRIEVAL_SCORE not in scored.metadata


@pytest.mark.parametrize("node", KINDS, ids=lambda node: type(node).__name__)
def test_a_kept_score_is_seen_by_nobody_but_who_asks(make: Make, node: BaseNode) -> None:
    (scored,) = make(keep_retrieval_score=True).postprocess_nodes([NodeWithScore(node=node, score=0.25)], query_str=QUERY)
    kept = scored.node
    assert scored.metadata == {**node.metadata, "retrieval_score": 0.25}
    assert "retrieval_score" in kept.excluded_llm_metadata_keys
    assert "retrieval_score" in kept.excluded_embed_metadata_keys
    for mode in MetadataMode:
        assert kept.get_content(mode) == node.get_content(mode)
    assert kept.hash == node.hash
    assert isinstance(kept, type(node))
    assert kept.node_id == node.node_id
    assert kept.as_related_node_info().hash == node.hash
    # Other metadata counts as ever.
    kept.metadata["source"] = "another"
    changed = node.model_copy(update={"metadata": {"source": "another"}})
    assert kept.hash == changed.hash


@pytest.mark.parametrize("node", KINDS, ids=lambda node: type(node).__name__)
def test_a_kept_score_survives_copies(make: Make, node: BaseNode) -> None:
    (scored,) = make(keep_retrieval_score=True).postprocess_nodes([NodeWithScore(node=node, score=0.25)], query_str=QUERY)
    for again in (pickle.loads(pickle.dumps(scored)), copy.deepcopy(scored), scored.model_copy(deep=True)):
        assert again == scored
        assert again.node.hash == node.hash
    # LlamaIndex's stores write class names: what is read back is the plain class, and still keeps the score from both texts.
    read = type(node).from_dict(scored.node.to_dict())
    assert read.metadata["retrieval_score"] == 0.25
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert read.get_content(mode) == node.get_content(mode)


@pytest.mark.parametrize("mode", [MetadataMode.EMBED, MetadataMode.ALL])
@pytest.mark.parametrize("first", [0.25, None])
def test_the_first_score_is_kept_when_reranked_twice(make: Make, first: float | None, mode: MetadataMode) -> None:
    keeping = make(keep_retrieval_score=True, metadata_mode=mode)
    given = [NodeWithScore(node=scored.node, score=first) for scored in nodes()]
    once = keeping.postprocess_nodes(given, query_str=QUERY)
    twice = keeping.postprocess_nodes(once, query_str=QUERY)
    assert [scored.metadata["retrieval_score"] for scored in twice] == [first] * len(given)
    assert written(twice) == written(once)
    assert all(scored.node.excluded_llm_metadata_keys.count("retrieval_score") == 1 for scored in twice)
    assert [scored.node.hash for scored in twice] == [given[int(i.removeprefix("node-"))].node.hash for i in ids(twice)]
    # One that does not keep scores leaves a kept one where it is.
    assert make().postprocess_nodes(once, query_str=QUERY)[0].metadata["retrieval_score"] == first


def test_a_score_another_reranker_put_down_is_hidden_and_kept(make: Make) -> None:
    node = TextNode(text=TEXTS[0], metadata={"retrieval_score": 0.125})
    (scored,) = make(keep_retrieval_score=True).postprocess_nodes([NodeWithScore(node=node, score=0.75)], query_str=QUERY)
    assert scored.metadata == {"retrieval_score": 0.125}
    assert scored.node.get_content(MetadataMode.LLM) == scored.node.get_content(MetadataMode.EMBED) == TEXTS[0]
    assert scored.node.hash == node.hash


def test_a_numpy_score_is_kept_as_a_float(make: Make) -> None:
    given = nodes()[:1]
    given[0].score = np.float32(0.5)  # as several of LlamaIndex's rerankers set it
    (scored,) = make(keep_retrieval_score=True).postprocess_nodes(given, query_str=QUERY)
    assert type(scored.metadata["retrieval_score"]) is float
    json.dumps(scored.to_dict())


# Query engines


async def test_in_a_query_engine(make: Make) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    postprocessor = make(top_n=3, keep_retrieval_score=True)
    asking = engine(postprocessor, callback_manager=manager)
    assert postprocessor.callback_manager is manager

    answer = asking.query(QUERY)
    expected = make(top_n=3).postprocess_nodes(nodes(), query_str=QUERY)
    assert ids(answer.source_nodes) == ids(expected)
    assert [scored.score for scored in answer.source_nodes] == [scored.score for scored in expected]
    assert "retrieval_score" not in str(answer)
    places = [str(answer).index(f"source: {scored.metadata['source']}") for scored in expected]
    assert places == sorted(places)
    assert str(answer).count("source: page") == 3
    assert {scored.metadata["retrieval_score"] for scored in answer.source_nodes} <= {scored.score for scored in nodes()}

    again = await asking.aquery(QUERY)
    assert written(again.source_nodes) == written(answer.source_nodes)
    assert str(again) == str(answer)
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 2


async def test_in_a_chat_engine(make: Make) -> None:
    # The default memory leaves a database connection open, which the suite takes for an error.
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    chatting = ContextChatEngine.from_defaults(Shelf(), llm=MockLLM(), memory=memory, node_postprocessors=[make(top_n=2)])
    expected = ids(make(top_n=2).postprocess_nodes(nodes(), query_str=QUERY))
    assert ids(chatting.chat(QUERY).source_nodes) == expected
    assert ids((await chatting.achat(QUERY)).source_nodes) == expected


async def test_twenty_concurrent_queries(make: Make) -> None:
    asking = engine(make(top_n=4))
    queries = [query for query, _ in reference.random_pairs(20, seed=22)]
    answers = await asyncio.gather(*(asking.aquery(query) for query in queries))
    for query, answer in zip(queries, answers, strict=True):
        alone = make(top_n=4).postprocess_nodes(nodes(), query_str=query)
        assert ids(answer.source_nodes) == ids(alone)
        assert [scored.score for scored in answer.source_nodes] == pytest.approx([scored.score for scored in alone], abs=1e-6)


async def test_the_loop_and_its_default_executor_stay_free(make: Make) -> None:
    class Refusing(ThreadPoolExecutor):
        def submit(self, *_: object, **__: object) -> NoReturn:
            raise AssertionError("the default executor was used")

    asyncio.get_running_loop().set_default_executor(Refusing(1))
    postprocessor = make()
    await postprocessor.awarm_up()
    beats = [time.perf_counter()]

    async def beat() -> None:
        while True:
            await asyncio.sleep(0.002)
            beats.append(time.perf_counter())

    beating = asyncio.create_task(beat())
    found = await postprocessor.apostprocess_nodes(nodes([f"{text} {TEXTS[0]}" for text in TEXTS * 40]), query_str=QUERY)
    beating.cancel()
    assert len(found) == 320
    assert len(beats) > 10
    assert max(later - sooner for sooner, later in pairwise(beats)) < max(0.05, (beats[-1] - beats[0]) / 4)
    await postprocessor.aclose()


async def test_a_cancelled_query_ends_its_events_and_leaves_the_rest_alone(make: Make, heard: Heard) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = make(callback_manager=CallbackManager([debug])).warm_up()
    task = asyncio.create_task(postprocessor.apostprocess_nodes(nodes(TEXTS * 40), query_str=QUERY))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard.names() == ["ReRankStartEvent", "ExceptionEvent", "SpanDropEvent"]
    ((_, end),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert isinstance(end.payload[EventPayload.EXCEPTION], asyncio.CancelledError)
    assert len(await postprocessor.apostprocess_nodes(nodes(), query_str=QUERY)) == 8


# Events


@pytest.mark.parametrize("given", [nodes(), []], ids=["nodes", "empty"])
@pytest.mark.parametrize("top_n", [None, 3, 0])
async def test_events_come_in_pairs(make: Make, heard: Heard, given: list[NodeWithScore], top_n: int | None) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = make(top_n=top_n, callback_manager=CallbackManager([debug]))
    bundle = QueryBundle(QUERY)
    for run, found in enumerate(
        [
            postprocessor.postprocess_nodes(given, query_bundle=bundle),
            await postprocessor.apostprocess_nodes(given, query_bundle=bundle),
        ]
    ):
        start, end = heard.events[2 * run : 2 * run + 2]
        assert isinstance(start, ReRankStartEvent)
        assert isinstance(end, ReRankEndEvent)
        assert start.query.query_str == QUERY
        assert start.nodes == given
        assert start.top_n == (len(given) if top_n is None else top_n)
        assert start.model_name == postprocessor.model
        assert end.nodes == found
        assert start.span_id == end.span_id
        span = "ZerankRerank._apostprocess_nodes" if run else "ZerankRerank._postprocess_nodes"
        assert start.span_id.startswith(span)
        json.dumps([start.model_dump(mode="json"), end.model_dump(mode="json")])

        start, end = debug.get_event_pairs(CBEventType.RERANKING)[run]
        assert start.payload == {
            EventPayload.NODES: given,
            EventPayload.MODEL_NAME: postprocessor.model,
            EventPayload.QUERY_STR: QUERY,
            EventPayload.TOP_K: len(given) if top_n is None else top_n,
        }
        assert end.payload == {EventPayload.NODES: found}
    assert len(heard.events) == 4
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 2


async def test_a_failure_is_told_as_one(make: Make, heard: Heard) -> None:
    """As LlamaIndex's language models do: an exception event ends the span, never an end event without nodes."""
    debug = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = make(max_length=20, callback_manager=CallbackManager([debug]))
    with pytest.raises(QueryTooLong) as sync:
        postprocessor.postprocess_nodes(nodes(), query_str=QUERY * 20)
    with pytest.raises(QueryTooLong) as later:
        await postprocessor.apostprocess_nodes(nodes(), query_str=QUERY * 20)
    assert [type(event) for event in heard.events] == [ReRankStartEvent, ExceptionEvent, SpanDropEvent] * 2
    for run, error in enumerate((sync.value, later.value)):
        start, told, _ = heard.events[3 * run : 3 * run + 3]
        assert told.exception is error
        assert start.span_id == told.span_id
        _, end = debug.get_event_pairs(CBEventType.RERANKING)[run]
        assert end.payload == {EventPayload.EXCEPTION: error}


async def test_an_iterator_loses_no_node(tiny_causal_lm: Path) -> None:
    rerank = ZerankRerank(tiny_causal_lm, dtype="float32", device="cpu")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("a", "b", "c")]
    expected = rerank.postprocess_nodes(nodes, query_str="q")
    assert len(expected) == 3
    assert rerank.postprocess_nodes(iter(nodes), query_str="q") == expected
    assert await rerank.apostprocess_nodes(iter(nodes), query_str="q") == expected


# Options


def test_every_option_of_the_reranker_is_one_here(tiny_causal_lm: Path) -> None:
    options = set(inspect.signature(Reranker).parameters) - {"model"}
    assert set(LoadOptions.__annotations__) == options
    given = {
        "revision": "main",
        "base": Path("base"),
        "device": "cpu",
        "dtype": "float32",
        "attn_implementation": "eager",
        "cache_folder": Path("cache"),
        "local_files_only": True,
        "token": SECRET,
        "max_length": 100,
        "max_passage_tokens": 50,
        "token_budget": 1000,
        "control_tokens": "parse",
        "instruction": "prefer short ones",
        "deterministic": True,
    }
    assert set(given) == options
    assert ZerankRerank(tiny_causal_lm, **given).reranker.options == Reranker(tiny_causal_lm, **given).options


def test_defaults() -> None:
    postprocessor = ZerankRerank()
    assert postprocessor.model == "zeroentropy/zerank-1-small-reranker"
    assert postprocessor.reranker.options == Reranker().options
    assert postprocessor.reranker.max_length is None
    assert (postprocessor.top_n, postprocessor.threshold) == (None, None)
    assert postprocessor.metadata_mode is MetadataMode.EMBED
    assert not postprocessor.keep_retrieval_score


def test_a_ready_reranker(core: Reranker) -> None:
    postprocessor = ZerankRerank(reranker=core, top_n=2)
    assert postprocessor.reranker is core
    assert len(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)) == 2
    with pytest.raises(ValueError, match="both a reranker and model, device are given"):
        ZerankRerank("zelo-mini", reranker=core, device="cpu")


def test_wrong_arguments(make: Make) -> None:
    for wrong in ({"top_n": -1}, {"threshold": 1.5}, {"threshold": -0.1}, {"metadata_mode": "some"}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(**wrong)
    with pytest.raises(TypeError, match="top_k"):
        make(top_k=3)
    postprocessor = make()
    with pytest.raises(ValueError, match="top_n"):
        postprocessor.top_n = -1
    with pytest.raises(ValueError, match="topn"):
        postprocessor.topn = 3
    postprocessor.top_n = 1
    postprocessor.threshold = 0.0
    assert len(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)) == 1


def test_code_of_a_checkpoint_is_never_run(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("causal_lm_auto_map")
    with pytest.warns(ZerankWarning, match="never run"):
        postprocessor = ZerankRerank(folder, trust_remote_code=True, dtype="float32", device="cpu")
    assert len(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)) == 8
    assert not (folder / "remote_code_ran").exists()


# Life


async def test_equal_options_share_one_model(make: Make) -> None:
    one, other, third = make(top_n=1), make(threshold=0.1), make(token_budget=500)
    shared = one.warm_up().reranker.engine()
    assert (await other.awarm_up()).reranker.engine() is shared
    assert third.warm_up().reranker.engine() is shared
    one.close()
    assert not one.reranker.loaded
    assert other.reranker.engine() is shared
    for postprocessor in (other, third):
        await postprocessor.aclose()


async def test_blocks_close_and_a_later_call_loads_again(make: Make) -> None:
    with make() as postprocessor:
        postprocessor.warm_up()
        assert postprocessor.reranker.loaded
    assert not postprocessor.reranker.loaded
    async with postprocessor as same:
        assert same is postprocessor
        assert len(await postprocessor.apostprocess_nodes(nodes(), query_str=QUERY)) == 8
    assert not postprocessor.reranker.loaded
    postprocessor.close()
    assert len(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)) == 8


def test_round_trips_keep_every_option_and_no_secret(make: Make) -> None:
    postprocessor = make(
        token=SECRET,
        top_n=2,
        threshold=0.25,
        metadata_mode=MetadataMode.LLM,
        keep_retrieval_score=True,
        max_length=99,
        instruction="prefer short ones",
    )
    data = postprocessor.to_dict()
    assert data["class_name"] == "ZerankRerank"
    assert data["device"] == "cpu"
    assert {type(value) for value in data.values()} <= {str, int, float, bool, type(None)}
    assert set(data) == set(inspect.signature(Reranker).parameters) - {"token"} | {
        "top_n",
        "threshold",
        "metadata_mode",
        "keep_retrieval_score",
        "class_name",
    }
    assert ZerankRerank.from_dict(data).to_dict() == data
    assert ZerankRerank.from_json(postprocessor.to_json()).to_dict() == data
    assert ZerankRerank.from_dict(data, top_n=5, token=SECRET).to_dict() == data | {"top_n": 5}
    assert pickle.loads(pickle.dumps(postprocessor)).to_dict() == data
    assert copy.deepcopy(postprocessor).to_dict() == data
    assert json.loads(postprocessor.model_dump_json()) == data
    for text in (str(data), postprocessor.to_json(), repr(postprocessor), str(postprocessor), str(vars(postprocessor))):
        assert SECRET not in text
    assert SECRET.encode() not in pickle.dumps(postprocessor)
    for again in (ZerankRerank.from_dict(data), pickle.loads(pickle.dumps(postprocessor))):
        assert again.metadata_mode is MetadataMode.LLM
        assert again.callback_manager.handlers == []


async def test_copies_of_one_that_has_scored(make: Make) -> None:
    postprocessor = make(top_n=3)
    expected = postprocessor.postprocess_nodes(nodes(), query_str=QUERY)
    for again in (
        pickle.loads(pickle.dumps(postprocessor)),
        copy.deepcopy(postprocessor),
        copy.copy(postprocessor),
        postprocessor.model_copy(update={"threshold": 0.0}),
    ):
        found = await both(again, nodes(), query_str=QUERY)
        assert written(found) == written(expected)
        assert again.reranker.engine() is postprocessor.reranker.engine()
        again.top_n = 1
    assert postprocessor.top_n == 3
    deep = copy.deepcopy(postprocessor)
    deep.warm_up().close()
    assert postprocessor.reranker.loaded


def test_callbacks_that_cannot_be_copied_are_shared_or_left_behind(make: Make) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    debug.lock = threading.Lock()
    postprocessor = make(callback_manager=CallbackManager([debug]))
    assert copy.deepcopy(postprocessor).callback_manager is postprocessor.callback_manager
    assert pickle.loads(pickle.dumps(postprocessor)).callback_manager.handlers == []
    assert postprocessor.callback_manager.handlers == [debug]


# Imports


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_it_brings_its_own_framework_only() -> None:
    done = run(
        "import sys, zerank_integrations.llama_index\n"
        "heavy_or_foreign = {'torch', 'transformers', 'peft', 'sentence_transformers', 'langchain_core', 'haystack'}\n"
        "assert not heavy_or_foreign & set(sys.modules), heavy_or_foreign & set(sys.modules)\n"
        "zerank_integrations.llama_index.ZerankRerank(device='cpu', top_n=3)\n"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_without_llama_index_the_remedy_is_named() -> None:
    done = run(
        "import sys\n"
        "sys.modules['llama_index'] = None\n"
        "from zerank_integrations import MissingPackage\n"
        "try:\n"
        "    import zerank_integrations.llama_index\n"
        "except MissingPackage as error:\n"
        "    print(error)\n"
    )
    assert 'pip install "zerank-integrations[llamaindex]"' in done.stdout, done.stderr
