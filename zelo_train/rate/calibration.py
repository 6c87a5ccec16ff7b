"""From ratings, whose sum is zero in every query, to targets that mean the same in all of them.

Σe = 0 makes the best of a hundred irrelevant documents look like a true answer. Each judge grades some documents per query, and

    E[g_qij / 10] = σ( κ(ê_qi + b_q − c_j) / T ),   κ = 1/√(1 + πv/8T²),   b_q ~ N(0, σ_b²)
    target  y = σ( κ′(ê + b_q − c) / T ),            κ′ with v + Var b_q,  c = mean c_j;  clipped to [.01, .99]

ê and v are a rating's posterior mean and variance. c_j, T, σ_b and the dispersion φ maximise the marginal likelihood. In it a
grade has density exp(−KL(g/10 ‖ μ)/φ)/√φ (quasi-binomial; Nelder and Pregibon 1987), and b_q is integrated out by 15-point
Gauss–Hermite quadrature round its mode. Relevance therefore means "expected ensemble grade / 10".
"""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF001, RUF002, RUF003

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp, xlogy

from zelo_train.errors import TooFewAnswers
from zelo_train.rate.answers import Floats, Indices
from zelo_train.rate.rating import Ratings
from zelo_train.records import Grade, Kind, Question, Target

GRADED_RANKS = (1, 4, 10, 20)
NODES = 15
# A query's offset needs two grades, a scale for all queries a hundred.
GRADES_FOR_OFFSET = 2
GRADES_FOR_SCALE = 100
LEAST_RELEVANCE = 0.01

Weights = Literal["equal", "precision"]


def graded_ranks(n: int) -> tuple[int, ...]:
    """Which ranks of n rated documents are graded: 1, 4, 10 and 20, or evenly spaced ones where there are fewer than 20.

    >>> graded_ranks(100), graded_ranks(10), graded_ranks(3)
    ((1, 4, 10, 20), (1, 4, 7, 10), (1, 2, 3))
    """
    if n >= GRADED_RANKS[-1]:
        return GRADED_RANKS
    return tuple(int(rank) for rank in np.unique(np.round(np.linspace(1, n, min(n, len(GRADED_RANKS))))))


def grade_questions(ratings: Ratings) -> list[Question]:
    """What to ask each judge so that `calibrate` can place every rated query: one GRADE question per document."""
    return [
        Question(Kind.GRADE, (query,), (best[rank - 1].document,))
        for query in ratings.answers.queries
        for best in [ratings.of(query)]
        for rank in graded_ranks(len(best))
    ]


@dataclass(frozen=True)
class Offset:
    """b_q: how much more relevant a query's documents are, on the whole, than the average query's.

    Attributes:
        value: posterior mean, in logit units.
        variance: posterior variance.
        evidence: how many grades or cross-query answers it rests on.
    """

    value: float
    variance: float
    evidence: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where each query's ratings lie on the scale that all share.

    Attributes:
        centres: judge → c_j, the e + b that it grades 5; empty when nothing was graded.
        width: T, in logit units of e per logit of a grade.
        spread: σ_b, how much queries' offsets differ.
        dispersion: φ of the grades; 0 when nothing was graded.
        offsets: query → b_q.
        grades: how many grades fixed c and T.
        ignored: grades of documents or queries that are not rated.
    """

    centres: Mapping[str, float]
    width: float
    spread: float
    dispersion: float
    offsets: Mapping[str, Offset] = field(repr=False)
    grades: int
    ignored: int = 0

    @property
    def centre(self) -> float:
        """C, the mean c_j; 0 when nothing was graded."""
        return float(np.mean(list(self.centres.values()))) if self.centres else 0.0

    @property
    def anchored(self) -> bool:
        """Whether 100 grades fixed the scale; a threshold on unanchored relevances means nothing."""
        return self.grades >= GRADES_FOR_SCALE

    def of(self, query: str) -> Offset:
        """b_q; 0 with variance σ_b² for a query that nothing tells of."""
        return self.offsets.get(query, Offset(0.0, self.spread**2, 0))

    def relevance(self, ratings: Ratings) -> Floats:
        """(D) y = σ(κ′(ê + b_q − c)/T) in [.01, .99], in the order of `ratings.values`."""
        own = [self.of(query) for query in ratings.answers.queries]
        owner = ratings.answers.owner
        b = np.array([offset.value for offset in own])[owner]
        variance = ratings.standard_errors**2 + np.array([offset.variance for offset in own])[owner]
        y = expit(slope(variance, self.width) * (ratings.values + b - self.centre))
        return np.clip(y, LEAST_RELEVANCE, 1 - LEAST_RELEVANCE)

    def targets(self, ratings: Ratings, *, weights: Weights = "equal", simulated: bool = False) -> list[Target]:
        """What a student should answer, query after query.

        Args:
            ratings: what was calibrated, or newer ratings of the same queries.
            weights: "equal", or "precision" for 1/SE² clipped to [¼, 4] × its median, with mean 1 within the query.
            simulated: whether any judgment behind the ratings or grades was simulated.
        """
        weight = np.ones(len(ratings)) if weights == "equal" else precision(ratings)
        queries = ratings.answers.queries
        return [
            Target(queries[owner], document, float(y), float(w), self.anchored, simulated)
            for owner, document, y, w in zip(
                ratings.answers.owner.tolist(), ratings.answers.documents, self.relevance(ratings), weight, strict=True
            )
        ]

    def report(self) -> str:
        """The scale in lines of text."""
        placed = sum(offset.evidence > 0 for offset in self.offsets.values())
        lines = [
            f"{placed} of {len(self.offsets)} queries placed; offsets spread by {self.spread:.2f} logits; "
            f"relevance = σ((rating + offset − {self.centre:.2f}) / {self.width:.2f})"
        ]
        lines += [f"judge {judge}: grades 5 at {centre:+.2f}" for judge, centre in self.centres.items()]
        if not self.anchored:
            lines.append(
                f"not anchored: {self.grades} grades, and a scale needs {GRADES_FOR_SCALE}; "
                "no threshold on these targets means anything"
            )
        if self.ignored:
            lines.append(f"{self.ignored} grades of documents without a rating were left out")
        return "\n".join(lines)


def precision(ratings: Ratings) -> Floats:
    """(D) 1/SE² clipped to [¼, 4] × its median, mean 1 within each query."""
    weight = 1 / np.maximum(ratings.standard_errors, 1e-6) ** 2
    for first, last in zip(ratings.answers.start[:-1], ratings.answers.start[1:], strict=True):
        own = weight[first:last]
        middle = np.median(own)
        own = np.clip(own, middle / 4, middle * 4)
        weight[first:last] = own / own.mean()
    return weight


def slope(variance: Floats, width: float) -> Floats:
    """κ/T = 1/√(T² + πv/8): how steeply the expected grade rises with e when e is known up to this variance."""
    return 1 / np.sqrt(width**2 + np.pi * variance / 8)


def calibrate(ratings: Ratings, grades: Iterable[Grade]) -> Calibration:
    """The offset of every rated query, and the scale, from grades.

    Args:
        ratings: from `rate`.
        grades: each judge's grades, 0 to 10, of rated documents, at best those of `grade_questions`; qrels count as a judge
            when their grades are brought to 0 … 10. Queries with nothing relevant belong in: the others are told from them.

    Raises:
        TooFewAnswers: no grade of a rated document.
        ValueError: a grade outside [0, 10].
    """
    rows = _rows(ratings, grades)
    scale = _Scale(rows, len(ratings.answers.queries), None)
    return scale.calibration(ratings)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Grades as arrays: R grades by J judges."""

    judges: tuple[str, ...]
    query: Indices
    judge: Indices
    e: Floats
    variance: Floats
    y: Floats  # grade / 10
    ignored: int


def _rows(ratings: Ratings, grades: Iterable[Grade]) -> _Rows:
    answers = ratings.answers
    owner = answers.owner
    place = {(answers.queries[owner[d]], document): d for d, document in enumerate(answers.documents)}
    judges: dict[str, int] = {}
    found: list[tuple[int, int, float]] = []
    ignored = 0
    for grade in grades:
        if not 0 <= grade.grade <= 10:
            raise ValueError(
                f"judge {grade.judge!r} graded document {grade.document!r} of query {grade.query!r} {grade.grade}; "
                f"grades go from 0 to 10"
            )
        document = place.get((grade.query, grade.document))
        if document is None:
            ignored += 1
            continue
        found.append((judges.setdefault(grade.judge, len(judges)), document, grade.grade / 10))
    if not found:
        raise TooFewAnswers(
            f"no grade of a rated document ({ignored} of others): grade the documents of `grade_questions(ratings)` first"
        )
    judge, at = (np.array(column, np.int64) for column in zip(*((row[0], row[1]) for row in found), strict=True))
    y = np.array([row[2] for row in found])
    return _Rows(tuple(judges), owner[at], judge, ratings.values[at], ratings.standard_errors[at] ** 2, y, ignored)


class _Scale:
    """The marginal likelihood of grades and its optimum.

    With `known` offsets (value and variance per query) these are taken as given, and only c, T and φ are fitted.
    """

    def __init__(self, rows: _Rows, queries: int, known: tuple[Floats, Floats] | None) -> None:
        self.rows, self.queries, self.known = rows, queries, known
        self._mode = np.zeros(queries)
        nodes, weights = np.polynomial.hermite.hermgauss(NODES)
        self._nodes, self._log_weights = np.sqrt(2) * nodes, np.log(weights) + nodes**2 + 0.5 * np.log(2)
        judges = len(rows.judges)
        # c = 1, T = 1, σ_b = 1, φ = .1: near what judges of a hundred documents give; the optimum is found from far too.
        first = np.concatenate([np.ones(judges), [0.0, 0.0, np.log(0.1)]])
        far = (-50.0, 50.0)
        bounds = [far] * judges + [(np.log(0.05), np.log(50)), (np.log(0.01), np.log(20)), (np.log(1e-5), np.log(5))]
        self.theta = minimize(self.cost, first, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 500}).x

    def cost(self, theta: NDArray[np.float64]) -> tuple[float, Any]:
        """Minus the log marginal likelihood, up to a constant, and its slope (Fisher's identity), per grade."""
        r = self.rows
        judges = len(r.judges)
        c, (log_t, log_spread, log_phi) = theta[:judges][r.judge], theta[judges:]
        width, phi = np.exp(log_t), np.exp(log_phi)
        if self.known is not None:
            b = self.known[0][r.query][:, None]
            k = slope(r.variance + self.known[1][r.query], width)[:, None]
            share = np.ones((len(r.y), 1))
            total = 0.0
        else:
            k = slope(r.variance, width)[:, None]
            spread = np.exp(log_spread)
            offsets, log_joint = self._integrate(c, k[:, 0], phi, spread)
            posterior = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
            b, share = offsets[r.query], posterior[r.query]
            seen = np.bincount(r.query, minlength=self.queries) > 0
            total = float(logsumexp(log_joint, axis=1)[seen].sum())
        u = k * (r.e[:, None] + b - c[:, None])
        divergence = _divergence(r.y[:, None], u)
        if self.known is not None:
            total = float(-0.5 * log_phi * len(r.y) - divergence.sum() / phi)
        push = (r.y[:, None] - expit(u)) / phi
        grad = np.empty_like(theta)
        grad[:judges] = -np.bincount(r.judge, (share * push * k).sum(axis=1), minlength=judges)
        grad[judges] = -np.sum(share * push * u * (width * k) ** 2)
        grad[judges + 1] = 0.0
        if self.known is None:
            grad[judges + 1] = np.sum((posterior * ((offsets / spread) ** 2 - 1))[seen])
        grad[judges + 2] = np.sum(share * (divergence / phi - 0.5))
        return -total / len(r.y), -grad / len(r.y)

    def _integrate(self, c: Floats, k: Floats, phi: float, spread: float) -> tuple[Floats, Floats]:
        """Nodes b (Q, 15) round each query's mode, and log(weight · joint density) there."""
        r = self.rows
        mode = self._mode
        for _ in range(50):
            mean = expit(k * (r.e + mode[r.query] - c))
            gradient = np.bincount(r.query, k * (r.y - mean) / phi, minlength=self.queries) - mode / spread**2
            curvature = np.bincount(r.query, k**2 * mean * (1 - mean) / phi, minlength=self.queries) + 1 / spread**2
            # A grade's information fades away from its middle, so a whole Newton step could overshoot; two logits cannot.
            step = np.clip(gradient / curvature, -2, 2)
            mode = mode + step
            if np.abs(step).max() < 1e-8:
                break
        self._mode = mode
        width = 1 / np.sqrt(curvature)
        b = mode[:, None] + width[:, None] * self._nodes
        u = k[:, None] * (r.e[:, None] + b[r.query] - c[:, None])
        log_rows = -0.5 * np.log(phi) - _divergence(r.y[:, None], u) / phi
        log_density = np.zeros_like(b)
        np.add.at(log_density, r.query, log_rows)
        log_prior = -0.5 * (b / spread) ** 2 - np.log(spread) - 0.5 * np.log(2 * np.pi)
        return b, log_density + log_prior + self._log_weights + np.log(width)[:, None]

    def calibration(self, ratings: Ratings) -> Calibration:
        r = self.rows
        judges = len(r.judges)
        log_t, log_spread, log_phi = self.theta[judges:]
        width, spread, phi = float(np.exp(log_t)), float(np.exp(log_spread)), float(np.exp(log_phi))
        b, log_joint = self._integrate(self.theta[:judges][r.judge], slope(r.variance, width), phi, spread)
        posterior = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
        mean = (posterior * b).sum(axis=1)
        variance = (posterior * (b - mean[:, None]) ** 2).sum(axis=1)
        count = np.bincount(r.query, minlength=self.queries)
        offsets = {
            query: Offset(float(mean[q]), float(variance[q]), int(count[q]))
            if count[q] >= GRADES_FOR_OFFSET
            else Offset(0.0, spread**2, 0)
            for q, query in enumerate(ratings.answers.queries)
        }
        centres = {judge: float(self.theta[place]) for place, judge in enumerate(r.judges)}
        return Calibration(centres, width, spread, phi, offsets, len(r.y), r.ignored)


def _divergence(y: Floats, u: Floats) -> Floats:
    """KL(y ‖ σ(u)) of two coins."""
    return xlogy(y, y) + xlogy(1 - y, 1 - y) - y * log_expit(u) - (1 - y) * log_expit(-u)
