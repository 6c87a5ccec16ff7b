"""Scoring, evaluating and gently training a compiled checkpoint."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from beir import DOCSTRINGS, Collection, Split
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
    return evaluate_at(model, prompts, collection, split, (top,), queries)[top]


def evaluate_at(
    model: Qwen3ForCausalLM,
    prompts: Prompts,
    collection: Collection,
    split: str,
    tops: Sequence[int],
    queries: int | None = None,
) -> dict[int, Figures]:
    """The same for several depths, each document scored once."""
    model.eval()
    chosen = collection.splits[split]
    run = collection.bm25(split, max(tops))
    names = sorted(run)
    if queries is not None and len(names) > queries:
        names = sorted(random.Random(0).sample(names, queries))
    pairs = [(name, int(d)) for name in names for d in run[name]]
    ids = [prompts.ids(chosen.queries[name], collection.documents[d]) for name, d in pairs]
    logit = dict(zip(pairs, score(model, ids, prompts.yes).tolist(), strict=True))
    figures = {}
    for top in tops:
        rows, seen = [], []
        for name in names:
            candidates = [int(d) for d in run[name][:top]]
            seen += [(name, d) for d in candidates]
            reranked = sorted(candidates, key=lambda d: -logit[name, d])
            grades = chosen.qrels[name]
            rows.append([ndcg(order, grades) for order in (candidates, reranked, fuse(candidates, reranked))])
        means = map(float, np.mean(rows, axis=0))
        relevant = np.array([chosen.qrels[name].get(d, 0) > 0 for name, d in seen])
        figures[top] = Figures(len(names), *means, logits=np.array([logit[pair] for pair in seen]), relevant=relevant)
    return figures


@dataclass(frozen=True)
class Group:
    """One query with documents of which some are relevant: what a training step compares."""

    query: str
    documents: tuple[str, ...]
    gains: tuple[float, ...]


# Negatives come from these BM25 ranks: higher ones are too often relevant without being marked so, lower ones are easy.
NEGATIVE_RANKS = slice(3, 30)
DOCUMENTS_PER_GROUP = 8
GROUPS_PER_STEP = 4
SELF_SUPERVISED = 700  # groups made from docstrings alone, per epoch


def groups_of(collection: Collection, random_: random.Random) -> Iterator[Group]:
    """One group per training query: one or two relevant documents, the rest BM25's negatives, in random order."""
    chosen = collection.splits["train"]
    run = collection.bm25("train", 60 if collection.judged_only else NEGATIVE_RANKS.stop)
    for query, text in chosen.queries.items():
        grades = chosen.qrels[query]
        relevant = sorted((d for d, grade in grades.items() if grade > 0), key=lambda d: (-grades[d], d))
        best = [d for d in relevant if grades[d] == grades[relevant[0]]]
        picked = [random_.choice(best)]
        if len(relevant) > 1:
            picked += random_.sample([d for d in relevant if d not in picked], 1)
        negatives = [int(d) for d in run[query][NEGATIVE_RANKS] if grades.get(int(d), 0) == 0]
        picked += random_.sample(negatives, min(len(negatives), DOCUMENTS_PER_GROUP - len(picked)))
        random_.shuffle(picked)
        yield Group(
            text,
            tuple(collection.documents[d] for d in picked),
            tuple(2.0 ** grades.get(d, 0) - 1 for d in picked),
        )


def docstring_groups(collection: Collection, number: int, random_: random.Random) -> Iterator[Group]:
    """Queries made from docstrings: a part of the first sentence's words, which the document keeps nine times of ten."""
    pairs = []
    for place in random_.sample(range(len(collection.documents)), min(2 * number, len(collection.documents))):
        name, _, docstring = collection.documents[place].partition("\n")
        sentence, _, rest = docstring.partition(".")
        words = [word for word in sentence.split() if random_.random() < 0.6]
        if len(words) < 3 or len(rest) < 40 or len(pairs) == number:
            continue
        kept = random_.random() < 0.9
        pairs.append((place, " ".join(words[:16]), collection.documents[place] if kept else f"{name}\n{rest}"))
    made = Split({str(place): query for place, query, _ in pairs}, {str(place): {place: 1} for place, _, _ in pairs})
    run = Collection(collection.name, collection.documents, {"made": made}).bm25("made", NEGATIVE_RANKS.stop)
    for place, query, document in pairs:
        negatives = [int(d) for d in run[str(place)][NEGATIVE_RANKS] if d != place]
        chosen = random_.sample(negatives, min(len(negatives), DOCUMENTS_PER_GROUP - 1))
        documents = [document, *(collection.documents[d] for d in chosen)]
        order = random_.sample(range(len(documents)), len(documents))
        yield Group(query, tuple(documents[i] for i in order), tuple(float(i == 0) for i in order))


def loss_of(model: Qwen3ForCausalLM, prompts: Prompts, groups: Sequence[Group]) -> torch.Tensor:
    """Listwise cross entropy of each group's gains, and a fifth of the pointwise one that keeps logits comparable."""
    pairs = [prompts.ids(group.query, document) for group in groups for document in group.documents]
    z = logits(model, pairs, prompts.yes) / RELEVANCE_SCALE
    total = torch.zeros(())
    start = 0
    for group in groups:
        part = z[start : start + len(group.documents)]
        start += len(group.documents)
        gains = torch.tensor(group.gains)
        listwise = -(gains / gains.sum() * part.log_softmax(0)).sum()
        pointwise = torch.nn.functional.binary_cross_entropy_with_logits(part, (gains > 0).float())
        total = total + listwise + 0.2 * pointwise
    return total / len(groups)


def train(
    model: Qwen3ForCausalLM,
    prompts: Prompts,
    collections: Sequence[Collection],
    *,
    steps: int,
    seed: int,
    tell: Callable[[str], None],
    rate: float = 1e-4,
) -> None:
    """Train in place for ``steps`` steps; what is left in the model is the moving average of its weights.

    The circuit's weights move slowly, the MLPs, which start without effect, faster. Where the processor has bfloat16
    instructions the products are computed in it, as they will be when the model is used there.
    """
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    rates = {"mlp.": 5 * rate, "model.norm": 50 * rate, "": rate}
    by_rate: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        chosen = next(value for part, value in rates.items() if part in name)
        by_rate.setdefault(chosen, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": value} for value, parameters in by_rate.items()], betas=(0.9, 0.98), weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    bfloat16 = torch.cpu._is_avx512_bf16_supported()
    model.train()
    waiting: list[Group] = []
    recent: list[float] = []
    for step in range(1, steps + 1):
        if len(waiting) < GROUPS_PER_STEP:
            waiting = _epoch(collections, random_)
        groups = [waiting.pop() for _ in range(GROUPS_PER_STEP)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(model, prompts, groups)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        decay = min(0.995, step / (step + 10))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        if step % 50 == 0 or step == steps:
            tell(f"step {step} of {steps}, loss {np.mean(recent):.4f}")
            recent.clear()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average[name])
    model.eval()


def _epoch(collections: Sequence[Collection], random_: random.Random) -> list[Group]:
    groups = []
    for collection in collections:
        if "train" in collection.splits:
            groups += groups_of(collection, random_)
        if collection.name == DOCSTRINGS:
            groups += docstring_groups(collection, SELF_SUPERVISED, random_)
    random_.shuffle(groups)
    return groups
