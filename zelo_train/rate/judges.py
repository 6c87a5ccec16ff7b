"""Each judge's discrimination a, position effect b and flip rate ε, by cross-fitting.

Estimated together with the ratings, a, b and ε explain answers that the ratings were fitted to, and come out far off. So each
answer is explained by ratings that have not seen its pair:

    e at a = 1, b = ε = 0
    five folds by pair → e without the fold → (a, b, ε) on the held-out differences → mean log a = 0
    again with the new terms: four rounds at most, or until nothing changes by .01

    log a ~ N(0, .5²),  b ~ N(0, 1),  ε / .4 ~ Beta(2, 6)
"""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF002

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from zelo_train import chance
from zelo_train.rate.answers import Answers, Floats, Indices
from zelo_train.rate.fit import PRIOR, JudgeTerms, fit
from zelo_train.rate.link import Link

FOLDS = 5
ROUNDS = 4
SETTLED = 0.01
# Below these a judge keeps b = 0, or a = 1 and ε = 0.
ANSWERS_FOR_POSITION = 200
ANSWERS_FOR_DISCRIMINATION = 2_000
QUERIES_FOR_DISCRIMINATION = 20
# At 400 answers a query the terms' standard errors are then below .01; more queries cost time and change no rating.
MOST_QUERIES = 500

LOG_A_SPREAD = 0.5
POSITION_SPREAD = 1.0
MOST_FLIPS = 0.4
FLIPS_ALPHA, FLIPS_BETA = 2.0, 6.0
_LEAST_FLIPS = 1e-4


@dataclass(frozen=True)
class _Free:
    """Which terms of a judge its answers can determine."""

    position: bool
    discrimination: bool
    note: str


def cross_fit(
    answers: Answers, *, link: Link = Link.LOGISTIC, prior: float = PRIOR, seed: int = 0, rounds: int = ROUNDS
) -> tuple[JudgeTerms, ...]:
    """The terms of each judge of `answers`.

    b needs 200 answers; a and ε need 2,000 over 20 queries; ε is admitted only where it lowers the held-out log-loss by more
    than that difference's standard error over queries. `JudgeTerms.note` says what was left at a = 1, b = 0 or ε = 0 and why.
    Of more than 500 queries, 500 drawn by seed are used.
    """
    if len(answers.queries) > MOST_QUERIES:
        drawn = chance.mix(chance.key(seed, "terms"), np.array([chance.key(query) for query in answers.queries], np.uint64))
        answers = answers.of_queries(np.sort(np.argsort(drawn, kind="stable")[:MOST_QUERIES]))
    free = [_free(answers, judge) for judge in range(len(answers.judges))]
    terms = tuple(JudgeTerms() for _ in free)
    if not any(judge.position for judge in free):
        return tuple(replace(term, note=judge.note) for term, judge in zip(terms, free, strict=True))
    fold = folds(answers, seed)
    for _ in range(rounds):
        before = terms
        difference = held_out(answers, fold, terms, link, prior)
        found = [
            _terms(answers, judge, difference, fold, free[judge], link) if free[judge].position else JudgeTerms()
            for judge in range(len(free))
        ]
        terms = normalised(tuple(found), [judge.discrimination for judge in free])
        if _change(before, terms) < SETTLED:
            break
    counts = np.bincount(answers.judge, minlength=len(free))
    return tuple(
        replace(term, answers=int(count), note="; ".join(filter(None, (judge.note, term.note))))
        for term, judge, count in zip(terms, free, counts, strict=True)
    )


def folds(answers: Answers, seed: int) -> Indices:
    """(K) the fold of each answer; all judges' answers to a pair, in both orders, share one."""
    keys = answers.keys()
    left, right = keys[answers.left], keys[answers.right]
    pair = chance.mix(chance.key(seed, "fold"), np.minimum(left, right), np.maximum(left, right))
    return (pair % np.uint64(FOLDS)).astype(np.int64)


def held_out(answers: Answers, fold: Indices, terms: tuple[JudgeTerms, ...], link: Link, prior: float) -> Floats:
    """(K) e_left − e_right for each answer, from ratings fitted without its fold."""
    difference = np.empty(len(answers.p))
    for out in range(FOLDS):
        rows = fold == out
        e = fit(answers.only(~rows), terms, link=link, prior=prior, variance=False).e
        difference[rows] = e[answers.left[rows]] - e[answers.right[rows]]
    return difference


def normalised(terms: tuple[JudgeTerms, ...], estimated: list[bool]) -> tuple[JudgeTerms, ...]:
    """The same terms with mean log a = 0 over the judges whose a was estimated; one judge alone has a = 1."""
    logs = [np.log(term.discrimination) for term, free in zip(terms, estimated, strict=True) if free]
    mean = float(np.mean(logs)) if logs else 0.0
    return tuple(
        replace(term, discrimination=float(term.discrimination / np.exp(mean))) if free else term
        for term, free in zip(terms, estimated, strict=True)
    )


def _free(answers: Answers, judge: int) -> _Free:
    own = answers.judge == judge
    count, queries = int(own.sum()), len(np.unique(answers.query[own]))
    if count < ANSWERS_FOR_POSITION:
        return _Free(False, False, f"a = 1, b = ε = 0: {count} answers, and b needs {ANSWERS_FOR_POSITION:,}")
    if count < ANSWERS_FOR_DISCRIMINATION or queries < QUERIES_FOR_DISCRIMINATION:
        needed = f"{ANSWERS_FOR_DISCRIMINATION:,} over {QUERIES_FOR_DISCRIMINATION} queries"
        return _Free(True, False, f"a = 1, ε = 0: {count:,} answers over {queries} queries, and they need {needed}")
    return _Free(True, True, "")


def _terms(answers: Answers, judge: int, difference: Floats, fold: Indices, free: _Free, link: Link) -> JudgeTerms:
    """One judge's terms on the held-out differences."""
    own = answers.judge == judge
    d, p, weight = difference[own], answers.p[own], answers.weight[own]
    if not free.discrimination:
        return explained(d, p, weight, link, discrimination=False, flips=False)
    plain = explained(d, p, weight, link)
    flipping = explained(d, p, weight, link, flips=True, start=plain)
    # Would terms with flips, learnt on the other folds, tell this fold's answers better?
    gain = np.empty(len(d))
    for out in range(FOLDS):
        rows = fold[own] == out
        seen = ~rows
        without = explained(d[seen], p[seen], weight[seen], link, start=plain)
        with_flips = explained(d[seen], p[seen], weight[seen], link, flips=True, start=flipping)
        gain[rows] = weight[rows] * (_loss(without, d[rows], p[rows], link) - _loss(with_flips, d[rows], p[rows], link))
    # A query's answers share its ratings' errors: the standard error is over queries.
    _, query = np.unique(answers.query[own], return_inverse=True)
    gains = np.bincount(query, gain)
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    if gains.mean() > error:
        return flipping
    return replace(plain, note="ε = 0: flips do not lower the held-out log-loss by more than its standard error")


def explained(
    d: Floats,
    p: Floats,
    weight: Floats,
    link: Link,
    *,
    discrimination: bool = True,
    flips: bool = False,
    start: JudgeTerms | None = None,
) -> JudgeTerms:
    """The (a, b, ε) of highest posterior that explain answers p by differences d; terms not asked for stay at 1, 0, 0."""
    start = start if start is not None else JudgeTerms()

    def cost(theta: NDArray[np.float64]) -> tuple[float, Any]:
        log_a, b, flip = theta
        a = np.exp(log_a)
        z = a * d + b
        inner = link.probability(z)
        outer = np.clip(flip + (1 - 2 * flip) * inner, 1e-12, 1 - 1e-12)
        push = weight * (p - outer) / (outer * (1 - outer))
        by_z = push * (1 - 2 * flip) * link.density(z)
        value = -np.sum(weight * (p * np.log(outer) + (1 - p) * np.log(1 - outer)))
        value += log_a**2 / (2 * LOG_A_SPREAD**2) + b**2 / (2 * POSITION_SPREAD**2)
        slope = np.array(
            [
                -np.sum(by_z * a * d) + log_a / LOG_A_SPREAD**2,
                -np.sum(by_z) + b / POSITION_SPREAD**2,
                -np.sum(push * (1 - 2 * inner)),
            ]
        )
        if flips:
            share = flip / MOST_FLIPS
            value -= (FLIPS_ALPHA - 1) * np.log(share) + (FLIPS_BETA - 1) * np.log(1 - share)
            slope[2] -= (FLIPS_ALPHA - 1) / flip - (FLIPS_BETA - 1) / (MOST_FLIPS - flip)
        return float(value), slope

    bounds = [
        (-3.0, 3.0) if discrimination else (0.0, 0.0),
        (-5.0, 5.0),
        (_LEAST_FLIPS, MOST_FLIPS - _LEAST_FLIPS) if flips else (0.0, 0.0),
    ]
    first = [
        np.log(start.discrimination) if discrimination else 0.0,
        start.position,
        (start.flip or MOST_FLIPS * (FLIPS_ALPHA - 1) / (FLIPS_ALPHA + FLIPS_BETA - 2)) if flips else 0.0,
    ]
    log_a, b, flip = minimize(cost, first, jac=True, bounds=bounds, method="L-BFGS-B").x
    return JudgeTerms(float(np.exp(log_a)), float(b), float(flip))


def _loss(terms: JudgeTerms, d: Floats, p: Floats, link: Link) -> Floats:
    probability = link.probability(terms.discrimination * d + terms.position)
    probability = np.clip(terms.flip + (1 - 2 * terms.flip) * probability, 1e-12, 1 - 1e-12)
    return -(p * np.log(probability) + (1 - p) * np.log(1 - probability))


def _change(before: tuple[JudgeTerms, ...], after: tuple[JudgeTerms, ...]) -> float:
    return max(
        max(abs(np.log(new.discrimination / old.discrimination)), abs(new.position - old.position), abs(new.flip - old.flip))
        for old, new in zip(before, after, strict=True)
    )
