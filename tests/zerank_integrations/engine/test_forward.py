"""Packed scores equal those of one prompt at a time, for any packing, order and companions, in every family."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import reference, tiny
from zerank_integrations import Reranker, ZerankWarning
from zerank_integrations.checkpoints import Source
from zerank_integrations.engine.forward import Forward
from zerank_integrations.engine.worker import Request, Worker
from zerank_integrations.loading import Loaded, load
from zerank_integrations.prompt import Prompt

Folder = Callable[[str], Path]
SUFFIX = array("i", [5, 6, 7, 8])
LENGTHS = (1, 2, 3, 4, 7, 13, 14, 15, 30, 31, 60, 100, 180, 400, 511, 512, 513, 600, 1_000, 4_000)
PREFIXES = tuple(array("i", random.Random(size).choices(range(1_500), k=size)) for size in (1, 20, 70))
DOCUMENTS = tuple(array("i", random.Random(-size).choices(range(1_500), k=size)) for size in LENGTHS)


def loaded_from(folder: Path, dtype: str = "float32") -> Loaded:
    return load(Source(model=str(folder), device="cpu", dtype=dtype), folder)


def made(prefix: int, document: int) -> Prompt:
    return Prompt(PREFIXES[prefix], DOCUMENTS[document], SUFFIX, truncated=False)


def one_at_a_time(folder: Path) -> Callable[[Prompt], float]:
    """A plain transformers model that reads one prompt, with its own head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logit(ids: tuple[int, ...]) -> float:
        return model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1, tiny.yes_id()].item()

    remembered = cache(logit)
    return lambda prompt: remembered(tuple(prompt.ids))


@pytest.fixture(scope="module")
def forward(tiny_causal_lm: Path) -> Forward:
    return Forward(loaded_from(tiny_causal_lm))


@pytest.fixture(scope="module")
def expected(tiny_causal_lm: Path) -> Callable[[Prompt], float]:
    return one_at_a_time(tiny_causal_lm)


@pytest.fixture(scope="module")
def spread(expected: Callable[[Prompt], float]) -> float:
    """The logits' standard deviation."""
    return statistics.pstdev(expected(made(p, d)) for p in range(3) for d in range(len(DOCUMENTS)))


def difference(found: Sequence[float], prompts: Sequence[Prompt], expected: Callable[[Prompt], float]) -> float:
    return max(abs(logit - expected(prompt)) for logit, prompt in zip(found, prompts, strict=True))


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, len(DOCUMENTS) - 1)), min_size=1, max_size=40),
    budget=st.sampled_from((1, 100, 1_000, 8_192)),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_packing_equals_one_at_a_time(
    forward: Forward, expected: Callable, spread: float, pairs: list[tuple[int, int]], budget: int
) -> None:
    """Lengths of 1 to 4,000, duplicates, three queries in any order."""
    assert forward.reason is None
    prompts = [made(*pair) for pair in pairs]
    request = Request(prompts, token_budget=budget)
    worker = Worker(forward)
    worker.submit(request)
    assert difference(request.future.result(), prompts, expected) < 1e-5 * spread
    worker.close()


def test_300_documents_of_three_queries_in_one_row(forward: Forward, expected: Callable, spread: float) -> None:
    draw = random.Random(1)
    prompts = [made(draw.randrange(3), draw.randrange(11)) for _ in range(300)]
    assert difference(forward(prompts), prompts, expected) < 1e-5 * spread


def test_a_prefix_longer_than_its_documents(forward: Forward, expected: Callable, spread: float) -> None:
    prefix = array("i", random.Random(5).choices(range(1_500), k=900))
    prompts = [Prompt(prefix, document, SUFFIX, truncated=False) for document in DOCUMENTS[:-1]]
    assert difference(forward(prompts), prompts, expected) < 1e-5 * spread


@pytest.mark.parametrize("builder", [*tiny.OTHER_FAMILIES, tiny.lora], ids=lambda builder: builder.__name__)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_other_families_and_adapters(tiny_folder: Folder, builder: Callable[[Path], Path]) -> None:
    folder = tiny_folder(builder.__name__)
    forward = Forward(loaded_from(folder))
    expected = one_at_a_time(folder.parent / "merged" if builder is tiny.lora else folder)
    prompts = [made(p, d) for p in range(3) for d in range(16)]
    values = [expected(prompt) for prompt in prompts]
    assert difference(forward(prompts), prompts, expected) < 1e-5 * statistics.pstdev(values)
    assert forward.reason is None
    # Within a window of 32 tokens nothing is hidden; beyond it a pack would show a document what it must not see.
    assert forward.packs(made(0, 0))
    assert forward.packs(made(2, 10)) == ("sliding" not in builder.__name__)


def test_without_a_pack_the_decoder_is_as_it_was(tiny_causal_lm: Path) -> None:
    """Its config, which others may share, now names our attention; what they get is SDPA's."""
    loaded = loaded_from(tiny_causal_lm)
    ids = torch.tensor([made(1, 12).ids, made(2, 12).ids[:-50]])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    before = loaded.decoder(input_ids=ids, attention_mask=mask).last_hidden_state
    forward = Forward(loaded)
    assert forward.reason is None
    assert torch.equal(loaded.decoder(input_ids=ids, attention_mask=mask).last_hidden_state, before)


def rank_correlation(found: Sequence[float], exact: Sequence[float]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().tolist() for values in (found, exact)]
    return statistics.correlation(*ranks)


# What is not packed


def scaled(folder: Path, to: Path, rope: dict[str, object]) -> Path:
    """A copy of a checkpoint with another rotary scaling beyond 64 tokens."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["rope_parameters"] |= rope
    (to / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return to


@pytest.mark.parametrize(
    ("rope", "packed"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, False),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0] * 8,
                "long_factor": [3.0] * 8,
                "original_max_position_embeddings": 64,
            },
            False,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, True),
        ({"rope_type": "linear", "factor": 4.0}, True),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_only_a_fixed_rotary_scaling_is_packed(tiny_causal_lm: Path, tmp_path: Path, rope: dict, packed: bool) -> None:
    folder = scaled(tiny_causal_lm, tmp_path / "scaled", rope)
    forward = Forward(loaded_from(folder))
    assert (forward.reason is None) == packed
    prompts = [made(p, d) for p in range(3) for d in (1, 5, 12, 12, 13)]
    found = forward(prompts)
    for prompt, logit in zip(prompts, found, strict=True):
        # A fresh model each: dynamic scaling remembers the longest text it has seen.
        assert logit == pytest.approx(one_at_a_time(folder)(prompt), abs=2e-5)


def test_the_padded_pass_is_said_once_and_scores_alike(tiny_causal_lm: Path) -> None:
    documents = [document for _, document in reference.random_pairs(30, seed=3)]
    packed = Reranker(tiny_causal_lm, dtype="float32", device="cpu").score("q", documents)
    padding = Reranker(tiny_causal_lm, dtype="float32", device="cpu", attn_implementation="eager")
    with pytest.warns(ZerankWarning, match=r"attn_implementation='eager' was asked for.*several times as long") as caught:
        padded = padding.score("q", documents)
    assert len(caught) == 1
    assert padded == pytest.approx(packed, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padding.score("q", documents)


class Blurring(nn.Module):
    """Lets a token see the mean of all before it: harmless in a row of its own, wrong in a shared one."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        return hidden.cumsum(1) / count


def test_the_probe_finds_a_decoder_that_mixes_the_tokens_of_a_row(tiny_causal_lm: Path) -> None:
    loaded = loaded_from(tiny_causal_lm)
    loaded.decoder.layers[0].mlp = Blurring()
    forward = Forward(loaded)
    assert "standard deviations" in forward.reason
    assert not forward.packs(made(0, 0))
    prompts = [made(1, 3), made(1, 5), made(2, 3)]
    alone = [forward([prompt])[0] for prompt in prompts]
    assert forward(prompts) == pytest.approx(alone, abs=1e-5)


def test_the_probe_finds_a_decoder_without_the_parts_it_needs(tiny_causal_lm: Path) -> None:
    class Stubborn(nn.Module):
        """A decoder that takes no argument it does not know."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config, self.layers = inner, inner.config, inner.layers

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    loaded = loaded_from(tiny_causal_lm)
    forward = Forward(replace(loaded, decoder=Stubborn(loaded.decoder)))
    assert "TypeError" in forward.reason
    assert loaded.decoder.config._attn_implementation == "sdpa"
    assert len(forward([made(0, 3), made(1, 4)])) == 2


# bfloat16


def test_bfloat16_ranks_alike_packed_and_padded(tiny_causal_lm: Path, expected: Callable, spread: float) -> None:
    """Against float32: rms at most .02 of the logits' spread (measured .0099; padded .0098), rank correlation .999."""
    forward = Forward(loaded_from(tiny_causal_lm, "bfloat16"))
    assert forward.reason is None
    prompts = [made(p, d) for p in range(3) for d in range(len(DOCUMENTS) - 1)]
    exact = [expected(prompt) for prompt in prompts]
    packed, padded = forward(prompts), [forward([prompt], packed=False)[0] for prompt in prompts]

    def rms(found: Sequence[float]) -> float:
        return statistics.fmean((a - b) ** 2 for a, b in zip(found, exact, strict=True)) ** 0.5 / spread

    assert rms(packed) < 0.02
    assert rms(packed) < 1.25 * rms(padded)
    assert rank_correlation(packed, exact) > 0.999


# Deterministic


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_scores_are_equal_to_the_last_bit_in_any_company(tiny_causal_lm: Path, dtype: str) -> None:
    documents = [document for _, document in reference.random_pairs(60, seed=4)]
    options = {"dtype": dtype, "device": "cpu", "deterministic": True}
    alone = [Reranker(tiny_causal_lm, **options).rank("q", [document])[0].logit for document in documents]
    together = Reranker(tiny_causal_lm, **options, token_budget=300).rank("q", documents)
    assert [d.logit for d in sorted(together, key=lambda d: d.index)] == alone
    mixed = Reranker(tiny_causal_lm, **options).rank_many([("other", documents[:9]), ("q", documents[::-1])])[1]
    assert [d.logit for d in sorted(mixed, key=lambda d: -d.index)] == alone
    if dtype == "float32":
        tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
        pairs = [("q", document) for document in documents]
        assert alone == pytest.approx(reference.reference_logits(tiny_causal_lm, tokenizer, pairs), abs=1e-5)
