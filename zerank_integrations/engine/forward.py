"""Prompts to logits: right-padded batches of near-equal length, and only the last position of each row.

Under causal attention a token never sees what follows it, so padding on the right needs no mask and changes no score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zerank_integrations.loading import Loaded
    from zerank_integrations.prompt import Prompt


def steps(prompts: Sequence[Prompt], token_budget: int) -> Iterator[list[int]]:
    """Split prompts into steps: lists of indices whose padded batch holds at most `token_budget` tokens.

    Longest first: whatever memory is too small shows at once. A prompt above the budget goes alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    start = 0
    while start < len(order):
        rows = max(1, token_budget // len(prompts[order[start]]))
        yield order[start : start + rows]
        start += rows


class Forward:
    """The forward pass of one loaded checkpoint.

    Calling it with prompts returns their logits, in order, as Python floats.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._decoder = loaded.decoder
        self._yes = loaded.yes

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[float]:
        """Logits of the prompts, one padded batch."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt.ids)
        device = self._yes.device
        hidden = self._decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(prompts), device=device), (lengths - 1).to(device)]
        # In float32: a bfloat16 product rounds so hard that some documents tie.
        return (last.float() @ self._yes).tolist()
