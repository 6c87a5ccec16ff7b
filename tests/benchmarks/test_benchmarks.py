"""The benchmarks run, and their parts measure what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks import concurrency, cpu, full_shape, gpu, memory, payload
from benchmarks.contenders import CONTENDERS, OneAtATime, counting
from benchmarks.lane import Remote
from benchmarks.measure import agreement, peak, percentile, resident, timed
from benchmarks.standin import SHAPES, STAND_IN, TINY, ZERANK_1_SMALL, ZERANK_2, Shape, causal_lm, checkpoint

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stand-in, in a cache of this run's own, where the benchmarks' processes find it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return checkpoint(TINY)


@pytest.fixture
def commands(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for its process is taken back after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(stand_in.parents[2]))
    for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("TRANSFORMERS_VERBOSITY", "error")):
        monkeypatch.setenv(name, value)


# The stand-in


def test_parameters_are_the_published_ones() -> None:
    # Beside the matrices there are only norms: two of the width and two of a head's per layer, and the last one.
    for shape, published in ((ZERANK_1_SMALL, 1_720_577_024 - 2), (ZERANK_2, 4_022_468_096)):
        norms = shape.layers * 2 * (shape.hidden + shape.head_dim) + shape.hidden
        assert shape.body + shape.head + norms == pytest.approx(published, rel=1e-5)


@pytest.mark.parametrize("shape", [STAND_IN, TINY])
def test_the_proportions_are_kept(shape: Shape) -> None:
    assert shape.head / shape.body == pytest.approx(ZERANK_1_SMALL.head / ZERANK_1_SMALL.body, rel=0.01)
    assert shape.head / shape.body == pytest.approx(0.22, abs=0.003)
    assert shape.intermediate == 3 * shape.hidden == 3 * shape.heads * shape.head_dim
    assert shape.heads == 2 * shape.kv_heads


def test_the_model_has_the_shape() -> None:
    model = causal_lm(TINY)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert matrices == TINY.body + TINY.head
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_all_contenders_answer_alike(stand_in: Path) -> None:
    """In float32 the rivals, ours among them, agree with one prompt at a time, and see differences between documents."""
    documents = payload.documents(1_500, 3, 10)
    reference = OneAtATime(stand_in, "float32")("read a csv file", documents)
    assert max(reference) - min(reference) > 0.5
    for name, contender in CONTENDERS.items():
        found = agreement(contender(stand_in, "float32")("read a csv file", documents), reference)
        assert found["max_difference_std"] < 1e-4, name
        assert found["rank_correlation"] > 0.99999, name


def test_tokens_are_counted_with_their_padding(stand_in: Path) -> None:
    documents = ["words", "many more words than in the other document"]
    lengths = [len(ids) for ids in OneAtATime(stand_in, "float32").encode("a query", documents)]
    for name, expected in (("padded", 2 * max(lengths)), ("ST batch 32", 2 * max(lengths))):
        contender = CONTENDERS[name](stand_in, "float32")
        count = counting(contender.decoder)
        contender("a query", documents)
        assert count() == expected
        assert count() == 0


def test_the_published_way_clips_characters(stand_in: Path) -> None:
    published = CONTENDERS["published"](stand_in, "float32")
    text = "word " * 2_000
    whole, longer = published("q", [text, text + "and something else"])
    assert whole == longer
    assert published("q" * 2_000, ["x"]) == published("q" * 2_500, ["x"])


# What is scored


def test_payloads_have_their_size(stand_in: Path) -> None:
    documents = payload.documents(75_000, 1)
    assert (len(documents), sum(map(len, documents))) == (100, 75_000)
    assert [document.strip() for document in documents] == documents
    ordered = sorted(map(len, documents))
    assert ordered == sorted(map(len, payload.documents(75_000, 2)))
    assert documents != payload.documents(75_000, 2)
    assert documents == payload.documents(75_000, 1)
    assert 4 < ordered[-1] / ordered[50] < 5.5


@pytest.mark.parametrize("tokens", [10, 50, 300])
def test_queries_have_their_tokens(stand_in: Path, tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stand_in)
    for seed in range(3):
        query = payload.query(tokens, seed, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        assert len(tokenizer.encode(query, add_special_tokens=False)) == tokens
        assert query == query.strip()


# How it is measured


def test_time_counts_work_not_sleep() -> None:
    import time

    _, cpu, wall = timed(lambda: time.sleep(0.2))
    assert wall >= 0.2
    assert cpu < 0.1


@linux
def test_the_peak_is_seen_and_forgotten() -> None:
    def use() -> int:
        block = bytearray(64 * 2**20)
        return len(block)

    before = resident()
    _, most = peak(use)
    assert most - before > 60 * 2**20
    _, less = peak(lambda: None)
    assert less - before < 30 * 2**20


def test_agreement_of_scores() -> None:
    reference = [0.0, 1.0, 2.0, 3.0]
    assert agreement(reference, reference) == {
        "max_difference_std": 0, "rms_difference_std": 0, "rank_correlation": pytest.approx(1)
    }  # fmt: skip
    found = agreement([0.0, 2.0, 1.0, 3.0], reference)
    assert found["max_difference_std"] == pytest.approx(1 / 1.25**0.5)
    assert found["rank_correlation"] == pytest.approx(0.8)


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 75, 100)] == [1, 2, 2.5, 3]


# The commands


@linux
@pytest.mark.usefixtures("commands")
def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "cpu.json"
    names = ["ours"]
    # Whoever takes any time at all counts as slow, and runs once of the two times.
    monkeypatch.setattr(cpu, "PATIENCE", 0)
    monkeypatch.setattr(cpu, "ENOUGH", 1)
    cpu.main(runs=2, quick=True, contenders=names, output=output)
    found = json.loads(output.read_text())
    (cell,) = found["cells"]
    assert list(cell["contenders"]) == names
    for one in cell["contenders"].values():
        assert [len(one[figure]) for figure in ("cpu_s", "wall_s", "tokens")] == [1, 1, 1]
        assert one["cpu_s"][0] > 0
        assert one["agreement"]["rank_correlation"] > 0.9
    assert found["versions"]["torch"]
    assert found["machine"]["cores"]
    assert found["quick"]


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("commands")
def test_the_memory(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    memory.main(quick=True, contenders=["ours"], output=output)
    (cell,) = json.loads(output.read_text())["cells"]
    assert list(cell["peak_bytes"]) == ["ours"]
    assert cell["peak_bytes"]["ours"] > 0


@linux
@pytest.mark.usefixtures("commands")
def test_the_true_shape_in_small(tmp_path: Path) -> None:
    output = tmp_path / "full.json"
    full_shape.main(quick=True, threads=1, output=output)
    one = json.loads(output.read_text())["contenders"]["ours"]
    assert one["load_s"] > 0
    assert one["loaded_bytes"] > 2 * (TINY.body + TINY.head)


@pytest.mark.usefixtures("commands")
def test_many_clients(tmp_path: Path) -> None:
    output = tmp_path / "many.json"
    concurrency.main(quick=True, seconds=0.3, output=output)
    found = json.loads(output.read_text())
    assert list(found["loads"]) == [
        "1 client, 1 document each", "8 clients, 1 document each", "2 clients, 1 document each, beside one with 20"
    ]  # fmt: skip
    for contenders in found["loads"].values():
        assert list(contenders) == ["worker", "lock", "ST + lock"]
        for one in contenders.values():
            assert one["requests"] > 0
            assert one["p50_s"] <= one["p95_s"] <= one["p99_s"]
    assert [check["most"] for check in found["checks"]] == [1.3, 1.2]


def test_a_failing_contender_is_told(stand_in: Path) -> None:
    remote = Remote("ours", stand_in / "nowhere", "float32", None)
    with pytest.raises(RuntimeError, match=r"ours failed:[\s\S]*there is no folder"):
        remote.run("q", ["d"])


@pytest.mark.usefixtures("commands")
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    gpu.main(shape="tiny", device="cpu", runs=2, output=output)
    found: dict[str, Any] = json.loads(output.read_text())
    assert found["ceilings"]["copy"]["value"] > 0
    assert "no kernel for the CPU" in found["varlen"]["skipped"]
    (contenders,) = found["end_to_end"].values()
    measured = {name for name, one in contenders.items() if len(one.get("seconds", [])) == 2}
    assert {"ours", "ST batch 32", "ST batch 64", "ST batch 128"} <= measured
    assert all("skipped" in one for name, one in contenders.items() if name not in measured)
    assert found["stages"]["decoder_s"] > 0
    assert "Traceback" not in capsys.readouterr().err


def test_in_memory_weights_are_what_is_scored(stand_in: Path) -> None:
    """The reranker of the GPU script computes with the model it was given, not with the folder's."""
    model = causal_lm(TINY)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.5)
    with gpu.loaded_from(model, stand_in):
        reranker = gpu.ours(stand_in, "cpu", (), needs_option=False)
        with reranker:
            (found,) = reranker.rank("a query", ["a document"])
    ids = OneAtATime(stand_in, "bfloat16").encode("a query", ["a document"])
    (yes,) = AutoTokenizer.from_pretrained(stand_in).encode("Yes", add_special_tokens=False)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ids)).logits[0, -1, yes].item()
    assert found.logit == pytest.approx(expected, abs=0.05 * max(1, abs(expected)))


def test_the_dense_reference_is_aligned_at_the_end() -> None:
    query, key, value = (torch.randn(tokens, 2, 8) for tokens in (3, 7, 7))
    found = gpu.dense_attention(query, key, value)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
    ordered = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*ordered, attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(found, expected)


def test_a_floor_counts_each_token_once() -> None:
    load = gpu.Payload(1, 2, 10)
    rate = 1e-6
    found = gpu.floor_seconds(TINY, load, len, rate)
    query, documents = load.texts(0, len)
    tokens = len(query) + 8 + sum(len(document) + 5 for document in documents)
    assert found > 2 * TINY.body * tokens / (rate * 1e12)
    assert set(SHAPES) == {"zerank-1-small", "zerank-2", "stand-in", "tiny"}
