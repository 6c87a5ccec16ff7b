"""Every default of judging, rating and calibrating, justified by a command: `python -m zelo_train.simulate`.

Worlds with known truth and judges with known errors (`zelo_train.noise`); each table prints figures with their standard errors
over queries. They support claims about estimators under stated noise, never about LLM judges.
"""

# Formulas are written as the paper writes them; printing is what a command does.
# ruff: noqa: RUF001, RUF003

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import kendalltau

from zelo_train import chance
from zelo_train.evaluate.metrics import ndcg_of
from zelo_train.judge.pairs import Design, Plan, plan_round, shown, windows
from zelo_train.noise import NoisyJudge, document_keys, truth_from_qrels
from zelo_train.rate.answers import Answers, soft_clipped
from zelo_train.rate.calibration import Calibration, Weights, calibrate, grade_questions
from zelo_train.rate.fit import PRIOR, JudgeTerms, covariance, fit
from zelo_train.rate.judges import cross_fit, explained, normalised
from zelo_train.rate.link import Link
from zelo_train.rate.rating import Ratings
from zelo_train.records import Form, Grade, Question

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

FIRST_LINE = "Judges are simulated: what follows holds for estimators under stated noise, not for LLM judges."

# ---------------------------------------------------------------------------------------------------------------- worlds

# What a judge without errors grades 5, and how slowly its grades rise: gain = σ((s − ZERO)/WIDTH), that grade / 10.
ZERO, WIDTH = 3.8, 0.8

NOISY_ENSEMBLE = (
    NoisyJudge("first", 1.30, 0.3, 0.05, taste=0.5),
    NoisyJudge("second", 1.00, -0.2, 0.10, taste=0.5),
    NoisyJudge("third", 0.77, 0.5, 0.20, taste=0.5),
)
STEADY_ENSEMBLE = tuple(replace(judge, flip=0.0) for judge in NOISY_ENSEMBLE)
PAIRWISE_MODEL = (NoisyJudge("pairwise", 1.0, 0.1, taste=0.3, noise=1.2, form=Form.SOFT),)


@dataclass(frozen=True, eq=False)
class World:
    """Queries with known truth, and judges.

    Attributes:
        name: printed above its figures.
        truth: (Q, n) s in logit units.
        gains: (Q, n) what NDCG counts.
        keys: (Q, n) of (query, document), for the judges.
        judges: who answers.
        seed: of everything drawn.
        zero: the truth that is graded 5.
    """

    name: str
    truth: Floats
    gains: Floats
    keys: chance.Keys
    judges: tuple[NoisyJudge, ...]
    seed: int
    zero: float = ZERO

    @property
    def queries(self) -> tuple[str, ...]:
        """(Q) ids."""
        return tuple(f"q{q}" for q in range(len(self.truth)))

    @property
    def documents(self) -> tuple[str, ...]:
        """(n) ids, the same in every query."""
        return tuple(f"d{d}" for d in range(self.truth.shape[1]))


def _keys(queries: int, n: int) -> chance.Keys:
    return np.array([document_keys(f"q{q}", [f"d{d}" for d in range(n)]) for q in range(queries)])


def gain(truth: Floats, zero: float = ZERO) -> Floats:
    """The grade / 10 of a judge without errors."""
    return expit((truth - zero) / WIDTH)


def ensemble_world(queries: int = 200, seed: int = 0, judges: tuple[NoisyJudge, ...] = NOISY_ENSEMBLE, n: int = 100) -> World:
    """Three to twelve relevant documents, N(5, 2²), among others, N(0, 1.7²); three noisy voting judges, or any others."""
    keys = _keys(queries, n)
    relevant = 3 + np.floor(10 * _uniform(seed, "count", keys[:, :1]))
    truth = np.where(_drawn(seed, keys) < relevant, 5 + 2 * _normal(seed, "high", keys), 1.7 * _normal(seed, "low", keys))
    name = "pairwise model" if judges is PAIRWISE_MODEL else "noisy ensemble"
    return World(name, truth, gain(truth), keys, judges, seed)


def matched_world(queries: int = 200, seed: int = 0, n: int = 100, *, flips: bool = False) -> World:
    """Truth and three judges just as the likelihood has them: N(0, 1/λ), no taste."""
    judges = tuple(replace(judge, taste=0.0, flip=judge.flip if flips else 0.0) for judge in NOISY_ENSEMBLE)
    keys = _keys(queries, n)
    truth = _normal(seed, "truth", keys) / np.sqrt(PRIOR)
    return World("as the likelihood has it", truth, gain(truth), keys, judges, seed)


def few_relevant_world(queries: int = 200, seed: int = 0, n: int = 100) -> World:
    """Zero to eight relevant documents a query, N(5, 1.5²), above a floor whose height differs between queries."""
    keys = _keys(queries, n)
    relevant = np.floor(9 * _uniform(seed, "count", keys[:, :1]))
    low = _normal(seed, "floor", keys[:, :1]) + 1.5 * _normal(seed, "low", keys)
    truth = np.where(_drawn(seed, keys) < relevant, 5 + 1.5 * _normal(seed, "high", keys), low)
    return World("few relevant documents", truth, gain(truth, 3.5), keys, STEADY_ENSEMBLE, seed, 3.5)


def skewed_world(queries: int = 200, seed: int = 0, n: int = 100) -> World:
    """A long tail upwards, whose height and length differ between queries."""
    keys = _keys(queries, n)
    length = 1.2 + 0.8 * _uniform(seed, "length", keys[:, :1])
    truth = _normal(seed, "floor", keys[:, :1]) - length * np.log(_uniform(seed, "tail", keys))
    return World("skewed", truth, gain(truth, 3.5), keys, STEADY_ENSEMBLE, seed, 3.5)


def _uniform(seed: int, what: str, keys: chance.Keys) -> Floats:
    return chance.uniform(chance.mix(chance.key(seed, what), keys))


def _normal(seed: int, what: str, keys: chance.Keys) -> Floats:
    return chance.normal(chance.mix(chance.key(seed, what), keys))


def _drawn(seed: int, keys: chance.Keys) -> Indices:
    """(Q, n) each query's documents numbered at random."""
    return np.argsort(np.argsort(_uniform(seed, "order", keys), axis=1), axis=1)


def qrels_world(
    scores: Floats, grades: NDArray[np.int64] | Floats, judges: tuple[NoisyJudge, ...] = NOISY_ENSEMBLE, seed: int = 0
) -> World:
    """Real queries and their candidates, with truth drawn from qrels.

    Args:
        scores: (Q, n) first-stage scores of each query's candidates.
        grades: (Q, n) their grades in the qrels, 0 where those say nothing; NDCG's gains.
        judges: who answers.
        seed: of the simulation.
    """
    queries, n = scores.shape
    keys = _keys(queries, n)
    truth = [
        truth_from_qrels(own.astype(np.float64), score, key, seed) for own, score, key in zip(grades, scores, keys, strict=True)
    ]
    return World("truth from qrels", np.array(truth), np.maximum(grades, 0).astype(np.float64), keys, judges, seed)


# ---------------------------------------------------------------------------------------------------------------- asking


def ask(world: World, left: Indices, right: Indices, judge: Indices, weight: Floats | None = None) -> Answers:
    """Answers to questions; left, right: (K) places in the flattened truth, left shown first; judge: (K)."""
    p = np.empty(len(left))
    keys, truth = world.keys.ravel(), world.truth.ravel()
    for number, one in enumerate(world.judges):
        rows = judge == number
        p[rows] = one.compare(world.seed, keys[left[rows]], keys[right[rows]], truth[left[rows]], truth[right[rows]])
    return answers_at(world, left, right, judge, soft_clipped(p), np.ones(len(left)) if weight is None else weight)


def answers_at(world: World, left: Indices, right: Indices, judge: Indices, p: Floats, weight: Floats) -> Answers:
    """The arrays that `fit` reads."""
    queries, n = world.truth.shape
    order = np.argsort(left // n, kind="stable")
    return Answers(
        world.queries,
        world.documents * queries,
        np.arange(queries + 1) * n,
        tuple(one.name for one in world.judges),
        (left // n)[order],
        left[order],
        right[order],
        judge[order],
        p[order],
        weight[order],
    )


def questions(world: World, plans: Mapping[int, Sequence[Plan]], both_orders: bool = False) -> tuple[Indices, Indices, Indices]:
    """(left, right, judge) of everything that the plans of each query (by its number) ask."""
    n = world.truth.shape[1]
    rows = []
    for q, own in plans.items():
        for number, one in enumerate(world.judges):
            for _, comparison in shown(one.name, own, world.seed):
                pair = (q * n + int(comparison.left[1:]), q * n + int(comparison.right[1:]))
                rows.append((*pair, number))
                if both_orders:
                    rows.append((*reversed(pair), number))
    left, right, judge = np.array(rows, np.int64).T
    return left, right, judge


def every_pair(world: World) -> Answers:
    """All pairs, each in one order drawn by key, asked of every judge."""
    queries, n = world.truth.shape
    i, j = np.triu_indices(n, 1)
    left, right = (np.arange(queries)[:, None] * n + side for side in (i, j))
    left, right = left.ravel(), right.ravel()
    turn = chance.uniform(chance.mix(world.keys.ravel()[left], world.keys.ravel()[right])) < 0.5
    left, right = np.where(turn, right, left), np.where(turn, left, right)
    judges = len(world.judges)
    return ask(world, np.tile(left, judges), np.tile(right, judges), np.repeat(np.arange(judges), len(left)))


def judged(world: World, design: Design, rounds: int = 3, degree: int = 8, pairs: int | None = None) -> Answers:
    """What the judges say when pairs are chosen by this design; `pairs` cuts the plan of each query."""
    n = world.truth.shape[1]
    plans: dict[int, list[Plan]] = {q: [] for q in range(len(world.truth))}
    answers, e, sigma = None, np.zeros(world.truth.shape), None
    while True:
        new = 0
        for q, own in plans.items():
            plan = plan_round(
                design,
                world.queries[q],
                world.documents,
                own,
                ratings=e[q] if answers is not None else None,
                covariance=sigma[q] if sigma is not None else None,
                rounds=rounds,
                degree=degree,
                seed=world.seed,
            )
            left = (pairs or n * n) - sum(len(earlier.pairs) for earlier in own)
            if plan is not None and left > 0:
                own.append(replace(plan, pairs=plan.pairs[:left]))
                new += 1
        if not new:
            assert answers is not None
            return answers
        answers = ask(world, *questions(world, plans))
        e = rated(world, answers)
        if design is Design.INFORMATION:
            sigma = covariance(answers, e.ravel())


def rated(world: World, answers: Answers, terms: tuple[JudgeTerms, ...] | None = None) -> Floats:
    """(Q, n) ratings."""
    return fit(answers, terms, variance=False).e.reshape(world.truth.shape)


def true_terms(world: World) -> tuple[JudgeTerms, ...]:
    """What the estimates should be, with mean log a = 0."""
    terms = tuple(JudgeTerms(one.discrimination, one.position, one.flip) for one in world.judges)
    return normalised(terms, [True] * len(terms))


def joint_fit(answers: Answers, rounds: int = 10) -> tuple[JudgeTerms, ...]:
    """The judges' terms estimated on the very answers that the ratings were fitted to: the comparison for cross-fitting."""
    terms = tuple(JudgeTerms() for _ in answers.judges)
    for _ in range(rounds):
        e = fit(answers, terms, variance=False).e
        d = e[answers.left] - e[answers.right]
        found = []
        for judge in range(len(answers.judges)):
            own = answers.judge == judge
            found.append(explained(d[own], answers.p[own], answers.weight[own], Link.LOGISTIC, flips=True))
        terms = normalised(tuple(found), [True] * len(found))
    return terms


# --------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """A mean over queries and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"

    @property
    def fine(self) -> str:
        """With a sign and a fourth decimal, for differences."""
        return f"{self.mean:+.4f} ± {self.error:.4f}"

    @classmethod
    def over(cls, values: Floats) -> Figure:
        """Of one value per query."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))))


def quality(world: World, e: Floats) -> dict[str, Figure]:
    """NDCG@10 and Kendall's τ of ratings against the truth."""
    tau = np.array([kendalltau(own, truth).statistic for own, truth in zip(e, world.truth, strict=True)])
    return {"NDCG@10": Figure.over(ndcg_of(e, world.gains)), "Kendall τ": Figure.over(tau)}


@dataclass(frozen=True, eq=False)
class Table:
    """Named rows of named figures."""

    title: str
    rows: Mapping[str, Mapping[str, object]]

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        cells = [
            ["", *columns],
            *([name, *(str(row.get(column, "")) for column in columns)] for name, row in self.rows.items()),
        ]
        widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([self.title, *lines])


def pairs_table(queries: int, seed: int) -> list[Table]:
    """Which pairs: the paper's cycles against the adaptive designs."""
    tables = []
    for judges in (NOISY_ENSEMBLE, PAIRWISE_MODEL):
        world = ensemble_world(queries, seed, judges)
        rows: dict[str, Mapping[str, object]] = {}
        for degree in (2, 4, 8, 16):
            rows[f"random cycles, {50 * degree}"] = quality(world, rated(world, judged(world, Design.CYCLES, degree=degree)))
        for rounds in (2, 3, 4):
            answers = judged(world, Design.NEIGHBOURS, rounds=rounds)
            rows[f"cycle + neighbours, {rounds} rounds, {100 * rounds}"] = quality(world, rated(world, answers))
        for pairs in (150, 200, 300, 375):
            answers = judged(world, Design.INFORMATION, rounds=20, pairs=pairs)
            rows[f"top-weighted information gain, {pairs}"] = quality(world, rated(world, answers))
        rows["all pairs, 4,950"] = quality(world, rated(world, every_pair(world)))
        tables.append(Table(f"pairs per query, {world.name}", rows))
    # No group of relevant documents that stands out: what the neighbours' gain over cycles comes down to.
    world = matched_world(queries, seed, flips=True)
    rows = {
        "random cycles, 400": quality(world, rated(world, judged(world, Design.CYCLES))),
        "cycle + neighbours, 3 rounds, 300": quality(world, rated(world, judged(world, Design.NEIGHBOURS))),
        "cycle + neighbours, 4 rounds, 400": quality(world, rated(world, judged(world, Design.NEIGHBOURS, rounds=4))),
    }
    tables.append(Table("pairs per query, noisy ensemble, normally distributed truth", rows))
    return tables


def orders_table(queries: int, seed: int) -> list[Table]:
    """400 questions a judge: 400 pairs in one order, or 200 pairs in both."""
    rows: dict[str, Mapping[str, object]] = {}
    for judges in (NOISY_ENSEMBLE, PAIRWISE_MODEL):
        world = ensemble_world(queries, seed, judges)
        terms = true_terms(world)
        plans = {
            degree: {
                q: [plan_round(Design.CYCLES, name, world.documents, degree=degree, seed=seed)]
                for q, name in enumerate(world.queries)
            }
            for degree in (4, 8)
        }
        for name, degree, both in (("400 pairs, one order", 8, False), ("200 pairs, both orders", 4, True)):
            answers = ask(world, *questions(world, plans[degree], both))  # type: ignore[arg-type]
            position = tuple(JudgeTerms(position=term.position) for term in terms)
            rows[f"{world.name}: {name}"] = quality(world, rated(world, answers, position))
    return [Table("one order against both, at equal cost", rows)]


def soft_table(queries: int, seed: int) -> list[Table]:
    """Probabilities against votes at equal calls."""
    rows: dict[str, Mapping[str, object]] = {}
    for judges in (NOISY_ENSEMBLE, PAIRWISE_MODEL):
        for form in (Form.VOTE, Form.SOFT):
            world = replace(ensemble_world(queries, seed, judges), judges=tuple(replace(judge, form=form) for judge in judges))
            name = ensemble_world(1, seed, judges).name
            rows[f"{name}, {form.value}"] = quality(world, rated(world, judged(world, Design.NEIGHBOURS)))
    return [Table("soft answers against votes, cycle + neighbours, 300", rows)]


def lists_table(queries: int, seed: int) -> list[Table]:
    """Lists of ten against pairs: documents read for equal quality."""
    world = ensemble_world(queries, seed)
    n, judges = world.truth.shape[1], len(world.judges)
    rows: dict[str, Mapping[str, object]] = {}
    for rounds in (1, 2, 3, 4):
        answers = judged(world, Design.NEIGHBOURS, rounds=rounds)
        read = round(2 * len(answers.p) / (queries * judges))
        rows[f"pairs, {rounds} rounds"] = {"documents read": read, **quality(world, rated(world, answers))}
    e: Floats | None = None
    found: list[tuple[int, int, int, float, float]] = []
    read = 0
    for number in (1, 2, 3, 4):
        for q, query in enumerate(world.queries):
            for question in windows(query, world.documents, 10, number, None if e is None else e[q], seed):
                at = np.array([int(document[1:]) for document in question.documents])
                read += len(at)
                for judge, one in enumerate(world.judges):
                    place = np.argsort(one.order(seed, world.keys[q, at], world.truth[q, at]))
                    found += [
                        (q * n + int(at[i]), q * n + int(at[j]), judge, float(place[i] < place[j]), 2 / len(at))
                        for i in range(len(at))
                        for j in range(i + 1, len(at))
                    ]
        left, right, judge_of, p, weight = (np.array(column) for column in zip(*found, strict=True))
        e = rated(world, answers_at(world, left, right, judge_of, p, weight))
        rows[f"lists of ten, {number} rounds"] = {"documents read": read // queries, **quality(world, e)}
    return [Table("lists against pairs, noisy ensemble", rows)]


def judges_table(queries: int, seed: int) -> list[Table]:
    """The judges' terms: fixed, joint, cross-fitted, true; and what each does to the ratings."""
    world = ensemble_world(queries, seed)
    rows: dict[str, Mapping[str, object]] = {}
    for design, degree in ((Design.CYCLES, 8), (Design.NEIGHBOURS, 0)):
        answers = judged(world, design, degree=degree)
        crossed = cross_fit(answers, seed=seed)
        settings = {
            "fixed (1, 0, 0)": tuple(JudgeTerms() for _ in world.judges),
            "joint": joint_fit(answers),
            "cross-fitted": crossed,
            "cross-fitted, no flips": tuple(replace(term, flip=0.0) for term in crossed),
            "true": true_terms(world),
        }
        for name, terms in settings.items():
            rows[f"{design.value}: {name}"] = {
                "a": " / ".join(f"{term.discrimination:.2f}" for term in terms),
                "b": " / ".join(f"{term.position:+.2f}" for term in terms),
                "ε": " / ".join(f"{term.flip:.2f}" for term in terms),
                **quality(world, rated(world, answers, terms)),
            }
    return [Table("judge terms, noisy ensemble", rows)]


def coverage_table(queries: int, seed: int) -> list[Table]:
    """How often 95 % intervals hold the truth, centred within its query as ratings are."""
    rows: dict[str, Mapping[str, object]] = {}
    for judges in (NOISY_ENSEMBLE, PAIRWISE_MODEL):
        world = ensemble_world(queries, seed, judges)
        for design in (Design.CYCLES, Design.NEIGHBOURS):
            answers = judged(world, design)
            rows[f"{world.name}, {design.value}"] = covered(world, answers, cross_fit(answers, seed=seed))
    for name, flips in (("no flips", False), ("with flips", True)):
        matched = matched_world(queries, seed, flips=flips)
        for design in (Design.CYCLES, Design.NEIGHBOURS):
            found = covered(matched, judged(matched, design), true_terms(matched))
            rows[f"as the likelihood has it, {name}, {design.value}"] = found
    return [Table("coverage of 95 % intervals", rows)]


def covered(world: World, answers: Answers, terms: tuple[JudgeTerms, ...]) -> dict[str, Figure]:
    """Coverage over all documents, and over those estimated to be the top ten and top five."""
    found = fit(answers, terms)
    e, error = found.e.reshape(world.truth.shape), np.sqrt(found.variance).reshape(world.truth.shape)
    truth = world.truth - world.truth.mean(axis=1, keepdims=True)
    # Ratings are in the judges' units: their mean log a is 0, so the truth's unit is theirs times the mean discrimination.
    truth = truth * np.exp(np.mean([np.log(judge.discrimination) for judge in world.judges]))
    inside = np.abs(e - truth) <= 1.96 * error
    order = np.argsort(-e, axis=1)
    top = np.take_along_axis(inside, order, axis=1)
    return {
        "all": Figure.over(inside.mean(axis=1)),
        "estimated top ten": Figure.over(top[:, :10].mean(axis=1)),
        "estimated top five": Figure.over(top[:, :5].mean(axis=1)),
    }


# ----------------------------------------------------------------------------------------------------------- calibration

# Grades rise more slowly than gains: a judge's 3 and 7 lie further apart than "not relevant" and "relevant".
GRADE_WIDTH, GRADE_NOISE = 1.6, 0.5


def ratings_of(world: World, answers: Answers, terms: tuple[JudgeTerms, ...] | None = None) -> Ratings:
    """The world's ratings as `rate` gives them."""
    terms = terms if terms is not None else tuple(JudgeTerms() for _ in world.judges)
    found = fit(answers, terms)
    named = dict(zip(answers.judges, terms, strict=True))
    return Ratings(answers, found.e, np.sqrt(found.variance), named, (), Link.LOGISTIC, PRIOR, False)


def graded(world: World, asked: Sequence[Question]) -> list[Grade]:
    """Every judge's grades of these documents; judges differ in what they grade 5."""
    place = {query: q for q, query in enumerate(world.queries)}
    q = np.array([place[question.query] for question in asked])
    d = np.array([int(question.documents[0][1:]) for question in asked])
    found = []
    for number, judge in enumerate(world.judges):
        zero = world.zero + 0.4 * (number - 1)
        values = judge.grade(world.seed, world.keys[q, d], world.truth[q, d], zero=zero, width=GRADE_WIDTH, noise=GRADE_NOISE)
        found += [
            Grade(judge.name, question.query, question.documents[0], float(value))
            for question, value in zip(asked, values, strict=True)
        ]
    return found


def at_ranks(ratings: Ratings, ranks: Sequence[int]) -> list[Question]:
    """GRADE questions about the documents at these rating ranks."""
    every = {query: ratings.of(query) for query in ratings.answers.queries}
    kind = grade_questions(ratings)[0].kind
    return [Question(kind, (query,), (best[rank - 1].document,)) for query, best in every.items() for rank in ranks]


def best_measured(ratings: Ratings, count: int = 4) -> list[Question]:
    """GRADE questions about each query's documents with the smallest standard errors."""
    kind = grade_questions(ratings)[0].kind
    return [
        Question(kind, (query,), (rating.document,))
        for query in ratings.answers.queries
        for rating in sorted(ratings.of(query), key=lambda rating: rating.standard_error)[:count]
    ]


def comparable(world: World, e: Floats, y: Floats, seed: int) -> dict[str, object]:
    """How well y tells documents of different queries apart.

    Returns:
        The share of cross-query pairs in the true order, among the true top tens and over all documents, and the best F1 that
        one cut-off on y reaches over all documents, relevant meaning a true gain of .5.
    """
    draw = np.random.default_rng(seed)
    top = np.argsort(-world.truth, axis=1)[:, :10]
    figures: dict[str, object] = {
        "cross-query accuracy, top ten": _across(draw, np.take_along_axis(world.truth, top, 1), np.take_along_axis(y, top, 1)),
        "all documents": _across(draw, world.truth, y),
    }
    relevant = (world.gains >= 0.5).ravel()
    figures["best F1"] = f"{_best_f1(y.ravel(), relevant):.3f}"
    return figures


def _across(draw: np.random.Generator, truth: Floats, y: Floats, per_query: int = 200) -> Figure:
    queries, n = truth.shape
    other = (np.arange(queries)[:, None] + draw.integers(1, queries, (queries, per_query))) % queries
    i, j = draw.integers(n, size=(2, queries, per_query))
    own = np.arange(queries)[:, None]
    right = (truth[own, i] > truth[other, j]) == (y[own, i] > y[other, j])
    return Figure.over(right.mean(axis=1))


def _best_f1(y: Floats, relevant: NDArray[np.bool_]) -> float:
    order = np.argsort(-y, kind="stable")
    hits = np.cumsum(relevant[order])
    f1 = 2 * hits / (np.arange(1, len(y) + 1) + relevant.sum())
    # A cut-off cannot part equal values.
    ends = np.append(np.diff(y[order]) != 0, True)
    return float(f1[ends].max())


def calibration_table(queries: int, seed: int) -> list[Table]:
    """Which documents are graded, and what that gives."""
    tables = []
    for world in (few_relevant_world(queries, seed), skewed_world(queries, seed)):
        answers = judged(world, Design.NEIGHBOURS)
        ratings = ratings_of(world, answers, cross_fit(answers, seed=seed))
        e = ratings.values.reshape(world.truth.shape)
        rows: dict[str, Mapping[str, object]] = {"none": comparable(world, e, e, seed)}
        asked: dict[str, Callable[[], Sequence[Question]]] = {
            "rank 1": lambda: at_ranks(ratings, (1,)),  # noqa: B023
            "ranks 1, 10": lambda: at_ranks(ratings, (1, 10)),  # noqa: B023
            "ranks 1, 2, 3, 4": lambda: at_ranks(ratings, (1, 2, 3, 4)),  # noqa: B023
            "best measured four": lambda: best_measured(ratings),  # noqa: B023
            "ranks 1, 4, 10, 20": lambda: grade_questions(ratings),  # noqa: B023
            "ranks 1, 34, 67, 100": lambda: at_ranks(ratings, (1, 34, 67, 100)),  # noqa: B023
        }
        for name, which in asked.items():
            found = calibrate(ratings, graded(world, which()))
            y = placed(world, ratings, found)
            rows[name] = {**comparable(world, e, y, seed), "σ_b": f"{found.spread:.2f}", "T": f"{found.width:.2f}"}
        centre = world.truth.mean(axis=1, keepdims=True)
        rows["true offsets"] = comparable(world, e, e + centre, seed)
        tables.append(Table(f"calibration, {world.name}", rows))
    return tables


def placed(world: World, ratings: Ratings, found: Calibration) -> Floats:
    """(Q, n) targets."""
    return found.relevance(ratings).reshape(world.truth.shape)


def weights_table(queries: int, seed: int, features: int = 24) -> list[Table]:
    """Equal weights against 1/SE² in training, on new queries: a linear student that sees the truth but for one sixth.

    The student is trained by cross-entropy with calibrated targets, and ranks as many other queries.
    """
    rows: dict[str, Mapping[str, object]] = {}
    for make in (few_relevant_world, skewed_world):
        world, other = make(queries, seed), make(queries, seed + 1)
        answers = judged(world, Design.NEIGHBOURS)
        ratings = ratings_of(world, answers, cross_fit(answers, seed=seed))
        calibration = calibrate(ratings, graded(world, grade_questions(ratings)))
        both: tuple[Weights, ...] = ("equal", "precision")
        targets = {name: calibration.targets(ratings, weights=name, simulated=True) for name in both}
        seen, new = _features(world, features), _features(other, features)
        found = {}
        for name, own in targets.items():
            student = _student(seen, np.array([t.relevance for t in own]), np.array([t.weight for t in own]))
            found[name] = ndcg_of((new @ student).reshape(other.truth.shape), other.gains)
        rows[world.name] = {
            "equal": Figure.over(found["equal"]),
            "1/SE²": Figure.over(found["precision"]),
            "difference": Figure.over(found["precision"] - found["equal"]).fine,
        }
    return [Table("NDCG@10 of a student, by weights of the targets", rows)]


def _features(world: World, count: int) -> Floats:
    """(Q·n, count + 1): what a student sees of a document; a fixed direction of it is the truth, but for some noise."""
    draw = np.random.default_rng(0)
    direction = draw.normal(size=count)
    direction /= np.linalg.norm(direction)
    noise = np.random.default_rng(world.seed).normal(size=(world.truth.size, count)) * 2
    visible = world.truth.ravel() + 0.4 * world.truth.std() * _normal(world.seed, "unseen", world.keys).ravel()
    seen = noise + np.outer(visible - noise @ direction, direction)
    # A bend, so that no linear student is perfect and what it spends its effort on matters.
    seen = seen + 0.15 * np.abs(seen) * np.sign(draw.normal(size=count))
    return np.column_stack([seen, np.ones(len(seen))])


def _student(x: Floats, y: Floats, weight: Floats, ridge: float = 1.0) -> Floats:
    """Weights of a logistic regression on soft targets, by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(30):
        mean = expit(x @ w)
        step = np.linalg.solve(
            (x * (weight * mean * (1 - mean))[:, None]).T @ x + ridge * np.eye(len(w)), x.T @ (weight * (y - mean)) - ridge * w
        )
        w = w + step
        if np.abs(step).max() < 1e-9:
            break
    return w


def real_table(scores: Floats, grades: NDArray[np.int64] | Floats, name: str, seed: int = 0) -> Table:
    """NDCG@10 of ratings against qrels by judged pairs per query, on real candidates.

    The judges are simulated: their truth is drawn from these very qrels (see `truth_from_qrels`), so the figures show how many
    pairs a design needs under stated noise, not how well any judge would do.

    Args:
        scores: (Q, n) first-stage scores of each query's candidates; only queries with a relevant candidate tell anything.
        grades: (Q, n) their grades in the qrels.
        name: of the collection.
        seed: of the simulation.
    """
    told = (grades > 0).any(axis=1)
    world = qrels_world(scores[told], grades[told], seed=seed)
    rows: dict[str, Mapping[str, object]] = {"first stage": {"NDCG@10": Figure.over(ndcg_of(scores[told], world.gains))}}
    for degree in (2, 4, 8):
        answers = judged(world, Design.CYCLES, degree=degree)
        rows[f"cycles, degree {degree}"] = {"NDCG@10": Figure.over(ndcg_of(rated(world, answers), world.gains))}
    for rounds in (2, 3, 4):
        answers = judged(world, Design.NEIGHBOURS, rounds=rounds)
        rows[f"cycle + neighbours, {rounds} rounds"] = {"NDCG@10": Figure.over(ndcg_of(rated(world, answers), world.gains))}
    rows["truth"] = {"NDCG@10": Figure.over(ndcg_of(world.truth, world.gains))}
    return Table(f"{name}, judges simulated from its qrels, {int(told.sum())} queries of {scores.shape[1]} candidates", rows)


TABLES: dict[str, Callable[[int, int], list[Table]]] = {
    "pairs": pairs_table,
    "orders": orders_table,
    "soft": soft_table,
    "lists": lists_table,
    "judges": judges_table,
    "coverage": coverage_table,
    "calibration": calibration_table,
    "weights": weights_table,
}


def show(table: str, queries: int, seed: int) -> None:
    """Print a table, or "all" of them."""
    print(FIRST_LINE)
    print(f"{queries} queries of 100 documents, seed {seed}; ± is the standard error over queries.")
    for name in TABLES if table == "all" else (table,):
        for found in TABLES[name](queries, seed):
            print(f"\n{found}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the tables asked for, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m zelo_train.simulate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", choices=[*TABLES, "all"], default="all", help="which table to print")
    parser.add_argument("--queries", type=int, default=100, help="simulated queries of 100 documents (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    chosen = parser.parse_args(arguments)
    show(chosen.table, chosen.queries, chosen.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
