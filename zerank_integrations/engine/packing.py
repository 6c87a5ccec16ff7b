"""One row for many prompts: each query's prefix once, followed by its documents.

    [prefix A | document | document | … | prefix B | document | …]

The positions of a document start where its prefix ends, so each document reads as if it alone followed its prefix. What may see
what is the attention's part (`engine.attention`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zerank_integrations.prompt import Prompt

# Half-open ranges of places in a row.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Group:
    """One query's part of a row: its prefix and the documents (with suffix) that follow it."""

    prefix: Range
    documents: list[Range]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A row and where everything in it lies.

    Attributes:
        groups: one per query, in row order.
        order: for each document in row order, the index of its prompt.
        ids: token ids, shape (1, tokens), int32.
        positions: of the tokens, same shape, int64.
        last: the place of each prompt's last token, in the order of the prompts.
    """

    groups: list[Group]
    order: list[int]
    ids: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Pack:
        """Lay prompts out in one row. Those that share a prefix object share its tokens."""
        members: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            members.setdefault(id(prompt.prefix), []).append(index)
        row, groups, order, last = array("i"), [], [], [0] * len(prompts)
        # For each segment of the row: the position of its first token, and its length.
        firsts, lengths = [], []
        for indices in members.values():
            before = len(prompts[indices[0]].prefix)
            prefix = (len(row), len(row) + before)
            row.extend(prompts[indices[0]].prefix)
            firsts.append(0)
            lengths.append(before)
            documents = []
            for index in indices:
                start = len(row)
                row.extend(prompts[index].document)
                row.extend(prompts[index].suffix)
                documents.append((start, len(row)))
                firsts.append(before)
                lengths.append(len(row) - start)
                last[index] = len(row) - 1
            groups.append(Group(prefix, documents))
            order += indices
        size = torch.tensor(lengths)
        starts = size.cumsum(0) - size
        positions = torch.arange(len(row)) - torch.repeat_interleave(starts - torch.tensor(firsts), size)
        return cls(groups, order, torch.frombuffer(row, dtype=torch.int32)[None], positions[None], torch.tensor(last))

    def on(self, device: torch.device) -> Pack:
        """The same row on a device."""
        ids, positions, last = (_moved(tensor, device) for tensor in (self.ids, self.positions, self.last))
        return Pack(self.groups, self.order, ids, positions, last)

    @property
    def documents(self) -> list[tuple[Range, Range]]:
        """Each document with its prefix, in the order of the prompts."""
        placed = [(group.prefix, document) for group in self.groups for document in group.documents]
        return [pair for _, pair in sorted(zip(self.order, placed, strict=True))]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Prompts padded on the right, one a row. Under causal attention no token sees the padding behind it: no mask is needed.

    Attributes:
        ids: token ids, shape (prompts, longest), int32.
        last: the place of each prompt's last token in its row.
    """

    ids: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Rows:
        """One row a prompt, in their order."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt.ids, dtype=torch.int32)
        return cls(ids, torch.tensor(lengths) - 1)

    def on(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        return Rows(_moved(self.ids, device), _moved(self.last, device))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; towards a GPU through pinned memory, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def near_equal(lengths: Sequence[int], ratio: float) -> list[list[int]]:
    """Split indices by length, longest first, so that none in a group is shorter than `ratio` times its longest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[index] >= ratio * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
