"""Offsets from cross-query pairs: the alternative to grades, and each the other's audit.

    P(pair 1 fits better than pair 2) = F( κ((ê₁ + b₁) − (ê₂ + b₂)) ),   b_q ~ N(0, σ_b²),   κ from v₁ + v₂

Pairs give b alone. The scale, c and T, still needs 100 grades or qrels; without them the targets are marked unanchored.
"""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF002

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.sparse import coo_array, csc_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu
from scipy.special import xlogy

from zelo_train.errors import TooFewAnswers
from zelo_train.rate.answers import SOFT_LEAST, Floats, Indices
from zelo_train.rate.calibration import Calibration, Offset, _rows, _Scale
from zelo_train.rate.link import Link
from zelo_train.rate.rating import Ratings
from zelo_train.records import Form, Grade, Judgment, Kind

# Columns of the inverse that are solved for at once.
_COLUMNS = 256


@dataclass(frozen=True)
class Audit:
    """How well two calibrations agree about the same queries.

    Attributes:
        queries: how many both place.
        correlation: Pearson's, of their offsets; nan for fewer than four queries.
        low, high: its 95 % interval (Fisher's z).
    """

    queries: int
    correlation: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"offsets correlate by {self.correlation:.2f} ({self.low:.2f} to {self.high:.2f}) over {self.queries} queries"


def audit(one: Calibration, other: Calibration) -> Audit:
    """One calibration by another, over the queries that both have evidence for."""
    shared = [query for query in one.offsets if one.of(query).evidence and other.of(query).evidence]
    if len(shared) < 4:
        return Audit(len(shared), np.nan, np.nan, np.nan)
    pair = np.array([[one.of(query).value, other.of(query).value] for query in shared])
    if np.any(pair.std(axis=0) == 0):
        return Audit(len(shared), np.nan, np.nan, np.nan)
    correlation = float(np.corrcoef(pair.T)[0, 1])
    z, half = np.arctanh(np.clip(correlation, -1 + 1e-12, 1 - 1e-12)), 1.96 / np.sqrt(len(shared) - 3)
    return Audit(len(shared), correlation, float(np.tanh(z - half)), float(np.tanh(z + half)))


def calibrate_across(ratings: Ratings, judgments: Iterable[Judgment], grades: Iterable[Grade] = ()) -> Calibration:
    """The offset of every rated query from cross-query pairs, and the scale from grades.

    Args:
        ratings: from `rate`.
        judgments: answered CROSS questions count, others are passed over; `value` is P(first pair fits better).
        grades: for c and T; at best of 100 documents or more.

    Queries outside the largest part that the pairs tie together keep b = 0 with variance σ_b² and evidence 0.

    Raises:
        TooFewAnswers: no answered pair of rated documents.
    """
    answers = ratings.answers
    owner = answers.owner
    place = {(answers.queries[owner[d]], document): d for d, document in enumerate(answers.documents)}
    firsts, seconds, p = [], [], []
    for judgment in judgments:
        question = judgment.question
        if question.kind is not Kind.CROSS or not judgment.answered or judgment.value is None:
            continue
        sides = [place.get(side) for side in zip(question.queries, question.documents, strict=True)]
        if None in sides or question.queries[0] == question.queries[1]:
            continue
        firsts.append(sides[0])
        seconds.append(sides[1])
        soft = judgment.form is not Form.VOTE
        p.append(min(max(judgment.value, SOFT_LEAST), 1 - SOFT_LEAST) if soft else judgment.value)
    if not p:
        raise TooFewAnswers("no answered cross-query pair of rated documents: ask some, or calibrate by grades")
    first, second = np.array(firsts, np.int64), np.array(seconds, np.int64)
    one, other, tied = _largest_part(owner[first], owner[second], len(answers.queries))
    rows = tied[owner[first]]
    found = _Offsets(
        one[rows],
        other[rows],
        int(tied.sum()),
        ratings.values[first[rows]] - ratings.values[second[rows]],
        ratings.link.attenuation(ratings.standard_errors[first[rows]] ** 2 + ratings.standard_errors[second[rows]] ** 2),
        np.array(p)[rows],
        ratings.link,
    )
    b, variance, spread = np.zeros(len(tied)), np.full(len(tied), found.spread**2), found.spread
    b[tied], variance[tied] = found.b, found.variance()
    count = np.zeros(len(tied), np.int64)
    count[tied] = np.bincount(np.concatenate([one[rows], other[rows]]), minlength=int(tied.sum()))
    offsets = {query: Offset(float(b[q]), float(variance[q]), int(count[q])) for q, query in enumerate(answers.queries)}
    grades = list(grades)
    if not grades:
        return Calibration({}, 1.0, spread, 0.0, offsets, 0)
    scale = _Scale(_rows(ratings, grades), len(answers.queries), (b, variance))
    judges = scale.rows.judges
    width, _, phi = np.exp(scale.theta[len(judges) :])
    centres = {judge: float(scale.theta[j]) for j, judge in enumerate(judges)}
    return Calibration(centres, float(width), spread, float(phi), offsets, len(scale.rows.y), scale.rows.ignored)


def _largest_part(one: Indices, other: Indices, queries: int) -> tuple[Indices, Indices, NDArray[np.bool_]]:
    """The pairs' queries renumbered within the largest connected part, and (Q) who is in it."""
    graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(queries, queries))
    _, label = connected_components(graph, directed=False)
    tied = label == np.bincount(label).argmax()
    number = np.cumsum(tied) - 1
    return number[one], number[other], tied


class _Offsets:
    """b and σ_b: Laplace's approximation of the marginal likelihood, highest over σ_b."""

    def __init__(
        self, one: Indices, other: Indices, queries: int, difference: Floats, kappa: Floats, p: Floats, link: Link
    ) -> None:
        self.one, self.other, self.queries = one, other, queries
        self.difference, self.kappa, self.p, self.link = difference, kappa, p, link
        self.b = np.zeros(queries)
        best = minimize_scalar(lambda log_spread: -self._height(np.exp(log_spread)), bounds=(-4, 3), method="bounded")
        self.spread = float(np.exp(best.x))
        self._height(self.spread)

    def _height(self, spread: float) -> float:
        for _ in range(100):
            z = self.kappa * (self.difference + self.b[self.one] - self.b[self.other])
            mean = np.clip(self.link.probability(z), 1e-12, 1 - 1e-12)
            slope = self.kappa * self.link.density(z)
            fisher = slope**2 / (mean * (1 - mean))
            push = (self.p - mean) * slope / (mean * (1 - mean))
            score = np.bincount(self.one, push, minlength=self.queries) - np.bincount(self.other, push, minlength=self.queries)
            self.solver = splu(self._information(fisher, spread), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
            step = np.clip(self.solver.solve(score - self.b / spread**2), -2, 2)
            self.b = self.b + step
            if np.abs(step).max() < 1e-8:
                break
        fit = np.sum(xlogy(self.p, mean) + xlogy(1 - self.p, 1 - mean)) - np.sum(self.b**2) / (2 * spread**2)
        # log|U| of the LU factors is log|information|, which is positive definite.
        return float(fit - self.queries * np.log(spread) - 0.5 * np.log(np.abs(self.solver.U.diagonal())).sum())

    def _information(self, fisher: Floats, spread: float) -> csc_array:
        shape = (self.queries, self.queries)
        links = coo_array((-fisher, (self.one, self.other)), shape=shape).tocsc()
        own = np.bincount(self.one, fisher, minlength=self.queries) + np.bincount(self.other, fisher, minlength=self.queries)
        return csc_array(links + links.T + diags_array(own + 1 / spread**2))

    def variance(self) -> Floats:
        """(queries) diagonal of the inverse information."""
        found = np.empty(self.queries)
        for first in range(0, self.queries, _COLUMNS):
            columns = np.arange(first, min(first + _COLUMNS, self.queries))
            unit = np.zeros((self.queries, len(columns)))
            unit[columns, columns - first] = 1
            found[columns] = self.solver.solve(unit)[columns, columns - first]
        return found
