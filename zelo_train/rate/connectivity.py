"""Which documents and queries have enough answers to be rated. The others are reported, never guessed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from zelo_train.rate.answers import Answers, Indices

LEAST_PAIRS = 2
LEAST_SHARE = 0.8


@dataclass(frozen=True)
class Connectivity:
    """What a query's answers tie together.

    Attributes:
        query: its id.
        documents: how many candidates it has.
        pairs: how many different pairs of them were answered.
        parts: into how many parts the candidates with enough pairs fall; 1 is connected.
        left_out: the candidates with too few answered pairs.
        reason: why the whole query is left out; empty when it is rated.
    """

    query: str
    documents: int
    pairs: int
    parts: int
    left_out: tuple[str, ...]
    reason: str

    @property
    def rated(self) -> bool:
        """Whether the query's other documents are rated."""
        return not self.reason

    def __str__(self) -> str:
        counts = f"{self.documents} documents, {self.pairs} answered pairs"
        if self.reason:
            return f"query {self.query}: not rated, {self.reason} ({counts})"
        missing = f"; not rated: {', '.join(self.left_out)}" if self.left_out else ""
        return f"query {self.query}: {counts}{missing}"


def connectivity(answers: Answers) -> tuple[list[Connectivity], NDArray[np.bool_]]:
    """The rule: a document needs two answered pairs, a query 80 % such documents, and those must be connected.

    A query of two documents has one pair only, which is then enough.

    Returns:
        A report per query, and (D) whether each document is rated.
    """
    sizes, owner, total = answers.sizes, answers.owner, len(answers.documents)
    pairs = np.unique(answers.pair)
    left, right = pairs // max(total, 1), pairs % max(total, 1)
    answered = np.bincount(left, minlength=total) + np.bincount(right, minlength=total)
    enough = (answered >= np.minimum(LEAST_PAIRS, np.maximum(sizes[owner] - 1, 1))) if total else np.zeros(0, bool)

    parts = _parts(left, right, enough, owner, len(sizes))
    share = np.bincount(owner, enough, minlength=len(sizes))
    pairs_of_query = np.bincount(owner[left], minlength=len(sizes))

    reports, rated = [], enough.copy()
    for index, query in enumerate(answers.queries):
        own = slice(answers.start[index], answers.start[index + 1])
        n = int(sizes[index])
        reason = ""
        if n < 2:
            reason = "it has no two documents to compare"
        elif share[index] < LEAST_SHARE * n:
            reason = (
                f"only {int(share[index])} of its {n} documents have the {min(LEAST_PAIRS, n - 1)} answered pairs that a "
                f"rating needs, and {LEAST_SHARE:.0%} must"
            )
        elif parts[index] > 1:
            reason = f"its answers fall into {parts[index]} parts that nothing compares"
        if reason:
            rated[own] = False
        lacking = np.flatnonzero(~enough[own])
        left_out = tuple(answers.documents[int(answers.start[index]) + int(place)] for place in lacking)
        reports.append(Connectivity(query, n, int(pairs_of_query[index]), int(parts[index]), left_out, reason))
    return reports, rated


def _parts(left: Indices, right: Indices, kept: NDArray[np.bool_], owner: Indices, queries: int) -> Indices:
    """(Q) connected components among the kept documents."""
    total = len(kept)
    if not total:
        return np.zeros(queries, np.int64)
    edges = kept[left] & kept[right]
    graph = coo_array((np.ones(int(edges.sum()), np.int8), (left[edges], right[edges])), shape=(total, total))
    _, label = connected_components(graph, directed=False)
    _, first = np.unique(label[kept], return_index=True)
    return np.bincount(owner[kept][first], minlength=queries)
