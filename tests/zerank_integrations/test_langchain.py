"""The LangChain integration inside LangChain's own retrievers, chains and standard tests."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_core.load import dumps
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_tests.integration_tests import RetrieversIntegrationTests

from zerank_integrations import Ranked, Reranker, ZerankWarning
from zerank_integrations.checkpoints import DEFAULT
from zerank_integrations.langchain import ZerankCompressor, ZerankCrossEncoder
from zerank_integrations.reranker import LoadOptions

QUERY = "quick river bridge"
TEXTS = (
    "The old bridge crosses the river near the village.",
    "Butter and cheese are made in the kitchen.",
    "A quick query finds the document.",
    "River water is used to boil a potato.",
    "The lawyer wrote a letter to the judge.",
    "",
)


class Words(BaseRetriever):
    """Documents that share the most words with the query."""

    documents: list[Document]
    k: int = 4

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        words = set(re.findall(r"\w+", query.lower()))

        def shared(document: Document) -> int:
            return len(words & set(re.findall(r"\w+", document.page_content.lower())))

        return sorted(self.documents, key=shared, reverse=True)[: self.k if k is None else k]


class Page(Document):
    """A user's own kind of document."""

    page: int


class Heard(BaseCallbackHandler):
    """Writes down custom events and the runs they belong to."""

    def __init__(self) -> None:
        self.runs: dict[UUID, str] = {}
        self.events: list[tuple[str, UUID, dict[str, Any]]] = []

    def on_retriever_start(self, serialized: dict[str, Any] | None, query: str, *, run_id: UUID, **_: object) -> None:
        self.runs[run_id] = query

    def on_chain_start(
        self, serialized: dict[str, Any] | None, inputs: object, *, run_id: UUID, name: str = "", **_: object
    ) -> None:
        self.runs[run_id] = name

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **_: object) -> None:  # noqa: ANN401
        self.events.append((name, run_id, data))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.events]


class AsyncHeard(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.names: list[str] = []

    async def on_custom_event(self, name: str, data: object, **_: object) -> None:
        self.names.append(name)


class Refusing(ThreadPoolExecutor):
    """Stands where asyncio's own executor would, and is never to be used."""

    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future:
        msg = f"{fn} was sent to the default executor"
        raise AssertionError(msg)


class CountingReranker(Reranker):
    """A real reranker that counts its calls."""

    calls = 0

    def rank_many(self, *arguments: Any, **options: Any) -> list[Ranked]:  # noqa: ANN401
        self.calls += 1
        return super().rank_many(*arguments, **options)

    async def arank_many(self, *arguments: Any, **options: Any) -> list[Ranked]:  # noqa: ANN401
        self.calls += 1
        return await super().arank_many(*arguments, **options)


START_END = ["zerank_rerank_start", "zerank_rerank_end"]


def compressor_of(folder: str, **options: Any) -> ZerankCompressor:  # noqa: ANN401
    """In float32: bfloat16, the default where a processor has it, rounds differently from batch to batch."""
    return ZerankCompressor(folder, dtype="float32", **options)


def encoder_of(folder: str, **options: Any) -> ZerankCrossEncoder:  # noqa: ANN401
    return ZerankCrossEncoder(folder, dtype="float32", **options)


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> str:
    return str(tiny_folder("causal_lm"))


@pytest.fixture(scope="module")
def relevances(folder: str) -> list[float]:
    """What the core says of TEXTS, in their order."""
    return Reranker(folder, dtype="float32").score(QUERY, TEXTS)


@pytest.fixture(scope="module")
def compressor(folder: str) -> ZerankCompressor:
    """Holds the model for the whole module, so that it is loaded once."""
    compressor = compressor_of(folder)
    compressor.reranker.warm_up()
    return compressor


def documents(texts: Iterable[str] = TEXTS) -> list[Document]:
    return [Document(text, id=f"id-{i}", metadata={"place": i, "tags": ["a"]}) for i, text in enumerate(texts)]


def best_first(relevances: list[float]) -> list[int]:
    return sorted(range(len(relevances)), key=lambda i: -relevances[i])


def places(found: Iterable[Document]) -> list[int]:
    return [document.metadata["place"] for document in found]


def near(expected: Any) -> Any:  # noqa: ANN401
    """Equal up to what float32 rounds differently in another batch: documents, results or numbers, lists of them or not."""
    match expected:
        case list():
            return [near(each) for each in expected]
        case dict():
            return {key: near(value) for key, value in expected.items()}
        case Document():
            return expected.model_copy(update={"metadata": near(expected.metadata)})
        case float():
            return pytest.approx(expected, abs=1e-5)
        case _:
            return expected


def retriever(compressor: ZerankCompressor, k: int = 6) -> ContextualCompressionRetriever:
    return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Words(documents=documents(), k=k))


# What comes back


def test_documents_come_back_in_the_order_and_with_the_relevances_of_the_core(
    compressor: ZerankCompressor, relevances: list[float]
) -> None:
    found = compressor.compress_documents(documents(), QUERY)
    assert places(found) == best_first(relevances)
    assert [d.metadata["relevance_score"] for d in found] == near([relevances[i] for i in best_first(relevances)])
    assert len(set(relevances)) == len(TEXTS)
    for document in found:
        assert type(document.metadata["relevance_score"]) is float
        assert "relevance_truncated" not in document.metadata
        assert "relevance_span" not in document.metadata


async def test_async_is_the_same(compressor: ZerankCompressor) -> None:
    assert await compressor.acompress_documents(documents(), QUERY) == compressor.compress_documents(documents(), QUERY) != []


def test_ids_classes_fields_and_metadata_are_kept_and_the_inputs_are_left_alone(compressor: ZerankCompressor) -> None:
    given = [Page(page_content=text, page=i, id=f"page-{i}", metadata={"source": f"{i}.html"}) for i, text in enumerate(TEXTS)]
    before = copy.deepcopy(given)
    found = compressor.compress_documents(given, QUERY)
    assert given == before
    assert all(type(document) is Page for document in found)
    assert {(d.id, d.page, d.page_content, d.metadata["source"]) for d in found} == {
        (d.id, d.page, d.page_content, d.metadata["source"]) for d in before
    }
    found[0].metadata["new"] = True
    assert given == before


def test_the_new_score_wins_and_the_first_old_one_is_kept(compressor: ZerankCompressor, relevances: list[float]) -> None:
    retrieved = Document(TEXTS[0], metadata={"relevance_score": 12.5, "relevance_truncated": True, "relevance_span": [1, 2]})
    (once,) = compressor.compress_documents([retrieved], QUERY)
    assert once.metadata == near({"relevance_score": relevances[0], "retrieval_score": 12.5})
    (twice,) = compressor.compress_documents([once], "another query")
    assert twice.metadata["retrieval_score"] == 12.5
    assert twice.metadata["relevance_score"] != near(relevances[0])


def test_equal_documents_keep_their_order(compressor: ZerankCompressor) -> None:
    found = compressor.compress_documents(documents(["the same"] * 5), QUERY)
    assert places(found) == [0, 1, 2, 3, 4]


def test_cut_documents_say_so_and_warn_once(folder: str) -> None:
    compressor = compressor_of(folder, max_length=60)
    given = documents(["short", "a longer document about the river " * 20])
    with pytest.warns(ZerankWarning, match="1 of 2 documents were longer") as warned:
        found = compressor.compress_documents(given, QUERY)
        compressor.compress_documents(given, QUERY)
    assert len(warned) == 1
    assert {d.metadata["place"]: d.metadata.get("relevance_truncated") for d in found} == {0: None, 1: True}


def test_the_passage_that_counted_is_named(folder: str) -> None:
    text = "first the river is deep. " * 10 + "then the judge is late. " * 10
    compressor = compressor_of(folder, max_passage_tokens=24)
    (found,) = compressor.compress_documents(documents([text]), QUERY)
    start, end = found.metadata["relevance_span"]
    assert 0 <= start < end <= len(text)
    assert end - start < len(text) / 2
    json.dumps(found.metadata)
    assert "relevance_truncated" not in found.metadata


# How many


def test_top_n_and_threshold(compressor: ZerankCompressor, folder: str, relevances: list[float]) -> None:
    order = best_first(relevances)
    middle = relevances[order[2]] - 1e-4
    assert places(compressor_of(folder, top_n=2).compress_documents(documents(), QUERY)) == order[:2]
    assert places(compressor_of(folder, threshold=middle).compress_documents(documents(), QUERY)) == order[:3]
    assert places(compressor_of(folder, top_n=1, threshold=middle).compress_documents(documents(), QUERY)) == order[:1]
    assert places(compressor.compress_documents(documents(), QUERY, top_n=2)) == order[:2]
    assert places(compressor.compress_documents(documents(), QUERY, threshold=middle)) == order[:3]
    assert len(compressor_of(folder, top_n=100).compress_documents(documents(), QUERY)) == len(TEXTS)
    # None asks for all, even of a compressor that has a top_n of its own.
    assert places(compressor_of(folder, top_n=2).compress_documents(documents(), QUERY, top_n=None)) == order


async def test_top_n_0_and_no_documents_are_empty_and_load_nothing(tiny_folder: Callable[[str], Path]) -> None:
    compressor = ZerankCompressor(tiny_folder("causal_lm_bfloat16"), top_n=0)
    assert compressor.compress_documents(documents(), QUERY) == []
    assert await compressor.acompress_documents(documents(), QUERY) == []
    assert compressor.rerank(list(TEXTS), QUERY) == []
    assert compressor.compress_documents([], QUERY, top_n=5) == []
    assert await compressor.acompress_documents([], QUERY, top_n=5) == []
    assert compressor.rerank_batch([]) == []
    assert ZerankCrossEncoder(reranker=compressor.reranker).score([]) == []
    assert not compressor.reranker.loaded


@pytest.mark.parametrize("limits", [{"top_n": -1}, {"threshold": 1.5}, {"threshold": -0.1}, {"top_n": "many"}])
def test_limits_out_of_range_are_refused(limits: dict[str, Any], compressor: ZerankCompressor) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        ZerankCompressor("zelo-mini", **limits)
    changed = compressor.model_copy()
    with pytest.raises(ValueError, match=next(iter(limits))):
        setattr(changed, *next(iter(limits.items())))


def test_limits_of_one_call_are_checked_too(compressor: ZerankCompressor) -> None:
    with pytest.raises(ValueError, match="top_n is -1; expected"):
        compressor.compress_documents(documents(), QUERY, top_n=-1)
    with pytest.raises(ValueError, match=r"threshold is 1\.5; expected"):
        compressor.rerank(documents(), QUERY, threshold=1.5)


def test_limits_can_be_changed_later_the_reranker_cannot(folder: str, relevances: list[float]) -> None:
    compressor = compressor_of(folder)
    compressor.top_n = 2
    assert places(compressor.compress_documents(documents(), QUERY)) == best_first(relevances)[:2]
    with pytest.raises(ValueError, match="frozen"):
        compressor.reranker = Reranker("zelo-mini")
    with pytest.raises(ValueError, match="device"):
        compressor.device = "cuda"


# Construction


def test_the_default_model_and_no_load_before_use() -> None:
    compressor = ZerankCompressor()
    assert compressor.reranker.model == ZerankCrossEncoder().reranker.model == DEFAULT
    assert not compressor.reranker.loaded


def test_every_option_of_the_reranker_is_taken(folder: str) -> None:
    assert set(LoadOptions.__annotations__) == set(inspect.signature(Reranker).parameters) - {"model"}
    options = {
        "revision": "main",
        "base": folder,
        "device": "cpu",
        "dtype": "float32",
        "attn_implementation": "eager",
        "cache_folder": "cache",
        "local_files_only": True,
        "max_length": 512,
        "max_passage_tokens": 128,
        "token_budget": 2048,
        "control_tokens": "parse",
        "instruction": "Prefer recipes.",
        "deterministic": True,
    }
    assert set(options) | {"token"} == set(LoadOptions.__annotations__)
    for build in (ZerankCompressor, ZerankCrossEncoder):
        assert build(folder, token="t", **options).reranker.options == {"model": folder, **options}


def test_options_change_the_scores(folder: str, relevances: list[float]) -> None:
    instructed = compressor_of(folder, instruction="Prefer recipes.")
    assert {r["relevance_score"] for r in instructed.rerank(TEXTS, QUERY)}.isdisjoint(relevances)


@pytest.mark.parametrize("build", [ZerankCompressor, ZerankCrossEncoder])
def test_a_ready_reranker_or_options_but_not_both(build: type, folder: str) -> None:
    reranker = Reranker(folder, dtype="float32")
    assert build(reranker=reranker).reranker is reranker
    with pytest.raises(ValueError, match="both a reranker and model, device are given"):
        build(folder, reranker=reranker, device="cpu")
    with pytest.raises(TypeError, match="devise"):
        build(folder, devise="cpu")


def test_equal_options_share_one_model(folder: str) -> None:
    compressor, encoder = compressor_of(folder, top_n=1), encoder_of(folder)
    assert compressor.reranker.engine() is encoder.reranker.engine()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Document("fine"), "a text"], "document 1 is str; expected a langchain_core Document"),
        ([None], "document 0 is NoneType"),
    ],
)
def test_what_is_no_document_is_named(compressor: ZerankCompressor, given: list[Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        compressor.compress_documents(given, QUERY)


# Indices


async def test_rerank_takes_texts_documents_and_dicts(compressor: ZerankCompressor, relevances: list[float]) -> None:
    expected = near([{"index": i, "relevance_score": relevances[i]} for i in best_first(relevances)])
    mixed = [
        TEXTS[0],
        Document(TEXTS[1]),
        {"text": TEXTS[2], "title": "ignored"},
        {"page_content": TEXTS[3]},
        Document(TEXTS[4]).model_dump(),
        {"text": ""},
    ]
    assert compressor.rerank(mixed, QUERY) == expected
    assert compressor.rerank(iter(mixed), QUERY, top_n=2) == expected[:2]
    assert await compressor.arerank(mixed, QUERY) == expected
    assert await compressor.arerank(mixed, QUERY, threshold=relevances[expected[1]["index"]] - 1e-4) == expected[:2]
    assert all(type(result["relevance_score"]) is float for result in compressor.rerank(mixed, QUERY))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fine", {"title": "no text"}], r"document 1 is dict with the keys \['title'\]; expected a str, a Document or a dict"),
        (["fine", {"text": None}], r"document 1 is dict with the keys \['text'\]"),
        ([7], "document 0 is int"),
        ("a text", "documents is one str"),
        ({"text": "a text"}, "documents is one dict"),
    ],
)
def test_rerank_names_what_it_cannot_read(compressor: ZerankCompressor, given: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=message):
        compressor.rerank(given, QUERY)


async def test_rerank_batch_is_one_call_for_several_queries(
    folder: str, compressor: ZerankCompressor, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [(QUERY, TEXTS), ("butter", documents()[:3]), ("nothing", [])]
    expected = near([compressor.rerank(given, query) for query, given in requests])
    counting = CountingReranker(folder, dtype="float32")
    batching = ZerankCompressor(reranker=counting)
    assert batching.rerank_batch(requests) == expected
    assert counting.calls == 1
    assert await batching.arerank_batch(requests) == expected
    assert counting.calls == 2
    assert [len(each) for each in batching.rerank_batch(requests, top_n=2)] == [2, 2, 0]
    assert capsys.readouterr().err == ""
    batching.rerank_batch(requests, progress=True)
    assert "9/9" in capsys.readouterr().err


# In retrievers


def test_contextual_compression_retriever(folder: str, relevances: list[float]) -> None:
    reranking = retriever(compressor_of(folder, top_n=3))
    assert places(reranking.invoke(QUERY)) == best_first(relevances)[:3]


async def test_contextual_compression_retriever_async_and_batch(folder: str) -> None:
    reranking = retriever(compressor_of(folder, deterministic=True))
    queries = [QUERY, "butter and cheese", "lawyer"]
    expected = [reranking.invoke(query) for query in queries]
    assert reranking.batch(queries) == expected
    assert await reranking.abatch(queries) == expected
    assert await reranking.ainvoke(QUERY) == expected[0]


def test_document_compressor_pipeline(compressor: ZerankCompressor, folder: str, relevances: list[float]) -> None:
    pipeline = DocumentCompressorPipeline(transformers=[compressor, compressor_of(folder, top_n=1)])
    (found,) = pipeline.compress_documents(documents(), QUERY)
    best = best_first(relevances)[0]
    assert found.id == f"id-{best}"
    assert found.metadata["retrieval_score"] == found.metadata["relevance_score"] == near(relevances[best])


class TestStandard(RetrieversIntegrationTests):
    """LangChain's standard tests of a retriever, for one that reranks."""

    @pytest.fixture(autouse=True)
    def _with_compressor(self, compressor: ZerankCompressor) -> None:
        self.compressor = compressor

    @property
    def retriever_constructor(self) -> Callable[..., BaseRetriever]:  # type: ignore[override]
        def build(k: int = 4) -> BaseRetriever:
            return ContextualCompressionRetriever(
                base_compressor=self.compressor.model_copy(update={"top_n": k}),
                base_retriever=Words(documents=documents(), k=6),
            )

        return build

    @property
    def retriever_query_example(self) -> str:
        return QUERY


# In chains


def test_lcel_chain(folder: str, relevances: list[float]) -> None:
    reranking = compressor_of(folder, top_n=2).as_runnable()
    prompt = PromptTemplate.from_template("{context}\n\n{question}")
    shown: list[str] = []

    def show(prompt: Any) -> Any:  # noqa: ANN401
        shown.append(prompt.to_string())
        return prompt

    chain = (
        {"query": RunnablePassthrough(), "documents": Words(documents=documents(), k=6)}
        | RunnablePassthrough.assign(documents=reranking)
        | (lambda found: {"context": "\n".join(d.page_content for d in found["documents"]), "question": found["query"]})
        | prompt
        | show
        | FakeListLLM(responses=["across the river"])
        | StrOutputParser()
    )
    assert chain.invoke(QUERY) == "across the river"
    first, second, *_ = best_first(relevances)
    assert shown == [f"{TEXTS[first]}\n{TEXTS[second]}\n\n{QUERY}"]


async def test_runnable_sync_async_batch_and_stream(folder: str, compressor: ZerankCompressor) -> None:
    counting = CountingReranker(folder, dtype="float32")
    runnable = ZerankCompressor(reranker=counting, top_n=3).as_runnable()
    inputs = [{"query": query, "documents": documents()} for query in (QUERY, "butter", "judge")]
    expected = near([compressor.compress_documents(each["documents"], each["query"], top_n=3) for each in inputs])
    assert runnable.invoke(inputs[0]) == expected[0]
    assert await runnable.ainvoke(inputs[0]) == expected[0]
    assert list(runnable.stream(inputs[0])) == [expected[0]]
    counting.calls = 0
    assert runnable.batch(inputs) == expected
    assert counting.calls == 1
    assert await runnable.abatch(inputs) == expected
    assert counting.calls == 2
    assert runnable.bind(top_n=1).batch(inputs) == [found[:1] for found in expected]
    assert await runnable.bind(top_n=1).ainvoke(inputs[1]) == expected[1][:1]
    assert runnable.batch([]) == []


async def test_an_input_that_fails_does_not_fail_the_others(compressor: ZerankCompressor) -> None:
    runnable = compressor.as_runnable()
    good, bad = {"query": QUERY, "documents": documents()}, {"query": QUERY, "documents": ["a text"]}
    found, failed = runnable.batch([good, bad], return_exceptions=True)
    assert found == runnable.invoke(good)
    assert isinstance(failed, TypeError)
    found, failed = await runnable.abatch([good, bad], return_exceptions=True)
    assert found == runnable.invoke(good)
    assert isinstance(failed, TypeError)
    with pytest.raises(TypeError, match="document 0 is str"):
        runnable.batch([good, bad])
    with pytest.raises(TypeError, match="document 0 is str"):
        await runnable.abatch([good, bad])


@pytest.mark.parametrize(
    ("given", "found"), [({"question": QUERY}, r"a dict with the keys \['question'\]"), (QUERY, "the input is str")]
)
def test_runnable_says_what_it_expects(compressor: ZerankCompressor, given: Any, found: str) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=rf'{found}.*expected {{"query": "\.\.\.", "documents"'):
        compressor.as_runnable().invoke(given)


def test_runnable_describes_itself(compressor: ZerankCompressor) -> None:
    runnable = compressor.as_runnable()
    assert runnable.get_name() == "ZerankCompressor"
    assert set(runnable.get_input_jsonschema()["$defs"]["RerankInput"]["required"]) == {"query", "documents"}
    assert runnable.get_output_jsonschema()["type"] == "array"


# Events


def test_events_belong_to_the_run_of_the_retriever(folder: str, relevances: list[float]) -> None:
    heard, threshold = Heard(), sorted(relevances)[1] - 1e-4
    compressor = compressor_of(folder, threshold=threshold)
    retriever(compressor).invoke(QUERY, config={"callbacks": [heard]})
    assert heard.names == START_END
    (_, start_run, start), (_, end_run, end) = heard.events
    assert start_run == end_run
    assert heard.runs[start_run] == QUERY
    assert start == {
        "model": folder,
        "query": QUERY,
        "documents": 6,
        "top_n": 6,  # of a compressor without one: all
        "threshold": threshold,
    }
    order = best_first(relevances)[:5]
    assert end["documents"] == len(end["indices"]) == 5
    assert end["relevance_scores"] == near([relevances[i] for i in order])
    assert end["truncated"] == []
    json.dumps([start, end])


async def test_events_in_async_runs(compressor: ZerankCompressor) -> None:
    heard, aheard = Heard(), AsyncHeard()
    await retriever(compressor).ainvoke(QUERY, config={"callbacks": [heard, aheard]})
    assert heard.names == aheard.names == START_END
    assert set(heard.runs) >= {run for _, run, _ in heard.events}


async def test_events_are_balanced_for_empty_input(compressor: ZerankCompressor) -> None:
    heard = Heard()
    runnable = compressor.as_runnable()
    assert runnable.invoke({"query": QUERY, "documents": []}, config={"callbacks": [heard]}) == []
    assert await runnable.ainvoke({"query": QUERY, "documents": []}, config={"callbacks": [heard]}) == []
    assert heard.names == START_END * 2
    assert [data["documents"] for _, _, data in heard.events] == [0, 0, 0, 0]


async def test_each_input_of_a_batch_has_its_own_events(compressor: ZerankCompressor) -> None:
    inputs = [{"query": query, "documents": documents()} for query in (QUERY, "butter")]
    for batch in ("batch", "abatch"):
        heard = Heard()
        outcome = getattr(compressor.as_runnable(), batch)(inputs, config={"callbacks": [heard]})
        if inspect.isawaitable(outcome):
            await outcome
        by_run = {run: [name for name, of, _ in heard.events if of == run] for run in heard.runs}
        assert list(by_run.values()) == [START_END, START_END]
        assert set(heard.runs.values()) == {"ZerankCompressor"}


async def test_without_a_run_there_are_no_events_and_no_error(compressor: ZerankCompressor) -> None:
    heard = Heard()
    assert compressor.compress_documents(documents(), QUERY, callbacks=[heard])
    assert await compressor.acompress_documents(documents(), QUERY, callbacks=[heard])
    assert compressor.compress_documents(documents(), QUERY, None)
    assert heard.events == []


async def test_a_call_inside_a_function_of_a_chain_finds_the_run_itself(compressor: ZerankCompressor) -> None:
    heard = Heard()

    def rerank(query: str) -> list[Document]:
        return compressor.compress_documents(documents(), query)

    async def arerank(query: str) -> list[Document]:
        return await compressor.acompress_documents(documents(), query)

    link = RunnableLambda(rerank, arerank)
    link.invoke(QUERY, config={"callbacks": [heard]})
    assert heard.names == START_END
    assert {heard.runs[run] for _, run, _ in heard.events} == {"rerank"}
    heard = Heard()
    await link.ainvoke(QUERY, config={"callbacks": [heard]})
    assert heard.names == START_END


async def test_events_stream(compressor: ZerankCompressor) -> None:
    chain = {"query": RunnablePassthrough(), "documents": Words(documents=documents())} | compressor.as_runnable()
    events = [event async for event in chain.astream_events(QUERY, version="v2")]
    assert [event["name"] for event in events if event["event"] == "on_custom_event"] == START_END


def test_an_error_of_a_handler_is_not_mistaken_for_a_missing_run(compressor: ZerankCompressor) -> None:
    class Failing(Heard):
        raise_error = True

        def on_custom_event(self, *_: object, **__: object) -> None:
            msg = "the handler failed"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="the handler failed"):
        retriever(compressor).invoke(QUERY, config={"callbacks": [Failing()]})


# Concurrency


async def test_20_calls_at_once_hold_neither_the_loop_nor_its_executor(folder: str) -> None:
    compressor = compressor_of(folder, deterministic=True)
    given = [documents(f"{text} {i} " * 20 for text in TEXTS) for i in range(20)]
    expected = [compressor.compress_documents(each, QUERY) for each in given]
    asyncio.get_running_loop().set_default_executor(Refusing())
    longest = 0.0
    done = False

    async def watch() -> None:
        nonlocal longest
        while not done:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.005)
    started = time.perf_counter()
    found = await asyncio.gather(*(compressor.acompress_documents(each, QUERY) for each in given))
    scores = await encoder_of(folder).ascore([(QUERY, each[0].page_content) for each in given])
    took = time.perf_counter() - started
    done = True
    await watching
    assert found == expected
    assert scores == near([next(d.metadata["relevance_score"] for d in f if d.metadata["place"] == 0) for f in found])
    assert longest < max(0.05, took / 4), f"the loop was held for {longest:.3f} of {took:.3f} s"


async def test_loading_does_not_hold_the_loop(tiny_folder: Callable[[str], Path]) -> None:
    asyncio.get_running_loop().set_default_executor(Refusing())
    compressor = ZerankCompressor(tiny_folder("sharded"))
    ticks = 0
    loading = asyncio.create_task(compressor.acompress_documents(documents(), QUERY))
    while not loading.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert len(await loading) == len(TEXTS)
    assert compressor.reranker.loaded
    assert ticks > 3
    await compressor.reranker.aclose()
    assert not compressor.reranker.loaded


async def test_a_cancelled_call_leaves_the_others_alone(folder: str) -> None:
    compressor = compressor_of(folder, deterministic=True)
    long = documents(f"{text} {i} " * 30 for i in range(5) for text in TEXTS)
    running, cancelled, waiting = (asyncio.create_task(compressor.acompress_documents(long, QUERY)) for _ in range(3))
    await asyncio.sleep(0.01)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await running == await waiting == compressor.compress_documents(long, QUERY)


# Cross encoder


async def test_cross_encoder_scores_pairs_of_several_queries_in_one_call(folder: str, relevances: list[float]) -> None:
    counting = CountingReranker(folder, dtype="float32")
    encoder = ZerankCrossEncoder(reranker=counting)
    other = Reranker(folder, dtype="float32").score("butter", TEXTS)
    pairs = [pair for text in TEXTS for pair in ((QUERY, text), ("butter", text))]
    expected = near([score for both in zip(relevances, other, strict=True) for score in both])
    scores = encoder.score(pairs)
    assert scores == expected
    assert counting.calls == 1
    assert await encoder.ascore(pairs) == expected
    assert all(type(score) is float for score in scores)
    assert encoder.score([pairs[0], pairs[0]]) == near([relevances[0]] * 2)


@pytest.mark.parametrize("pair", ["ab", ("query",), ("query", None), (None, "document"), ("a", "b", "c"), 7])
def test_cross_encoder_names_what_is_no_pair(folder: str, pair: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"pair 1 is .*; expected \(query, document\)"):
        encoder_of(folder).score([("query", "document"), pair])


def test_cross_encoder_reranker_of_langchain(folder: str, relevances: list[float]) -> None:
    reranker = CrossEncoderReranker(model=encoder_of(folder), top_n=3)
    assert places(reranker.compress_documents(documents(), QUERY)) == best_first(relevances)[:3]


# Copies and secrets


def test_copies_keep_their_options_and_share_the_model(folder: str, compressor: ZerankCompressor) -> None:
    expected = compressor.compress_documents(documents(), QUERY, top_n=2)
    original = compressor_of(folder, top_n=2, threshold=0.01, max_length=512)
    original.reranker.warm_up()
    for made in (
        copy.copy(original),
        copy.deepcopy(original),
        original.model_copy(deep=True),
        pickle.loads(pickle.dumps(original)),
        ZerankCompressor(**original.model_dump()),
        ZerankCompressor.model_validate_json(original.model_dump_json()),
    ):
        assert made.model_dump() == original.model_dump()
        assert made.model_dump()["max_length"] == 512
        assert made.compress_documents(documents(), QUERY) == expected
        assert made.reranker.engine() is original.reranker.engine()
    encoder = encoder_of(folder, max_length=512)
    for made in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert made.reranker.options == encoder.reranker.options
        assert made.score([(QUERY, TEXTS[0])]) == encoder.score([(QUERY, TEXTS[0])])


def test_the_token_is_written_nowhere(folder: str) -> None:
    secret = "hf_do_not_write_me"
    compressor = ZerankCompressor(folder, token=secret)
    encoder = ZerankCrossEncoder(folder, token=secret)
    reranking = retriever(compressor)
    written = [
        repr(compressor),
        str(compressor),
        compressor.model_dump_json(),
        str(compressor.model_dump()),
        dumps(compressor),
        repr(reranking),
        dumps(reranking),
        dumps(compressor.as_runnable()),
        repr(encoder),
        dumps(encoder),
        pickle.dumps(compressor).decode("latin-1"),
        pickle.dumps(encoder).decode("latin-1"),
    ]
    assert [text for text in written if secret in text] == []
    with pytest.raises(ValueError, match="top_n") as error:
        ZerankCompressor(folder, token=secret, top_n=-1)
    assert secret not in str(error.value)
    assert folder in repr(compressor)
    assert folder in repr(encoder)


# Imports


def _run(program: str) -> str:
    return subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True).stdout


def test_importing_and_constructing_bring_no_torch_and_no_other_framework() -> None:
    heavy = ["torch", "transformers", "sentence_transformers", "langchain_classic", "langchain", "llama_index", "haystack"]
    program = f"""
import sys
from zerank_integrations.langchain import ZerankCompressor, ZerankCrossEncoder
compressor, encoder = ZerankCompressor("zelo-mini", top_n=3), ZerankCrossEncoder("zelo-mini")
compressor.compress_documents([], "a query")
compressor.as_runnable()
print([name for name in {heavy} if name in sys.modules])
"""
    assert _run(program).strip() == "[]"


def test_without_langchain_the_error_names_the_command() -> None:
    program = """
import sys
sys.modules["langchain_core"] = None
from zerank_integrations import MissingPackage
try:
    import zerank_integrations.langchain
except MissingPackage as error:
    print(error)
"""
    assert 'pip install "zerank-integrations[langchain]"' in _run(program)
