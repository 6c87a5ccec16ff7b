"""NDCG, reciprocal rank and recall of a ranking, as trec_eval defines them.

    DCG@k  = Σ_{r <= k} gain(document at rank r) / log₂(r + 1),   gain = its grade, none below 0
    NDCG@k = DCG@k / DCG@k of the best order
    RR@k   = 1 / rank of the first relevant document, 0 if it is below k
    R@k    = share of the relevant documents at ranks 1 … k

Relevant means grade >= 1. A query without a relevant document has 0 in each. Equal to ir_measures' nDCG@k, RR@k and R@k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Documents from best to worst; equal scores by id, the later one first, as trec_eval does."""
    return sorted(scores, key=lambda document: (scores[document], document), reverse=True)


def ndcg(ranked: Sequence[str], grades: Mapping[str, float], k: int = 10) -> float:
    """NDCG@k with graded gains, in [0, 1]."""
    best = dcg(sorted(grades.values(), reverse=True), k)
    return dcg([grades.get(document, 0) for document in ranked], k) / best if best > 0 else 0.0


def dcg(grades: Sequence[float], k: int = 10) -> float:
    """DCG@k of grades in ranked order."""
    gains = np.maximum(np.asarray(grades[:k], np.float64), 0)
    return float(np.sum(gains / np.log2(np.arange(2, len(gains) + 2))))


def reciprocal_rank(ranked: Sequence[str], grades: Mapping[str, float], k: int | None = None) -> float:
    """1 / rank of the first relevant document; its mean over queries is MRR."""
    for rank, document in enumerate(ranked[:k], 1):
        if grades.get(document, 0) >= 1:
            return 1 / rank
    return 0.0


def recall(ranked: Sequence[str], grades: Mapping[str, float], k: int = 100) -> float:
    """Share of the relevant documents among the first k."""
    relevant = {document for document, grade in grades.items() if grade >= 1}
    return len(relevant.intersection(ranked[:k])) / len(relevant) if relevant else 0.0


def per_query(measure: Callable[..., float], run: Run, qrels: Qrels, k: int | None) -> dict[str, float]:
    """A measure of every query that qrels judge; a query that the run lacks has 0."""
    return {query: measure(ranking(run.get(query, {})), grades, k) for query, grades in qrels.items()}


def ndcg_of(scores: Floats, gains: Floats, k: int = 10) -> Floats:
    """NDCG@k of many queries at once.

    Args:
        scores: (Q, n) what the documents are sorted by.
        gains: (Q, n) not negative.
        k: cut-off.

    Returns:
        (Q) in [0, 1]; 0 where no gain is positive.
    """
    k = min(k, scores.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = (np.take_along_axis(gains, order, axis=1) * discount).sum(axis=1)
    best = (-np.sort(-gains, axis=1)[:, :k] * discount).sum(axis=1)
    return np.divide(found, best, out=np.zeros_like(found), where=best > 0)
