"""A packed row on a GPU in half precision: one variable-length flash attention a layer. Not measured yet.

Each document is a sequence whose queries are its own tokens and whose keys are its prefix's and its own. That needs the causal
mask aligned at the last query and the last key, which `works` finds out; where it is otherwise, `attention.Grouped` is used.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from zerank_integrations.engine.packing import Pack, Range

CAUSAL = (-1, 0)


class Varlen:
    """The attention of a whole row; prefixes are sequences of their own."""

    window = CAUSAL

    def __init__(self, pack: Pack) -> None:
        sequences: list[tuple[Sequence[Range], Range]] = []
        for group in pack.groups:
            sequences.append(([group.prefix], group.prefix))
            sequences += [([group.prefix, own], own) for own in group.documents]
        self._lay_out(sequences, pack.ids.device)

    def _lay_out(self, sequences: Sequence[tuple[Sequence[Range], Range]], device: torch.device) -> None:
        """For each sequence the ranges of its keys, and the range of its queries."""
        keys = [sum(end - start for start, end in ranges) for ranges, _ in sequences]
        queries = [end - start for _, (start, end) in sequences]
        self._max_queries, self._max_keys = max(queries), max(keys)
        self._until_query, self._until_key = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device) for lengths in (queries, keys)
        )
        places = [torch.arange(*span) for ranges, _ in sequences for span in ranges]
        self._places = torch.cat(places).to(device)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attend: (1, heads, tokens, head size) to (1, tokens, heads, head size)."""
        from torch.nn.attention import varlen

        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        out: torch.Tensor = varlen.varlen_attn(  # type: ignore[assignment]
            q,
            k[self._places],
            v[self._places],
            self._until_query,
            self._until_key,
            self._max_queries,
            self._max_keys,
            scale=scale,
            window_size=self.window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[None]


class VarlenLast(Varlen):
    """The attention of one query a document, its last token, which sees all of its prefix and of itself."""

    window = (-1, -1)

    def __init__(self, pack: Pack) -> None:
        documents = pack.documents
        sequences = [([before, own], (index, index + 1)) for index, (before, own) in enumerate(documents)]
        self._lay_out(sequences, pack.ids.device)


def works(device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> bool:
    """Whether the kernel is there for this device and head, takes grouped heads, and aligns its mask at the end."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return aligned_at_the_end(device, dtype, config)


def aligned_at_the_end(device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> bool:
    """Compare two sequences, of 3 queries and 8 keys and of 2 and 2, with SDPA under an explicit mask."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, 10, size, generator=generator).to(device, dtype) for count in (heads, shared, shared)
    )
    probe = Varlen.__new__(Varlen)
    probe._lay_out([([(0, 8)], (5, 8)), ([(8, 10)], (8, 10))], device)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, 5:],
        key,
        value,
        attn_mask=_probe_mask(device),
        enable_gqa=heads != shared,
    ).transpose(1, 2)
    try:
        found = probe(query[:, :, 5:], key, value, None)
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError):
        return False
    return torch.allclose(found.float(), expected.float(), atol=0.03)


def _probe_mask(device: torch.device) -> torch.Tensor:
    query, key = torch.arange(5, 10, device=device)[:, None], torch.arange(10, device=device)[None]
    return (key <= query) & ((query < 8) == (key < 8))
