"""Scoring, evaluating and gently training a compiled checkpoint."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from beir import Collection
from tokenizer import render
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

SUFFIX_TOKENS = 5  # <|im_end|> \n <|im_start|> assistant \n
RELEVANCE_SCALE = 5.0  # relevance = sigmoid(logit / 5)


class Prompts:
    """Token ids of (query, document) prompts; each text is encoded once."""

    def __init__(self, tokenizer: Tokenizer, longest_document: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest_document
        self._before = tokenizer.encode("<|im_start|>system\n").ids
        self._between = tokenizer.encode("<|im_end|>\n<|im_start|>user\n").ids
        self._after = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n").ids
        self.yes = tokenizer.encode("Yes").ids[0]
        self._texts: dict[str, list[int]] = {}

    def ids(self, query: str, document: str) -> list[int]:
        """The prompt's ids, the document cut to the longest allowed."""
        return [
            *self._before, *self._text(query), *self._between, *self._text(document)[: self._longest], *self._after
        ]  # fmt: skip

    def _text(self, text: str) -> list[int]:
        if text not in self._texts:
            # Control tokens spelt out in a text would close the turn; training texts hold none.
            self._texts[text] = self._tokenizer.encode(text.strip()).ids
        return self._texts[text]


def logits(model: Qwen3ForCausalLM, prompts: Sequence[Sequence[int]], yes: int) -> torch.Tensor:
    """The logit of "Yes" after each prompt, float32, shape (prompts,); gradients flow if they are enabled."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    # Right padding needs no mask under causal attention: no prompt token can see what follows it.
    batch = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(batch, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(prompts)), lengths - 1]
    return last.float() @ model.model.embed_tokens.weight[yes].float()


@torch.no_grad()
def score(model: Qwen3ForCausalLM, prompts: Sequence[Sequence[int]], yes: int, tokens: int = 4096) -> np.ndarray:
    """Logits of many prompts, in batches of similar length and about ``tokens`` tokens."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    result = np.empty(len(prompts), dtype=np.float32)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(prompts[order[end]]) * (end + 1 - start) <= tokens:
            end += 1
        chosen = order[start:end]
        result[chosen] = logits(model, [prompts[i] for i in chosen], yes).numpy()
        start = end
    return result


def ndcg(ranked: Sequence[int], grades: Mapping[int, int], k: int = 10) -> float:
    """NDCG@k with gain 2^grade - 1."""

    def dcg(values: Sequence[int]) -> float:
        return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(values[:k]))

    return dcg([grades.get(d, 0) for d in ranked]) / dcg(sorted(grades.values(), reverse=True))


def fuse(*rankings: Sequence[int], k: int = 60) -> list[int]:
    """Reciprocal rank fusion: the sum of 1/(k + rank), best first."""
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            fused[document] = fused.get(document, 0.0) + 1 / (k + rank)
    return sorted(fused, key=lambda d: -fused[d])


@dataclass(frozen=True)
class Figures:
    """Mean NDCG@10 of one collection's split, and every (logit, is relevant) seen."""

    queries: int
    bm25: float
    reranked: float
    fused: float
    logits: np.ndarray
    relevant: np.ndarray

    def __str__(self) -> str:
        return f"{self.queries:5d} queries   BM25 {self.bm25:.3f}   reranked {self.reranked:.3f}   fused {self.fused:.3f}"


def evaluate(
    model: Qwen3ForCausalLM, prompts: Prompts, collection: Collection, split: str, top: int, queries: int | None = None
) -> Figures:
    """Rerank BM25's ``top`` documents of the split's queries (a fixed sample of at most ``queries``)."""
    model.eval()
    chosen = collection.splits[split]
    run = collection.bm25(split, top)
    names = sorted(run)
    if queries is not None and len(names) > queries:
        names = sorted(random.Random(0).sample(names, queries))
    pairs = [(name, int(d)) for name in names for d in run[name]]
    values = score(
        model, [prompts.ids(chosen.queries[name], collection.documents[d]) for name, d in pairs], prompts.yes
    )
    by_query: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for (name, document), value in zip(pairs, values, strict=True):
        by_query[name].append((float(value), document))
    rows = []
    for name in names:
        candidates = [d for _, d in by_query[name]]
        reranked = [d for _, d in sorted(by_query[name], key=lambda pair: -pair[0])]
        grades = chosen.qrels[name]
        rows.append([ndcg(order, grades) for order in (candidates, reranked, fuse(candidates, reranked))])
    means = np.mean(rows, axis=0)
    relevant = np.array([chosen.qrels[name].get(d, 0) > 0 for name, d in pairs])
    return Figures(len(names), *map(float, means), logits=values, relevant=relevant)


def train(*_args: object, **_kw: object) -> None:
    raise NotImplementedError
