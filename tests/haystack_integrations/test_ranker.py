"""ZerankRanker in Haystack's own pipelines, from its own YAML, against the core."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

# Haystack reads it once, when it is imported.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

import pytest
import torch
import yaml
from haystack import DeserializationError, Document, Pipeline, component
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.core.errors import PipelineError
from haystack.dataclasses import ByteStream, SparseEmbedding
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.telemetry import _telemetry
from haystack.utils import ComponentDevice, Device, DeviceMap, Secret

import zerank_integrations.haystack
from haystack_integrations.components.rankers.zerank import ZerankRanker
from haystack_integrations.components.rankers.zerank.ranker import LOADING, PATH
from tests import reference
from zerank_integrations import ModelUnreachable, QueryTooLong, Ranked, Reranker, ZerankWarning

ROOT = Path(__file__).parents[2]
QUERY = "how long must the bread stay in the oven"
TEXTS = (
    "Knead the bread, let it rest, and leave it in the oven until it is brown.",
    "The tenant must pay the deposit before the contract begins.",
    "An electron has a charge; a molecule has a shape.",
    "Carrot and lentil soup: simmer for twenty minutes.",
    "The comet was seen with a telescope from the island.",
    "A judge may choose to remove the lawyer.",
    "Honey and butter are good with warm bread.",
    "",
)


@pytest.fixture
def ranker(tiny_causal_lm: Path) -> ZerankRanker:
    return ZerankRanker(model=tiny_causal_lm, device="cpu", dtype="float32")


@pytest.fixture
def core(tiny_causal_lm: Path) -> Reranker:
    return Reranker(tiny_causal_lm, device="cpu", dtype="float32")


def documents(*texts: str) -> list[Document]:
    """Documents named by their place."""
    return [Document(id=str(place), content=text) for place, text in enumerate(texts or TEXTS)]


def ids(answer: dict[str, Any]) -> list[str]:
    return [document.id for document in answer["documents"]]


def scores(answer: dict[str, Any]) -> list[float]:
    return [document.score for document in answer["documents"]]


def alike(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """The same documents in the same order, with scores that differ at most as float32 sums do in another company."""
    return ids(answer) == ids(expected) and scores(answer) == pytest.approx(scores(expected), abs=1e-5)


def run_fresh(script: str, *arguments: object, cwd: Path | None = None) -> str:
    """What a script prints in an interpreter of its own."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------------------- scores


def test_the_order_and_the_scores_are_the_cores(ranker: ZerankRanker, core: Reranker) -> None:
    answer = ranker.run(query=QUERY, documents=documents())
    expected = core.rank(QUERY, TEXTS)
    assert ids(answer) == [str(index) for index in expected.indices]
    assert scores(answer) == expected.relevances
    assert all(type(score) is float for score in scores(answer))
    assert len(set(scores(answer))) == len(TEXTS)


def test_without_scaling_scores_are_logits(ranker: ZerankRanker, tiny_causal_lm: Path) -> None:
    from transformers import AutoTokenizer

    answer = ranker.run(QUERY, documents(), scale_score=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
    plain = reference.reference_logits(tiny_causal_lm, tokenizer, [(QUERY, text) for text in TEXTS])
    assert scores(answer) == pytest.approx(sorted(plain, reverse=True), abs=1e-4)
    assert ids(answer) == [str(i) for i in sorted(range(len(TEXTS)), key=lambda i: -plain[i])]


def test_a_runs_scaling_wins_over_the_rankers_in_both_directions(tiny_causal_lm: Path, core: Reranker) -> None:
    expected = core.rank(QUERY, TEXTS)
    logits = [document.logit for document in expected]
    scaled = ZerankRanker(model=tiny_causal_lm, device="cpu", dtype="float32", scale_score=True)
    unscaled = ZerankRanker(model=tiny_causal_lm, device="cpu", dtype="float32", scale_score=False)
    assert scores(scaled.run(QUERY, documents(), scale_score=False)) == logits
    assert scores(unscaled.run(QUERY, documents(), scale_score=True)) == expected.relevances
    assert scores(unscaled.run(QUERY, documents())) == logits


def test_inputs_are_never_changed_and_all_but_the_score_is_kept(ranker: ZerankRanker) -> None:
    given = [
        Document(
            content=text,
            meta={"page": page, "nested": {"a": [1]}},
            score=0.25,
            embedding=[0.1, 0.2],
            sparse_embedding=SparseEmbedding(indices=[1], values=[0.5]),
            blob=ByteStream(b"bytes"),
        )
        for page, text in enumerate(TEXTS)
    ]
    before = copy.deepcopy(given)
    answer = ranker.run(QUERY, given)["documents"]
    assert given == before
    by_id = {document.id: document for document in before}
    assert len(answer) == len(given)
    for document in answer:
        kept = document.to_dict() | {"score": 0.25}
        assert kept == by_id[document.id].to_dict()
        assert all(document is not one for one in given)


def test_equal_texts_keep_their_order(ranker: ZerankRanker) -> None:
    answer = ranker.run(QUERY, documents(*["the same text"] * 6))
    assert ids(answer) == ["0", "1", "2", "3", "4", "5"]
    assert len(set(scores(answer))) == 1


def test_of_one_id_the_highest_scored_is_read(ranker: ZerankRanker, core: Reranker) -> None:
    given = [
        Document(id="twice", content=TEXTS[0]),
        Document(id="once", content=TEXTS[1], score=0.9),
        Document(id="twice", content=TEXTS[2], score=-3.0),
        Document(id="twice", content=TEXTS[3], score=-3.0),
        Document(id="twice", content=TEXTS[4]),
    ]
    answer = ranker.run(QUERY, given)["documents"]
    expected = core.rank(QUERY, [TEXTS[2], TEXTS[1]])
    assert [document.content for document in answer] == [document.text for document in expected]
    assert len(given) == 5


# ------------------------------------------------------------------------------------------------- top_k and threshold


@pytest.mark.parametrize("top_k", [0, -1, None, 2.5, "3"])
def test_top_k_at_init_is_at_least_one(top_k: object) -> None:
    with pytest.raises(ValueError, match=r"top_k is .*; expected a number of documents, at least 1"):
        ZerankRanker(top_k=top_k)


@pytest.mark.parametrize("top_k", [0, -1, 2.5])
@pytest.mark.parametrize("given", [TEXTS, ()])
def test_top_k_of_a_run_is_at_least_one(ranker: ZerankRanker, top_k: object, given: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"top_k is .*; expected a number of documents, at least 1"):
        ranker.run(QUERY, [Document(content=text) for text in given], top_k=top_k)
    assert not ranker.reranker.loaded


async def test_top_k_of_an_asynchronous_run_is_at_least_one(ranker: ZerankRanker) -> None:
    with pytest.raises(ValueError, match="top_k is 0"):
        await ranker.run_async(QUERY, documents(), top_k=0)


def test_top_k_is_ten_unless_said(tiny_causal_lm: Path) -> None:
    many = documents(*(f"text {place}" for place in range(14)))
    ranker = ZerankRanker(model=tiny_causal_lm, device="cpu")
    whole = ids(ranker.run(QUERY, many, top_k=14))
    assert ids(ranker.run(QUERY, many)) == whole[:10]
    assert ids(ranker.run(QUERY, many, top_k=3)) == whole[:3]
    assert ids(ranker.run(QUERY, many, top_k=99)) == whole
    ranker.top_k = 2
    assert ids(ranker.run(QUERY, many)) == whole[:2]


def test_a_threshold_holds_for_relevances_and_for_logits(tiny_causal_lm: Path, core: Reranker) -> None:
    expected = core.rank(QUERY, TEXTS)
    third, logit = expected[2].relevance, expected[2].logit
    ranker = ZerankRanker(model=tiny_causal_lm, device="cpu", dtype="float32", score_threshold=third)
    first_three = [str(index) for index in expected.indices[:3]]
    assert ids(ranker.run(QUERY, documents())) == first_three
    assert ids(ranker.run(QUERY, documents(), top_k=2)) == first_three[:2]
    # What a run asks for counts, even when it is 0.0.
    assert len(ids(ranker.run(QUERY, documents(), score_threshold=0.0))) == len(TEXTS)
    assert ids(ranker.run(QUERY, documents(), score_threshold=1.0)) == []
    assert ids(ranker.run(QUERY, documents(), scale_score=False, score_threshold=logit)) == first_three


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "0.5"])
def test_a_threshold_that_can_be_no_score_is_refused(ranker: ZerankRanker, threshold: object) -> None:
    with pytest.raises(ValueError, match="score_threshold is"):
        ZerankRanker(score_threshold=threshold)
    with pytest.raises(ValueError, match="score_threshold is"):
        ranker.run(QUERY, documents(), score_threshold=threshold)


def test_a_logits_threshold_with_scaled_scores_is_told() -> None:
    ranker = ZerankRanker(scale_score=False, score_threshold=-3.5)
    with pytest.raises(ValueError, match="For a threshold on logits pass scale_score=False"):
        ranker.run(QUERY, documents(), scale_score=True)


# --------------------------------------------------------------------------------------------------------- what is read


def test_prefixes_suffixes_and_meta_fields_are_read_as_by_haystacks_ranker(tiny_causal_lm: Path, core: Reranker) -> None:
    ranker = ZerankRanker(
        model=tiny_causal_lm,
        device="cpu",
        dtype="float32",
        query_prefix="query: ",
        query_suffix=" ?",
        document_prefix="document: ",
        document_suffix=" .",
        meta_fields_to_embed=["title", "year", "absent", "empty"],
        embedding_separator=" | ",
    )
    given = [
        Document(id="0", content="Knead it.", meta={"title": "Bread", "year": 1984, "empty": None, "other": "unread"}),
        Document(id="1", content="Knead it.", meta={"year": 0}),
        Document(id="2", content=None, meta={"title": "Only a title"}),
        Document(id="3", content="No meta."),
    ]
    texts = ["Bread | 1984 | Knead it.", "0 | Knead it.", "Only a title | ", "No meta."]
    expected = core.rank("query: bread ?", [f"document: {text} ." for text in texts])
    answer = ranker.run("bread", given)
    assert ids(answer) == [str(index) for index in expected.indices]
    assert scores(answer) == expected.relevances


def test_a_document_without_text_is_read_as_empty_and_told_once(ranker: ZerankRanker, core: Reranker) -> None:
    given = [
        Document(id="image", blob=ByteStream(b"..."), meta={"title": "A photograph"}),
        Document(id="text", content=TEXTS[0]),
    ]
    with pytest.warns(ZerankWarning, match=r"1 of 2 documents have no text .*'image'.*meta_fields_to_embed=") as told:
        answer = ranker.run(QUERY, given)
        ranker.run(QUERY, given)
    assert len(told) == 1
    expected = core.rank(QUERY, ["", TEXTS[0]])
    assert ids(answer) == [("image", "text")[index] for index in expected.indices]
    assert scores(answer) == expected.relevances

    ranker.meta_fields_to_embed = ["title"]
    expected = core.rank(QUERY, ["A photograph", TEXTS[0]])
    assert scores(ranker.run(QUERY, given)) == expected.relevances


def test_nothing_to_rank_loads_nothing() -> None:
    ranker = ZerankRanker(model="there/is-no-such-model", local_files_only=True)
    assert ranker.run(QUERY, []) == {"documents": []}
    assert asyncio.run(ranker.run_async(QUERY, [])) == {"documents": []}
    assert not ranker.reranker.loaded
    with pytest.raises(ModelUnreachable, match="there/is-no-such-model"):
        ranker.run(QUERY, documents())


def test_what_is_no_document_or_no_query_is_named(ranker: ZerankRanker) -> None:
    with pytest.raises(TypeError, match=r"documents\[1\] is str; expected a haystack Document"):
        ranker.run(QUERY, [Document(content="a"), "b"])
    with pytest.raises(TypeError, match="the query is NoneType; expected a str"):
        ranker.run(None, documents())


def test_cut_texts_and_counting_passages_are_told_in_the_meta(tiny_causal_lm: Path) -> None:
    long = " ".join(f"{word} number {place}" for place, word in enumerate(["bread", "oven", "kitchen"] * 60))
    given = [Document(id="long", content=long, meta={"title": "A long one"}), Document(id="short", content="bread")]
    cut = ZerankRanker(model=tiny_causal_lm, device="cpu", max_length=64)
    with pytest.warns(ZerankWarning, match="1 of 2 documents were longer"):
        answer = cut.run(QUERY, given)["documents"]
    assert {document.id: document.meta for document in answer} == {
        "long": {"title": "A long one", "relevance_truncated": True},
        "short": {},
    }
    assert given[0].meta == {"title": "A long one"}

    passages = ZerankRanker(
        model=tiny_causal_lm, device="cpu", max_passage_tokens=48, meta_fields_to_embed=["title"], document_suffix=" (end)"
    )
    # What an earlier ranker told of its own reading does not last.
    [found] = passages.run(QUERY, answer[:1] if answer[0].id == "long" else answer[1:])["documents"]
    assert set(found.meta) == {"title", "relevance_span"}
    [ranked] = passages.reranker.rank(QUERY, ["A long one\n" + long + " (end)"])
    start, end = found.meta["relevance_span"]
    assert 0 <= start < end <= len(long)
    assert long[start:end] in ranked.passage
    assert len(ranked.passage) - (end - start) in (0, len("A long one\n"), len(" (end)"))

    with pytest.raises(QueryTooLong):
        cut.run(QUERY * 20, given)


# ------------------------------------------------------------------------------------------------------------- arguments


def test_the_constructor_is_that_of_haystacks_own_ranker() -> None:
    theirs = {
        "device": None,
        "token": Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False),
        "top_k": 10,
        "query_prefix": "",
        "query_suffix": "",
        "document_prefix": "",
        "document_suffix": "",
        "meta_fields_to_embed": None,
        "embedding_separator": "\n",
        "scale_score": True,
        "score_threshold": None,
        "trust_remote_code": False,
        "model_kwargs": None,
        "tokenizer_kwargs": None,
        "config_kwargs": None,
        "backend": "torch",
        "batch_size": 16,
    }
    ours = {name: argument.default for name, argument in inspect.signature(ZerankRanker.__init__).parameters.items()}
    assert {name: ours.get(name, "missing") for name in theirs} == theirs
    assert ours["model"] == "zeroentropy/zerank-1-small-reranker"


def test_every_option_of_the_core_can_be_given() -> None:
    assert {*LOADING, "token"} == set(inspect.signature(Reranker).parameters)


def test_run_and_run_async_take_the_same() -> None:
    assert inspect.signature(ZerankRanker.run) == inspect.signature(ZerankRanker.run_async)
    assert list(inspect.signature(ZerankRanker.run).parameters)[1:] == [
        *("query", "documents", "top_k", "scale_score", "score_threshold")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "onnx"}, r"backend is 'onnx'; expected \"torch\""),
        ({"batch_size": 0}, "batch_size is 0; expected a number of pairs"),
        ({"model_kwargs": {"device_map": "auto"}}, "model_kwargs has 'device_map'.* expected only dtype, torch_dtype, attn"),
        ({"tokenizer_kwargs": {"use_fast": False}}, "tokenizer_kwargs has 'use_fast'.* expected only model_max_length"),
        ({"config_kwargs": {"num_labels": 1}}, "config_kwargs has 'num_labels'.* expected none"),
        ({"dtype": "float32", "model_kwargs": {"dtype": "bfloat16"}}, "dtype is 'float32', and model_kwargs.* one of the two"),
        ({"max_length": 0}, "max_length is 0; expected a number of tokens"),
        ({"control_tokens": "ignore"}, "control_tokens is 'ignore'"),
        (
            {"device": ComponentDevice.from_multiple(DeviceMap({"a": Device.cpu(), "b": Device.gpu()}))},
            "device is a map of several devices",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_when_the_ranker_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerankRanker(**arguments)


def test_a_token_is_a_secret() -> None:
    with pytest.raises(TypeError, match="expected a Secret"):
        ZerankRanker(token="hf_plain")


def test_remote_code_warns_and_never_runs(tiny_folder: Callable[[str], Path], ranker: ZerankRanker) -> None:
    folder = tiny_folder("causal_lm_auto_map")
    with pytest.warns(ZerankWarning, match="trust_remote_code=True has no effect"):
        trusting = ZerankRanker(model=folder, device="cpu", dtype="float32", trust_remote_code=True)
    assert scores(trusting.run(QUERY, documents())) == scores(ranker.run(QUERY, documents()))
    assert not (folder / "remote_code_ran").exists()


def test_keyword_dictionaries_of_haystacks_ranker_set_our_options(tiny_causal_lm: Path) -> None:
    ranker = ZerankRanker(
        model=tiny_causal_lm,
        model_kwargs={"torch_dtype": torch.float32, "attn_implementation": "eager"},
        tokenizer_kwargs={"model_max_length": 64, "padding_side": "left"},
        config_kwargs={},
    )
    options = ranker.reranker.options
    assert (options["dtype"], options["attn_implementation"], options["max_length"]) == ("float32", "eager", 64)
    written = ranker.to_dict()["init_parameters"]
    assert written["model_kwargs"] == {"torch_dtype": "float32", "attn_implementation": "eager"}
    # As Haystack writes a dtype.
    again = ZerankRanker(model=tiny_causal_lm, model_kwargs={"torch_dtype": "torch.float32", "attn_implementation": None})
    assert again.reranker.options["dtype"] == "float32"


def test_a_batch_is_a_budget_of_tokens_and_changes_no_order(tiny_causal_lm: Path) -> None:
    def made(**options: object) -> ZerankRanker:
        return ZerankRanker(model=tiny_causal_lm, device="cpu", dtype="float32", **options)

    assert made().reranker.options["token_budget"] == Reranker("zelo-mini").options["token_budget"]
    assert made(batch_size=4).reranker.options["token_budget"] == 2048
    assert made(batch_size=4, token_budget=99).reranker.options["token_budget"] == 99
    small, large = made(batch_size=1).run(QUERY, documents()), made(batch_size=64).run(QUERY, documents())
    assert ids(small) == ids(large)
    assert scores(small) == pytest.approx(scores(large), abs=1e-5)


# --------------------------------------------------------------------------------------------------------- serialisation


def test_to_dict_is_complete_and_basic() -> None:
    ranker = ZerankRanker(model=Path("some") / "folder", cache_folder=Path("cache"), base=Path("base"))
    assert ranker.to_dict() == {
        "type": "haystack_integrations.components.rankers.zerank.ZerankRanker",
        "init_parameters": {
            "model": os.path.join("some", "folder"),
            "device": None,
            "token": {"type": "env_var", "env_vars": ["HF_API_TOKEN", "HF_TOKEN"], "strict": False},
            "top_k": 10,
            "query_prefix": "",
            "query_suffix": "",
            "document_prefix": "",
            "document_suffix": "",
            "meta_fields_to_embed": [],
            "embedding_separator": "\n",
            "scale_score": True,
            "score_threshold": None,
            "trust_remote_code": False,
            "model_kwargs": None,
            "tokenizer_kwargs": None,
            "config_kwargs": None,
            "backend": "torch",
            "batch_size": 16,
            "revision": None,
            "base": "base",
            "dtype": "auto",
            "attn_implementation": None,
            "cache_folder": "cache",
            "local_files_only": False,
            "max_length": None,
            "max_passage_tokens": None,
            "token_budget": None,
            "control_tokens": "text",
            "instruction": None,
            "deterministic": False,
        },
    }
    arguments = inspect.signature(ZerankRanker.__init__).parameters
    assert set(ranker.to_dict()["init_parameters"]) == set(arguments) - {"self", "reranker"}


def test_to_dict_touches_no_live_state(tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A strict secret that cannot be read would raise as soon as the reranker is made.
    ranker = ZerankRanker(model=tiny_causal_lm, token=Secret.from_env_var("NO_SUCH_VARIABLE"))
    written = ranker.to_dict()
    assert ZerankRanker.from_dict(written).to_dict() == written
    with pytest.raises(ValueError, match="NO_SUCH_VARIABLE"):
        ranker.warm_up()
    monkeypatch.setenv("NO_SUCH_VARIABLE", "hf_now_it_is_set")
    ranker.warm_up()
    assert ranker.to_dict() == written
    assert ranker.to_dict()["init_parameters"]["device"] is None
    ranker.close()
    assert ranker.to_dict() == written
    # What is handed out is a copy.
    ranker.to_dict()["init_parameters"]["meta_fields_to_embed"].append("title")
    assert ranker.to_dict() == written


def test_from_dict_leaves_its_argument_as_it_is() -> None:
    data = ZerankRanker(device=ComponentDevice.from_str("cpu"), model_kwargs={"dtype": "float32"}).to_dict()
    before = copy.deepcopy(data)
    ZerankRanker.from_dict(data)
    ZerankRanker.from_dict(data)
    assert data == before
    with pytest.raises(DeserializationError, match="can't be deserialized as 'ZerankRanker'"):
        ZerankRanker.from_dict(data | {"type": "haystack_integrations.components.rankers.other.OtherRanker"})


@pytest.mark.parametrize(
    ("device", "written", "loaded_on"),
    [
        (None, None, None),
        ("cpu", "cpu", "cpu"),
        (torch.device("cpu"), "cpu", "cpu"),
        (ComponentDevice.from_str("cuda:1"), {"type": "single", "device": "cuda:1"}, "cuda:1"),
    ],
)
def test_a_device_survives_as_it_was_given(device: object, written: object, loaded_on: str | None) -> None:
    ranker = ZerankRanker(device=device)
    data = ranker.to_dict()
    assert data["init_parameters"]["device"] == written
    again = ZerankRanker.from_dict(data)
    assert again.to_dict() == data
    assert again.reranker.options["device"] == ranker.reranker.options["device"] == loaded_on


def test_no_secret_is_ever_written(tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ranker = ZerankRanker(model=tiny_causal_lm, device="cpu")
    ranker.run(QUERY, documents())
    pipeline = Pipeline()
    pipeline.add_component("ranker", ranker)
    assert "hf_secret" not in pipeline.dumps() + repr(ranker) + repr(vars(ranker))
    assert b"hf_secret" not in pickle.dumps(ranker)

    plain = ZerankRanker(model=tiny_causal_lm, device="cpu", token=Secret.from_token("hf_secret"))
    with pytest.raises(ValueError, match="Cannot serialize token-based secret"):
        plain.to_dict()
    pickled = pickle.dumps(plain)
    assert b"hf_secret" not in pickled
    assert pickle.loads(pickled).token is None
    assert copy.deepcopy(plain).token == plain.token


def test_copies_answer_alike_and_belong_to_no_pipeline(tiny_causal_lm: Path) -> None:
    original = ZerankRanker(
        model=tiny_causal_lm,
        device=ComponentDevice.from_str("cpu"),
        model_kwargs={"dtype": "float32"},
        top_k=4,
        meta_fields_to_embed=["title"],
    )
    pipeline = Pipeline()
    pipeline.add_component("ranker", original)
    expected = pipeline.run({"ranker": {"query": QUERY, "documents": documents()}})["ranker"]
    for twin in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original), copy.copy(original)):
        assert twin.to_dict() == original.to_dict()
        another = Pipeline()
        another.add_component("ranker", twin)
        assert another.run({"ranker": {"query": QUERY, "documents": documents()}})["ranker"] == expected
        assert twin.reranker.engine() is original.reranker.engine()
    copied = copy.deepcopy(original)
    copied.meta_fields_to_embed.append("year")
    assert original.meta_fields_to_embed == ["title"]


# ---------------------------------------------------------------------------------------------------------- ready rerankers


def test_a_ready_reranker_is_used_and_written_as_its_options(tiny_causal_lm: Path) -> None:
    with Reranker(tiny_causal_lm, device="cpu", dtype="float32", max_length=512, token="hf_secret") as core:
        ranker = ZerankRanker(reranker=core, top_k=3)
        assert ids(ranker.run(QUERY, documents())) == [str(index) for index in core.rank(QUERY, TEXTS, top_k=3).indices]
        assert ranker.reranker is core
        ranker.close()
        asyncio.run(ranker.close_async())
        assert core.loaded, "its owner closes it"

        data = ranker.to_dict()
        assert "hf_secret" not in repr(data)
        again = ZerankRanker.from_dict(data)
        assert again.reranker.options == core.options
        assert again.to_dict() == data
        for twin in (again, copy.deepcopy(ranker), pickle.loads(pickle.dumps(ranker))):
            assert twin.reranker is not core
            assert twin.run(QUERY, documents()) == ranker.run(QUERY, documents())
            assert twin.reranker.engine() is core.engine()


def test_a_ready_reranker_comes_alone(core: Reranker) -> None:
    with pytest.raises(ValueError, match="reranker= came together with model_kwargs, batch_size, model, device"):
        ZerankRanker(reranker=core, model="zelo-mini", device="cpu", batch_size=4, model_kwargs={"dtype": "auto"})
    with pytest.raises(TypeError, match=r"reranker is str; expected a zerank_integrations\.Reranker"):
        ZerankRanker(reranker="zelo-mini")


# ----------------------------------------------------------------------------------------------------------------- YAML

# As SentenceTransformersSimilarityRanker writes itself, but for the class and the model.
SWAPPED = """
components:
  ranker:
    type: {type}
    init_parameters:
      model: {model}
      device: {{type: single, device: cpu}}
      token: {{type: env_var, env_vars: [HF_API_TOKEN, HF_TOKEN], strict: false}}
      top_k: 3
      query_prefix: ''
      query_suffix: ''
      document_prefix: ''
      document_suffix: ''
      meta_fields_to_embed: [title]
      embedding_separator: "\\n"
      scale_score: true
      score_threshold: 0.0
      trust_remote_code: false
      model_kwargs: {{torch_dtype: torch.float32}}
      tokenizer_kwargs: {{model_max_length: 512}}
      config_kwargs: null
      backend: torch
      batch_size: 16
connections: []
"""


def test_a_yaml_of_haystacks_ranker_changes_class_and_model_only(tiny_causal_lm: Path, core: Reranker) -> None:
    pipeline = Pipeline.loads(SWAPPED.format(type=PATH, model=tiny_causal_lm))
    answer = pipeline.run({"ranker": {"query": QUERY, "documents": documents()}})["ranker"]
    assert ids(answer) == [str(index) for index in core.rank(QUERY, TEXTS, top_k=3).indices]
    dumped = pipeline.dumps()
    assert Pipeline.loads(dumped).dumps() == dumped
    before, after = (yaml.safe_load(text)["components"]["ranker"] for text in (SWAPPED.format(type=PATH, model="m"), dumped))
    assert after["type"] == before["type"]
    assert set(before["init_parameters"]) <= set(after["init_parameters"])
    assert after["init_parameters"]["device"] == before["init_parameters"]["device"]
    assert after["init_parameters"]["token"] == before["init_parameters"]["token"]


def test_the_modules_path_loads_too_and_is_written_as_the_lasting_one() -> None:
    other = "haystack_integrations.components.rankers.zerank.ranker.ZerankRanker"
    pipeline = Pipeline.loads(SWAPPED.format(type=other, model="zelo-mini"))
    assert yaml.safe_load(pipeline.dumps())["components"]["ranker"]["type"] == PATH


def test_our_own_path_loads_where_haystack_is_told_to_trust_it() -> None:
    assert zerank_integrations.haystack.ZerankRanker is ZerankRanker
    text = SWAPPED.format(type="zerank_integrations.haystack.ZerankRanker", model="zelo-mini")
    with pytest.raises(DeserializationError, match="zerank_integrations"):
        Pipeline.loads(text)
    pipeline = Pipeline.loads(text, allowed_modules=["zerank_integrations.haystack"])
    assert isinstance(pipeline.get_component("ranker"), ZerankRanker)


def test_a_fresh_interpreter_loads_it_with_another_distributions_ranker_beside_it(tmp_path: Path) -> None:
    for folder in ("", "components", "components/rankers"):
        assert not (ROOT / "haystack_integrations" / folder / "__init__.py").exists()
    beside = tmp_path / "haystack_integrations" / "components" / "rankers" / "beside"
    beside.mkdir(parents=True)
    (beside / "__init__.py").write_text("NAME = 'beside'\n")
    (tmp_path / "pipeline.yaml").write_text(SWAPPED.format(type=PATH, model="zelo-mini"))
    script = """
        import os, pathlib, sys
        os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
        from haystack import Pipeline
        sys.path.append(sys.argv[1])
        from haystack_integrations.components.rankers.beside import NAME
        pipeline = Pipeline.loads(pathlib.Path(sys.argv[1], "pipeline.yaml").read_text())
        print(NAME, pipeline.get_component("ranker").model)
    """
    assert run_fresh(script, tmp_path, cwd=ROOT) == "beside zelo-mini\n"


def test_a_wrong_argument_in_a_yaml_says_what_is_wrong() -> None:
    text = SWAPPED.format(type=PATH, model="zelo-mini").replace("backend: torch", "backend: openvino")
    with pytest.raises(DeserializationError, match="backend is 'openvino'; expected \"torch\""):
        Pipeline.loads(text)
    with pytest.raises(PipelineError, match="not imported"):
        Pipeline.loads(text.replace("zerank.ZerankRanker", "zerank.NoSuchRanker"))


# ------------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture
def pipeline(tiny_causal_lm: Path) -> Pipeline:
    """BM25 over the texts, then the ranker, loaded from its own YAML."""
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    made = Pipeline()
    made.add_component("retriever", InMemoryBM25Retriever(store, top_k=5))
    made.add_component("ranker", ZerankRanker(model=tiny_causal_lm, device="cpu", dtype="float32", top_k=4))
    made.connect("retriever.documents", "ranker.documents")
    # The YAML names the store, whose documents live on in this process.
    return Pipeline.loads(made.dumps())


INPUT = {"retriever": {"query": QUERY}, "ranker": {"query": QUERY}}


def test_a_pipeline_ranks_what_bm25_found(pipeline: Pipeline, core: Reranker) -> None:
    both = pipeline.run(INPUT, include_outputs_from={"retriever"})
    found = both["retriever"]["documents"]
    expected = core.rank(QUERY, [document.content for document in found], top_k=4)
    assert ids(both["ranker"]) == [found[index].id for index in expected.indices]
    assert scores(both["ranker"]) == expected.relevances
    fewer = pipeline.run({"retriever": {"query": QUERY}, "ranker": {"query": QUERY, "top_k": 1, "scale_score": False}})
    assert scores(fewer["ranker"]) == [expected[0].logit]


async def test_the_asynchronous_pipeline_answers_alike(pipeline: Pipeline) -> None:
    expected = pipeline.run(INPUT)
    assert pipeline.get_component("ranker").__haystack_supports_async__
    assert await pipeline.run_async(INPUT) == expected
    parts = [part async for part in pipeline.run_async_generator(INPUT, include_outputs_from={"ranker"})]
    assert parts[-1] == expected
    many = await asyncio.gather(*(pipeline.run_async(INPUT) for _ in range(8)))
    assert all(alike(one["ranker"], expected["ranker"]) for one in many)


async def test_a_pipeline_warms_up_and_closes_its_ranker(pipeline: Pipeline) -> None:
    ranker = pipeline.get_component("ranker")
    expected = pipeline.run(INPUT)
    for warm_up in (pipeline.warm_up, pipeline.warm_up_async):
        for close in (pipeline.close, pipeline.close_async):
            await finished(warm_up())
            assert ranker.reranker.loaded
            await finished(close())
            await finished(close())
            assert not ranker.reranker.loaded
            assert await pipeline.run_async(INPUT) == expected
    assert pipeline.run(INPUT) == expected


async def finished(step: Coroutine[Any, Any, None] | None) -> None:
    if step is not None:
        await step


def test_closing_before_use_is_fine() -> None:
    ranker = ZerankRanker(token=Secret.from_env_var("NO_SUCH_VARIABLE"))
    ranker.close()
    asyncio.run(ranker.close_async())


class Counting(Reranker):
    """A Reranker that counts the rankings it is asked for."""

    asked = 0

    def rank(self, *arguments: object, **options: object) -> Ranked:
        self.asked += 1
        return super().rank(*arguments, **options)

    async def arank(self, *arguments: object, **options: object) -> Ranked:
        self.asked += 1
        return await super().arank(*arguments, **options)


async def test_a_loaded_model_is_not_warmed_up_again(tiny_causal_lm: Path) -> None:
    with Counting(tiny_causal_lm, device="cpu") as core:
        ranker = ZerankRanker(reranker=core)
        for _ in range(3):
            ranker.warm_up()
            await ranker.warm_up_async()
        assert core.asked == 1


def test_the_same_component_class_can_be_extended(tiny_causal_lm: Path) -> None:
    @component
    class Titled(ZerankRanker):
        def __init__(self, **options: object) -> None:
            ZerankRanker.__init__(self, **options, meta_fields_to_embed=["title"])

    assert Titled(model=tiny_causal_lm, device="cpu").run(QUERY, documents(), top_k=2)["documents"]


# ------------------------------------------------------------------------------------------------------ sharing and async


def test_equal_options_share_one_model_with_the_core_too(tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default secret resolves where the core leaves the same variable to the Hub's client.
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    options: dict[str, Any] = {"model": tiny_causal_lm, "device": "cpu", "dtype": "float32"}
    first, second, core = ZerankRanker(**options, top_k=1), ZerankRanker(**options, batch_size=2), Reranker(**options)
    engine = first.reranker.engine()
    assert second.reranker.engine() is engine
    assert core.engine() is engine
    decoder = weakref.ref(engine.loaded.decoder)
    del engine
    for one in (first, core):
        one.close()
    gc.collect()
    assert decoder() is not None
    assert len(second.run(QUERY, documents())["documents"]) == len(TEXTS)
    second.close()
    gc.collect()
    assert decoder() is None


async def test_twenty_runs_at_once_neither_hold_the_loop_nor_need_its_executor(ranker: ZerankRanker) -> None:
    many = documents(*(document for _, document in reference.random_pairs(200, seed=5)))
    began = time.perf_counter()
    expected = ranker.run(QUERY, many)
    alone = time.perf_counter() - began
    few = many[:6]
    expected_of_few = ranker.run(QUERY, few)

    gaps: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - before)

    # asyncio's own executor is full: what needs it would wait until the end.
    full, end = ThreadPoolExecutor(1), Event()
    asyncio.get_running_loop().set_default_executor(full)
    full.submit(end.wait, 60)
    ticking = asyncio.create_task(tick())
    try:
        answers = await asyncio.wait_for(
            asyncio.gather(ranker.run_async(QUERY, many), *(ranker.run_async(QUERY, few) for _ in range(19))), 60
        )
    finally:
        end.set()
        ticking.cancel()
    assert alike(answers[0], expected)
    assert all(alike(answer, expected_of_few) for answer in answers[1:])
    assert max(gaps) < alone / 2


async def test_a_cancelled_run_leaves_the_next_one_alone(ranker: ZerankRanker) -> None:
    expected = ranker.run(QUERY, documents())
    runs = [asyncio.create_task(ranker.run_async(QUERY, documents())) for _ in range(6)]
    await asyncio.sleep(0)
    for cancelled in runs[:3]:
        cancelled.cancel()
    answers = await asyncio.gather(*runs, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[:3])
    assert all(alike(answer, expected) for answer in answers[3:])


@pytest.mark.slow
def test_warming_up_leaves_the_event_loop_free_while_all_is_imported(tiny_causal_lm: Path) -> None:
    script = """
        import asyncio, os, sys, time
        os.environ.update(HAYSTACK_TELEMETRY_ENABLED="False", HF_HUB_OFFLINE="1")
        from haystack import Pipeline
        from zerank_integrations.haystack import ZerankRanker

        async def main():
            pipeline = Pipeline()
            pipeline.add_component("ranker", ZerankRanker(model=sys.argv[1], device="cpu"))
            gaps = []

            async def tick():
                while True:
                    before = time.perf_counter()
                    await asyncio.sleep(0.002)
                    gaps.append(time.perf_counter() - before)

            assert "transformers" not in sys.modules
            ticking = asyncio.create_task(tick())
            before = time.perf_counter()
            await pipeline.warm_up_async()
            print(time.perf_counter() - before, max(gaps))
            ticking.cancel()

        asyncio.run(main())
    """
    total, gap = map(float, run_fresh(script, tiny_causal_lm).split())
    # Some of it holds Python's global lock, as linking a shared library does, so not 50 ms.
    assert gap < total / 3, (total, gap)


# --------------------------------------------------------------------------------------------------------------- imports


def test_our_files_import_nothing_heavy_beside_haystack() -> None:
    script = """
        import os, sys
        os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
        import haystack
        before = set(sys.modules)
        from zerank_integrations.haystack import ZerankRanker
        ZerankRanker(model="zelo-mini", device="cpu").to_dict()
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    assert run_fresh(script).split() == ["haystack_integrations", "zerank_integrations"]


@pytest.mark.parametrize("module", ["zerank_integrations.haystack", "haystack_integrations.components.rankers.zerank"])
def test_without_haystack_the_command_is_named(module: str) -> None:
    script = """
        import importlib, sys
        sys.modules["haystack"] = None
        from zerank_integrations import MissingPackage
        try:
            importlib.import_module(sys.argv[1])
        except MissingPackage as error:
            print(error)
    """
    assert 'pip install "zerank-integrations[haystack]"' in run_fresh(script, module)


def test_nothing_is_reported_from_here() -> None:
    assert _telemetry.telemetry is None
