"""Where everything lies in a packed row, and what a GPU's attention is told about it."""

from __future__ import annotations

import random
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen as torch_varlen
from torch.nn.functional import scaled_dot_product_attention

from zerank_integrations.engine import varlen
from zerank_integrations.engine.attention import Grouped, GroupedLast
from zerank_integrations.engine.budget import LEAST, MOST, fitting
from zerank_integrations.engine.packing import Pack, Rows, near_equal
from zerank_integrations.prompt import Prompt
from zerank_integrations.recent import Recent

PREFIXES = [array("i", range(100, 100 + size)) for size in (1, 4, 9)]
SUFFIX = array("i", [1, 2])
some_prompts = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=12).map(
    lambda pairs: [Prompt(PREFIXES[p], array("i", range(n)), SUFFIX, truncated=False) for p, n in pairs]
)


@given(some_prompts)
def test_a_row_holds_every_prompt_and_each_prefix_once(prompts: list[Prompt]) -> None:
    pack = Pack.of(prompts)
    ids, positions = pack.ids[0].tolist(), pack.positions[0].tolist()
    used = {id(prompt.prefix): len(prompt.prefix) for prompt in prompts}
    assert len(ids) == sum(used.values()) + sum(len(prompt.document) + 2 for prompt in prompts)
    for prompt, (before, own), last in zip(prompts, pack.documents, pack.last.tolist(), strict=True):
        places = [*range(*before), *range(*own)]
        assert [ids[place] for place in places] == prompt.ids
        assert [positions[place] for place in places] == list(range(len(prompt)))
        assert last == places[-1]


def test_rows_are_padded_behind() -> None:
    prompts = [Prompt([1], [2] * n, [3], truncated=False) for n in (0, 2)]
    rows = Rows.of(prompts)
    assert rows.ids.tolist() == [[1, 3, 0, 0], [1, 2, 2, 3]]
    assert rows.last.tolist() == [1, 3]


@given(st.lists(st.integers(1, 100)), st.sampled_from((0.5, 0.8, 1.0)))
def test_near_equal_groups(lengths: list[int], ratio: float) -> None:
    groups = near_equal(lengths, ratio)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert min(lengths[i] for i in group) >= ratio * max(lengths[i] for i in group)


def dense(pack: Pack, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The row's attention under one explicit mask, quadratic in the row."""
    tokens = pack.ids.shape[1]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for before, own in pack.documents:
        seen[slice(*own), slice(*before)] = True
        seen[slice(*own), slice(*own)] = True
        seen[slice(*before), slice(*before)] = True
    seen &= torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def tensors(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = pack.ids.shape[1]
    return tuple(torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    bottom_right: bool = True,
) -> torch.Tensor:
    """What torch's documentation says of `varlen_attn`, which has no kernel for a CPU."""
    out = torch.empty_like(query)
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        if window_size == (-1, 0):
            mask = mask.tril(int((d - c) - (b - a)) if bottom_right else 0)
        q, k, v = (part.transpose(0, 1)[None] for part in (query[a:b], key[c:d], value[c:d]))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        out[a:b] = attended[0].transpose(0, 1)
    return out


@settings(deadline=None, max_examples=30)
@given(some_prompts)
def test_attention_equals_one_dense_mask(prompts: list[Prompt]) -> None:
    pack = Pack.of(prompts)
    query, key, value = tensors(pack)
    expected = dense(pack, query, key, value)
    last = query[:, :, pack.last]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_varlen, "varlen_attn", kernel)
        for whole, only in ((Grouped, GroupedLast), (varlen.Varlen, varlen.VarlenLast)):
            torch.testing.assert_close(whole(pack)(query, key, value, None), expected)
            torch.testing.assert_close(only(pack)(last, key, value, None), expected[:, pack.last])


def test_long_documents_need_no_mask_and_short_ones_a_small_one() -> None:
    """20,000 tokens: their whole mask would hold 400 million numbers."""
    draw = random.Random(0)
    prefix = array("i", range(30))
    sizes = [draw.randrange(1, 400) for _ in range(60)] + [700, 1_500, 4_000]
    pack = Pack.of([Prompt(prefix, array("i", range(size)), SUFFIX, truncated=False) for size in sizes])
    attention = Grouped(pack)
    query, key, value = tensors(pack)
    found = attention(query, key, value, None)
    assert attention._mask.numel() <= 402 * 432
    for size, (before, own) in list(zip(sizes, pack.documents, strict=True))[-4:]:
        places = [*range(*before), *range(*own)]
        q, k, v = (part[:, :, places] for part in (query, key, value))
        alone = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(found[:, slice(*own)], alone[:, -(size + 2) :])


class Config:
    num_attention_heads, num_key_value_heads, hidden_size = 4, 2, 32


@pytest.mark.parametrize("bottom_right", [True, False])
def test_the_kernels_alignment_is_found_out(monkeypatch: pytest.MonkeyPatch, bottom_right: bool) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *args, **how: kernel(*args, **how, bottom_right=bottom_right))
    assert varlen.aligned_at_the_end(torch.device("cpu"), torch.bfloat16, Config) == bottom_right


def test_without_the_kernel_it_is_not_used() -> None:
    assert not varlen.aligned_at_the_end(torch.device("cpu"), torch.bfloat16, Config)
    assert not varlen.works(torch.device("cpu"), torch.bfloat16, Config)


def test_the_budget_follows_the_free_memory() -> None:
    """A step of n tokens takes 1 MB and 100 kB a token."""
    peaks = [1_000_000 + 100_000 * tokens for tokens in (512, 4_096)]
    assert fitting(2_000_000_000, (512, 4_096), peaks) == int((0.7 * 2e9 - 1e6) / 1e5)
    assert fitting(0, (512, 4_096), peaks) == LEAST
    assert fitting(10**12, (512, 4_096), peaks) == MOST
    assert fitting(10**9, (512, 4_096), [0, 0]) == MOST


@given(st.lists(st.integers(0, 30), max_size=300))
def test_recent_is_bounded_and_never_wrong(asked: list[int]) -> None:
    recent: Recent[str] = Recent(20)
    for length in asked:
        text = "x" * length
        found = recent.get(text)
        assert found is None or found is text or found == text
        if found is None:
            assert recent.put(text, text) is text
        assert sum(map(len, {**recent._old, **recent._young})) <= 40
    recent.forget()
    assert recent.get("x") is None


def test_recent_keeps_what_is_asked_for() -> None:
    recent: Recent[list[int]] = Recent(10)
    recent.put("kept", [1, 2])
    for i in range(100):
        recent.put(f"once {i}", [1, 2, 3])
        assert recent.get("kept") == [1, 2]
    assert recent.get("once 0") is None
