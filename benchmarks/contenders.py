"""Who competes: ours, sentence-transformers, the published files' way, and a plain padded batch. All answer with logits.

Each is a class whose object, made of a checkpoint's folder, answers `(query, documents)` with the logits in the documents'
order and carries `decoder`, through whose embedding every token passes that it computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerank_integrations import Reranker
from zerank_integrations.prompt import prompt


class Contender(Protocol):
    """One way to score."""

    decoder: nn.Module

    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """The logits, in the documents' order."""


class Ours:
    """This package's Reranker, as a user calls it."""

    def __init__(self, folder: Path, dtype: str, **options: object) -> None:
        self._reranker = Reranker(folder, device="cpu", dtype=dtype, **options).warm_up()  # type: ignore[arg-type]
        self.decoder = self._reranker.engine().loaded.decoder

    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """`rank`, put back into the input's order."""
        return [one.logit for one in sorted(self._reranker.rank(query, documents), key=lambda one: one.index)]


class SentenceTransformers:
    """CrossEncoder.predict; sorted by length, padded on the left, the last position's logits."""

    def __init__(self, folder: Path, dtype: str, batch: int) -> None:
        from sentence_transformers import CrossEncoder

        kwargs = {"dtype": getattr(torch, dtype)}
        self._encoder = CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs=kwargs)
        self._batch = batch
        self.decoder = self._encoder

    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """`predict`; zerank-2's layout answers with the raw logit."""
        pairs = [(query, document) for document in documents]
        scores = self._encoder.predict(pairs, batch_size=self._batch, show_progress_bar=False)
        return [float(score) for score in scores]


class _Plain:
    """The checkpoint in plain transformers, and whole prompts encoded by its tokenizer."""

    def __init__(self, folder: Path, dtype: str) -> None:
        kwargs = {"dtype": getattr(torch, dtype), "local_files_only": True}
        # transformers types little of what is used of it here.
        self.model = cast(Any, AutoModelForCausalLM.from_pretrained(folder, **kwargs))
        self.model.eval()
        self.decoder = self.model.get_decoder()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        (self.yes,) = self._tokenizer.encode("Yes", add_special_tokens=False)
        self.row = self.model.get_output_embeddings().weight[self.yes].detach().float()

    def encode(self, query: str, documents: Sequence[str]) -> list[list[int]]:
        """Ids of each whole prompt."""
        texts = [prompt(query, document) for document in documents]
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


class Padded(_Plain):
    """Batches of near-equal length, padded on the right, without logits but one: as good as padding gets."""

    def __init__(self, folder: Path, dtype: str, budget: int = 8_192) -> None:
        super().__init__(folder, dtype)
        self._budget = budget

    @torch.inference_mode()
    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """As many rows a batch as the budget of tokens holds, longest first."""
        encoded = self.encode(query, documents)
        logits = [0.0] * len(encoded)
        for batch in _batches([len(ids) for ids in encoded], self._budget):
            ids, last = _right_padded([encoded[place] for place in batch])
            # Under causal attention no token sees what is right of it: padding needs no mask.
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            found = hidden[torch.arange(len(batch)), last].float() @ self.row
            for place, logit in zip(batch, found.tolist(), strict=True):
                logits[place] = logit
        return logits


class Published(_Plain):
    """What the files published with zerank-1 do, written anew.

    Texts clipped by characters, batches bounded by characters, a padding mask, gradients recorded, and the logits of the whole
    vocabulary at every position, of which one number is used.
    """

    QUERY, DOCUMENT, BUDGET = 2_000, 10_000, 10_000  # characters

    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """Longest first, as many rows a batch as the budget of characters holds."""
        query, documents = query[: self.QUERY], [document[: self.DOCUMENT] for document in documents]
        encoded = self.encode(query, documents)
        logits = [0.0] * len(encoded)
        for batch in _batches([len(query) + len(document) for document in documents], self.BUDGET):
            ids, last = _right_padded([encoded[place] for place in batch])
            mask = torch.arange(ids.shape[1])[None] <= last[:, None]
            every = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            found = every[torch.arange(len(batch)), last, self.yes]
            for place, logit in zip(batch, found.tolist(), strict=True):
                logits[place] = logit
        return logits


class OneAtATime(_Plain):
    """The reference: one prompt a pass, no padding, no packing."""

    @torch.inference_mode()
    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """One pass per document."""
        logits = []
        for ids in self.encode(query, documents):
            hidden = self.decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
            logits.append(float(hidden[0, -1].float() @ self.row))
        return logits


# In the order of the table's columns. `ours` takes the package's defaults.
CONTENDERS: dict[str, Callable[[Path, str], Contender]] = {
    "ours": Ours,
    "ours, 2,048 tokens a step": functools.partial(Ours, token_budget=2_048),
    "padded": Padded,
    "ST batch 8": functools.partial(SentenceTransformers, batch=8),
    "ST batch 32": functools.partial(SentenceTransformers, batch=32),
    "ST batch 100": functools.partial(SentenceTransformers, batch=100),
    "published": Published,
}

REFERENCE = "one at a time"


def counting(decoder: nn.Module) -> Callable[[], int]:
    """Count the tokens a model computes, padding included, where they all pass: in its embedding.

    Returns:
        A function that returns the count since it was last called.
    """
    count = 0

    def add(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        count += arguments[0].numel()

    embedding = next(module for module in decoder.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_pre_hook(add)

    def since() -> int:
        nonlocal count
        counted, count = count, 0
        return counted

    return since


def _batches(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices, longest first, in batches whose padded size stays within the budget."""
    order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, sizes[order[start]]))
        yield order[start : start + rows]
        start += rows


def _right_padded(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids as one rectangle, and each row's last place."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([len(row) - 1 for row in rows])
