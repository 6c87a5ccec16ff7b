"""The likelihood and its optimum, batched over queries.

    P(judge g prefers i to j) = ε_g + (1 − 2ε_g) · F( a_g (e_i − e_j) + b_g·o ),   o = +1 if i was shown first, else −1
    e ~ N(0, 1/λ),  λ = 0.3

Rows are stored with the document shown first on the left, so o = +1 throughout. Fisher scoring takes e to the optimum:

    P' = (1 − 2ε) a F'(z)            z = a (e_l − e_r) + b
    score_i = Σ ± w (p − P) P' / (P (1 − P))  −  λ e_i
    information = Σ w P'² / (P (1 − P)) (u_l − u_r)(u_l − u_r)ᵀ  +  λ I

With the logistic link and ε = 0 this is Newton's method; otherwise the last steps use the observed information.
"""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF002, RUF003

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack
from scipy.special import xlogy

from zelo_train.rate.answers import Answers, Floats, Indices
from zelo_train.rate.link import Link

PRIOR = 0.3

# Numbers in a batch's information matrices: 4 MB, which stays in a core's cache better than more and still hides Python's cost.
BATCH_NUMBERS = 500_000
# Keeps P(1 − P) away from zero where F rounds to 0 or 1.
LEAST_PROBABILITY = 1e-15
MOST_STEPS = 100
# Once steps are shorter than this, Newton's method takes over where Fisher scoring would creep: three times as fast with flips.
NEAR = 0.3


@dataclass(frozen=True)
class JudgeTerms:
    """How one judge answers.

    Attributes:
        discrimination: a, how sharply a difference shows in its answers; the geometric mean over judges is 1.
        position: b, what being shown first adds, in logit units.
        flip: ε, how often an answer is turned round whatever the difference.
        answers: how many answers these were estimated from; 0 for given ones.
        note: what was not estimated and why.
    """

    discrimination: float = 1.0
    position: float = 0.0
    flip: float = 0.0
    answers: int = 0
    note: str = ""


@dataclass(frozen=True, eq=False)
class Fit:
    """Where the likelihood is highest.

    Attributes:
        e: (D) ratings, in `Answers.documents`' order; each query's sum to zero.
        variance: (D) of each e, the diagonal of the inverse Fisher information; nan when not asked for.
        steps: (Q) Fisher scoring steps taken.
    """

    e: Floats
    variance: Floats
    steps: Indices


def one_blas_thread() -> AbstractContextManager[object]:
    """Pins BLAS to one thread where threadpoolctl is installed: two are 3 to 23 times slower on 100 × 100 solves.

    Without threadpoolctl, set OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1 before Python starts.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(1, user_api="blas")
    return limits


def arrays_of(terms: tuple[JudgeTerms, ...]) -> tuple[Floats, Floats, Floats]:
    """(a, b, ε), each (G)."""
    a = np.array([term.discrimination for term in terms], np.float64)
    b = np.array([term.position for term in terms], np.float64)
    flip = np.array([term.flip for term in terms], np.float64)
    return a, b, flip


def fit(
    answers: Answers,
    terms: tuple[JudgeTerms, ...] | None = None,
    *,
    link: Link = Link.LOGISTIC,
    prior: float = PRIOR,
    variance: bool = True,
) -> Fit:
    """The ratings at the optimum of the penalised likelihood.

    Args:
        answers: what the judges said.
        terms: one per judge of `answers`; None for a = 1, b = ε = 0.
        link: F.
        prior: λ, the prior's precision; it keeps undefeated documents finite.
        variance: whether to compute variances, a fifth of the time.

    Where some ε > 0 the likelihood is not concave: the ratings at ε = 0 are the start, and the optimum is the one uphill from
    there.
    """
    a, b, flip = arrays_of(terms if terms is not None else (JudgeTerms(),) * len(answers.judges))
    e = np.zeros(len(answers.documents))
    spread = np.full(len(answers.documents), np.nan)
    steps = np.zeros(len(answers.queries), np.int64)
    with one_blas_thread():
        for batch in _batches(answers, a, b, flip):
            x = np.zeros((len(batch.queries), batch.width))
            if batch.flip.any():
                x, taken = _climb(batch.without_flips(), x, link, prior)
                steps[batch.queries] += taken
            x, taken = _climb(batch, x, link, prior)
            steps[batch.queries] += taken
            e[batch.place] = x[batch.real]
            if variance:
                spread[batch.place] = _variance(batch, x, link, prior)[batch.real]
    return Fit(e, spread, steps)


def covariance(
    answers: Answers,
    e: Floats,
    terms: tuple[JudgeTerms, ...] | None = None,
    *,
    link: Link = Link.LOGISTIC,
    prior: float = PRIOR,
) -> list[Floats]:
    """Per query the (n, n) covariance of its ratings: the inverse Fisher information at e."""
    a, b, flip = arrays_of(terms if terms is not None else (JudgeTerms(),) * len(answers.judges))
    found: list[Floats] = [np.zeros((0, 0))] * len(answers.queries)
    with one_blas_thread():
        for batch in _batches(answers, a, b, flip):
            x = np.zeros((len(batch.queries), batch.width))
            x[batch.real] = e[batch.place]
            inverse = _inverse(batch, x, link, prior)
            for row, query in enumerate(batch.queries):
                n = batch.sizes[row]
                found[query] = inverse[row, :n, :n]
    return found


@dataclass(frozen=True, eq=False)
class _Batch:
    """Queries of about one size: B of them, padded to `width` documents, with R answers."""

    queries: Indices  # (B)
    sizes: Indices  # (B)
    width: int
    real: NDArray[np.bool_]  # (B, width) whether there is such a document
    place: Indices  # where the real ones are in Answers.documents, row after row
    row: Indices  # (R) whose answer: 0 … B − 1
    left: Indices  # (R) into the flattened (B, width)
    right: Indices
    p: Floats
    weight: Floats
    a: Floats
    b: Floats
    flip: Floats

    def without_flips(self) -> _Batch:
        return _Batch(
            self.queries,
            self.sizes,
            self.width,
            self.real,
            self.place,
            self.row,
            self.left,
            self.right,
            self.p,
            self.weight,
            self.a,
            self.b,
            np.zeros_like(self.flip),
        )


def _batches(answers: Answers, a: Floats, b: Floats, flip: Floats) -> Iterator[_Batch]:
    sizes = answers.sizes
    order = np.argsort(sizes, kind="stable")
    first_row = np.searchsorted(answers.query, np.arange(len(sizes) + 1))
    begin = 0
    while begin < len(order):
        # Ascending sizes: the last query of a batch is its widest. Doubling finds the longest batch that fits.
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * int(sizes[order[end]]) ** 2 <= BATCH_NUMBERS:
            end += 1
        chosen = np.sort(order[begin:end])
        begin = end
        width = int(sizes[chosen].max(initial=0))
        if width == 0:
            continue
        counts = first_row[chosen + 1] - first_row[chosen]
        row = np.repeat(np.arange(len(chosen)), counts)
        answer = first_row[chosen][row] + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        shift = row * width - answers.start[chosen][row]
        real = np.arange(width) < sizes[chosen][:, None]
        judge = answers.judge[answer]
        yield _Batch(
            chosen,
            sizes[chosen],
            width,
            real,
            (answers.start[chosen][:, None] + np.arange(width))[real],
            row,
            answers.left[answer] + shift,
            answers.right[answer] + shift,
            answers.p[answer],
            answers.weight[answer],
            a[judge],
            b[judge],
            flip[judge],
        )


def _climb(batch: _Batch, x: Floats, link: Link, prior: float) -> tuple[Floats, Indices]:
    """Fisher scoring from x (B, width), halving a query's step where it led downhill."""
    canonical = link is Link.LOGISTIC and not batch.flip.any()
    newton = canonical
    steps = np.zeros(len(batch.queries), np.int64)
    previous, best = x, np.full(len(batch.queries), -np.inf)
    for _ in range(MOST_STEPS):
        # Newton's error after a step is about its square; Fisher scoring's only a share of it.
        enough = 1e-6 if newton else 1e-8
        score, information, height = _slope(batch, x, link, prior, observed=newton and not canonical)
        worse = height < best - 1e-10 * np.abs(best)
        if worse.any():
            x = np.where(worse[:, None], (x + previous) / 2, x)
            # A halved step is looked at again before the next one is taken.
            if np.abs(x - previous).max() > enough:
                continue
        best = np.maximum(best, height)
        previous = x
        step = _solve(information, score)
        if step is None:
            # The likelihood bends the wrong way here: Fisher's expectation never does.
            newton = False
            step = _solve(_slope(batch, x, link, prior)[1], score)
            assert step is not None
        x = x + step
        size = np.abs(step).max(axis=1)
        newton = canonical or size.max() < NEAR
        steps += size > enough
        if size.max() <= enough:
            break
    return x, steps


def _slope(batch: _Batch, x: Floats, link: Link, prior: float, *, observed: bool = False) -> tuple[Floats, Floats, Floats]:
    """Score (B, width), information (B, width, width; its lower triangle) and penalised log-likelihood (B) at x.

    The information is Fisher's, the expectation over answers; with `observed` it is that of the answers there are.
    """
    count, width = x.shape
    flat = x.ravel()
    z = batch.a * (flat[batch.left] - flat[batch.right]) + batch.b
    probability = link.probability(z)
    slope = batch.a * (probability * (1 - probability) if link is Link.LOGISTIC else link.density(z))
    if batch.flip.any():
        probability = batch.flip + (1 - 2 * batch.flip) * probability
        slope = (1 - 2 * batch.flip) * slope
    probability = np.clip(probability, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    pull = batch.weight * slope / (probability * (1 - probability))
    height = np.bincount(
        batch.row,
        batch.weight * (xlogy(batch.p, probability) + xlogy(1 - batch.p, 1 - probability)),
        minlength=count,
    )
    height = height - prior / 2 * (x * x).sum(axis=1)

    push = pull * (batch.p - probability)
    size = count * width
    score = np.bincount(batch.left, push, minlength=size) - np.bincount(batch.right, push, minlength=size) - prior * flat
    weight = pull * slope
    if observed:
        inner = link.bend(z) * batch.a**2 * (1 - 2 * batch.flip)
        spread = batch.p / probability**2 + (1 - batch.p) / (1 - probability) ** 2
        weight = (
            batch.weight * slope**2 * spread
            - batch.weight * (batch.p - probability) / (probability * (1 - probability)) * inner
        )
    return score.reshape(count, width), _information(batch, weight, prior), height


def _information(batch: _Batch, fisher: Floats, prior: float) -> Floats:
    """(B, width, width), lower triangle only; fisher: (R) w P'² / (P (1 − P))."""
    count, width = len(batch.queries), batch.width
    size = count * width
    low, high = np.minimum(batch.left, batch.right), np.maximum(batch.left, batch.right)
    at = high * width + low - batch.row * width
    information: Floats = np.bincount(at, -fisher, minlength=size * width).astype(np.float64, copy=False)
    information.reshape(size, width)[np.arange(size), np.tile(np.arange(width), count)] = (
        np.bincount(batch.left, fisher, minlength=size) + np.bincount(batch.right, fisher, minlength=size) + prior
    )
    return information.reshape(count, width, width)


def _solve(information: Floats, score: Floats) -> Floats | None:
    """The step of each query, None if an information is not positive definite; overwrites `information`."""
    step = np.empty_like(score)
    for row, (matrix, right) in enumerate(zip(information, score, strict=True)):
        # The lower triangle in C order is the upper one in LAPACK's: solved in place, without a copy.
        _, step[row], failed = lapack.dposv(matrix.T, right, lower=0, overwrite_a=1)
        if failed:
            return None
    return step


def _inverse(batch: _Batch, x: Floats, link: Link, prior: float) -> Floats:
    """(B, width, width) inverse information, both triangles."""
    _, information, _ = _slope(batch, x, link, prior)
    for matrix in information:
        _potri(matrix)
    lower = np.tri(batch.width, dtype=bool)
    return np.where(lower, information, information.transpose(0, 2, 1))


def _variance(batch: _Batch, x: Floats, link: Link, prior: float) -> Floats:
    """(B, width) diagonal of the inverse information."""
    _, information, _ = _slope(batch, x, link, prior)
    for matrix in information:
        _potri(matrix)
    return np.diagonal(information, axis1=1, axis2=2)


def _potri(matrix: Floats) -> None:
    """Replaces a lower triangle by its inverse's."""
    lapack.dpotrf(matrix.T, lower=0, overwrite_a=1, clean=0)
    lapack.dpotri(matrix.T, lower=0, overwrite_c=1)
