"""Prompts to logits: one packed row a step where the decoder allows it, else right-padded rows of near-equal length."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from zerank_integrations.engine import attention, packable, varlen
from zerank_integrations.engine.packing import Pack, Rows, near_equal
from zerank_integrations.prompt import Prompt

if TYPE_CHECKING:
    from zerank_integrations.loading import Loaded

# Padded rows may differ by a quarter in length.
NEAR = 0.8

# The largest difference of the probe's hidden states, packed against padded, in standard deviations of them. Decoders of random
# weights differ by 1e-6 in float32 and 0.02 in bfloat16; one token that sees what it must not makes 0.3 and more.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_HALF = 0.15


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts made ready for the device: parts of a step, each with the indices of its prompts."""

    size: int
    parts: list[tuple[list[int], Pack | Rows]]


class Forward:
    """The forward pass of one loaded checkpoint. Made on load: the decoder is probed once.

    Attributes:
        reason: why this decoder's prompts are padded rather than packed, as a clause; None if they are packed.
        asynchronous: whether the device works on while the next step is made ready.
    """

    def __init__(self, loaded: Loaded, attn_implementation: str | None = None) -> None:
        self._decoder = cast("Any", loaded.decoder)
        self._yes = loaded.yes
        self._device = loaded.device
        config = self._decoder.config
        self.asynchronous = self._device.type == "cuda"
        self.reason = packable.why_not(config, attn_implementation)
        self._window = packable.window(config)
        self._growing = packable.depends_on_companions(config)
        self._varlen = False
        if self.reason is None:
            attention.register()
            usual = config._attn_implementation
            config._attn_implementation = attention.NAME
            hook = attention.shorten_last_layer(self._decoder.layers[-1])
            self._varlen = varlen.works(self._device, loaded.dtype, config)
            self.reason = self._probe()
            if self.reason is not None:
                config._attn_implementation = usual
                hook.remove()

    def packs(self, prompt: Prompt) -> bool:
        """Whether a prompt goes into the shared row: then its prefix costs its tokens once a step."""
        return self.reason is None and (self._window is None or len(prompt) <= self._window)

    def __call__(self, prompts: Sequence[Prompt], *, packed: bool = True) -> list[float]:
        """Logits of the prompts in one step. With `packed=False` each is computed as it would be alone on a plain decoder."""
        logits: list[float] = self.launch(self.prepare(prompts, packed=packed)).tolist()
        return logits

    def prepare(self, prompts: Sequence[Prompt], *, packed: bool = True) -> Batch:
        """Make a step ready: its ids and positions, on their way to the device."""
        together = [i for i, prompt in enumerate(prompts) if packed and self.packs(prompt)]
        apart = [i for i, prompt in enumerate(prompts) if not (packed and self.packs(prompt))]
        parts: list[tuple[list[int], Pack | Rows]] = []
        if together:
            parts.append((together, Pack.of([prompts[i] for i in together]).on(self._device)))
        lengths = [len(prompts[i]) for i in apart]
        for group in near_equal(lengths, 1.0 if self._growing else NEAR) if packed else [[i] for i in range(len(apart))]:
            indices = [apart[i] for i in group]
            parts.append((indices, Rows.of([prompts[i] for i in indices]).on(self._device)))
        return Batch(len(prompts), parts)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> torch.Tensor:
        """Logits on the device, float32, in the order of the prompts; on a GPU they may still be under way."""
        # The type is said, since a load in another thread may have changed the process's default for a moment.
        logits = torch.empty(batch.size, device=self._device, dtype=torch.float32)
        for indices, part in batch.parts:
            # In float32: a bfloat16 product rounds so hard that some documents tie.
            logits[indices] = self._hidden(part).float() @ self._yes
        return logits

    def _hidden(self, part: Pack | Rows) -> torch.Tensor:
        """The hidden state of each prompt's last token."""
        if isinstance(part, Rows):
            if self._growing:
                # Dynamic scaling remembers the longest text it has seen until it sees a short one.
                self._decoder.rotary_emb(part.ids, torch.zeros_like(part.ids[:1, :1]))
            rows = torch.arange(len(part.last), device=self._device)
            hidden: torch.Tensor = self._decoder(input_ids=part.ids, use_cache=False).last_hidden_state[rows, part.last]
            return hidden
        row, last = (varlen.Varlen(part), varlen.VarlenLast(part)) if self._varlen else _grouped(part)
        only: torch.Tensor = self._decoder(
            input_ids=part.ids,
            position_ids=part.positions,
            attention_mask=attention.placeholder(self._device),
            use_cache=False,
            attend=row,
            only_last=attention.OnlyLast(last, part.last),
        ).last_hidden_state[0]
        return only

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """Compare a packed row of two queries with padded rows: a clause on what differs, None if nothing does."""
        size = int(self._decoder.config.vocab_size)
        first, second, suffix = (array("i", [(seed * i * i + i) % size for i in range(3, 9)]) for seed in (7, 11, 13))
        document = [array("i", [(17 * i + 5 * n) % size for i in range(n)]) for n in (2, 5, 9)]
        prompts = [Prompt(p, d, suffix, truncated=False) for p, d in zip((first, second, first), document, strict=True)]
        try:
            packed, padded = (self._hidden(part.of(prompts).on(self._device)) for part in (Pack, Rows))
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            return f"its packed probe failed ({type(error).__name__}: {error})"
        if not torch.isfinite(padded).all():
            # Overflow or damaged weights: what is scored says so itself, by NonFiniteLogits.
            return None
        difference = ((packed - padded).float().abs().max() / padded.float().std()).item()
        if not difference <= TOLERANCE.get(packed.dtype, TOLERANCE_HALF):
            return f"its packed probe differs from the plain pass by {difference:.2g} standard deviations"
        return None


def _grouped(pack: Pack) -> tuple[attention.Attend, attention.Attend]:
    return attention.Grouped(pack), attention.GroupedLast(pack)
