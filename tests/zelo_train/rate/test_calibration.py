"""Calibration: the marginal likelihood against quadrature, its recovery of a known scale, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import check_grad
from scipy.special import expit

from zelo_train.errors import TooFewAnswers
from zelo_train.rate import (
    JudgeTerms,
    Link,
    Ratings,
    audit,
    calibrate,
    calibrate_across,
    grade_questions,
    graded_ranks,
    grades,
    rate,
)
from zelo_train.rate.answers import Answers
from zelo_train.rate.calibration import _rows, _Scale, precision, slope
from zelo_train.records import Form, Grade, Judgment, Kind, Preference, Question, Status


def invented(queries: int, n: int = 20, seed: int = 0, error: float = 0.5) -> Ratings:
    """Ratings with known standard errors."""
    draw = np.random.default_rng(seed)
    e = draw.normal(size=(queries, n)) * 1.5
    e -= e.mean(axis=1, keepdims=True)
    empty = np.zeros(0, np.int64)
    answers = Answers(
        tuple(f"q{q}" for q in range(queries)),
        tuple(f"d{d}" for d in range(n)) * queries,
        np.arange(queries + 1) * n,
        ("j",),
        *([empty] * 4),
        np.zeros(0),
        np.zeros(0),
    )
    errors = error * (0.8 + 0.4 * draw.random(queries * n))
    return Ratings(answers, e.ravel(), errors, {"j": JudgeTerms()}, (), Link.LOGISTIC, 0.3, False)


def drawn_grades(
    ratings: Ratings, centres: dict[str, float], width: float, b: np.ndarray, noise: float, seed: int = 1
) -> list[Grade]:
    """Grades whose mean is the model's: 10·Beta of mean μ."""
    draw, found = np.random.default_rng(seed), []
    place = {query: q for q, query in enumerate(ratings.answers.queries)}
    for question in grade_questions(ratings):
        (query,), (document,) = question.queries, question.documents
        rating = next(r for r in ratings.of(query) if r.document == document)
        true = rating.rating + rating.standard_error * draw.normal() + b[place[query]]
        for judge, centre in centres.items():
            mean = expit((true - centre) / width)
            found.append(Grade(judge, query, document, float(10 * draw.beta(mean / noise, (1 - mean) / noise))))
    return found


def test_which_ranks_are_graded() -> None:
    assert graded_ranks(100) == graded_ranks(20) == (1, 4, 10, 20)
    assert graded_ranks(19) == (1, 7, 13, 19)
    assert graded_ranks(4) == (1, 2, 3, 4)
    assert graded_ranks(2) == (1, 2)
    ratings = invented(3, 30)
    asked = grade_questions(ratings)
    assert len(asked) == 12
    assert [question.documents[0] for question in asked[:4]] == [ratings.of("q0")[rank - 1].document for rank in (1, 4, 10, 20)]
    assert {question.kind for question in asked} == {Kind.GRADE}


def test_the_marginal_likelihood_is_the_integral() -> None:
    ratings = invented(4, 10)
    found = drawn_grades(ratings, {"one": 0.5, "two": 1.5}, 1.2, np.array([1.0, -1.0, 2.0, 0.0]), 0.1)
    rows = _rows(ratings, found)
    scale = _Scale(rows, 4, None)
    theta = np.array([0.7, 1.2, 0.1, 0.3, -2.0])
    assert check_grad(lambda t: scale.cost(t)[0], lambda t: scale.cost(t)[1], theta) < 1e-5
    c, (width, spread, phi) = theta[:2][rows.judge], np.exp(theta[2:])

    def joint(b: float, q: int) -> float:
        own = rows.query == q
        mean = expit(slope(rows.variance, width) * (rows.e + b - c))[own]
        y = rows.y[own]
        divergence = y * np.log(y / mean) + (1 - y) * np.log((1 - y) / (1 - mean))
        return float(np.exp(-np.sum(divergence) / phi - 0.5 * len(y) * np.log(phi) - 0.5 * (b / spread) ** 2) / spread)

    total = sum(np.log(quad(joint, -15, 15, args=(q,), points=[-2, 0, 2], epsabs=0)[0] / np.sqrt(2 * np.pi)) for q in range(4))
    assert scale.cost(theta)[0] * len(rows.y) == pytest.approx(-total, abs=1e-6)
    scale.theta = theta
    calibration = scale.calibration(ratings)
    for q in range(4):
        weight = quad(joint, -15, 15, args=(q,), points=[-2, 0, 2], epsabs=0)[0]
        mean = quad(lambda b, q=q: b * joint(b, q), -15, 15, points=[-2, 0, 2], epsabs=0)[0] / weight
        square = quad(lambda b, q=q: b * b * joint(b, q), -15, 15, points=[-2, 0, 2], epsabs=0)[0] / weight
        assert calibration.of(f"q{q}").value == pytest.approx(mean, abs=1e-5)
        assert calibration.of(f"q{q}").variance == pytest.approx(square - mean**2, abs=1e-5)


def test_a_known_scale_is_found_again() -> None:
    ratings = invented(300)
    b = 1.5 * np.random.default_rng(5).normal(size=300)
    found = calibrate(ratings, drawn_grades(ratings, {"strict": 2.0, "mild": 0.0}, 1.3, b, 0.1))
    assert found.centres["strict"] == pytest.approx(2, abs=0.25)
    assert found.centres["strict"] - found.centres["mild"] == pytest.approx(2, abs=0.1)
    assert found.width == pytest.approx(1.3, rel=0.1)
    assert found.spread == pytest.approx(1.5, rel=0.15)
    assert found.centre == pytest.approx(1, abs=0.25)
    values = np.array([found.of(query).value for query in ratings.answers.queries])
    errors = np.array([found.of(query).variance for query in ratings.answers.queries]) ** 0.5
    assert np.corrcoef(values, b)[0, 1] > 0.93
    assert 0.85 < np.mean(np.abs(values - b) < 1.96 * errors) <= 1


def test_targets() -> None:
    ratings = invented(40)
    found = calibrate(ratings, drawn_grades(ratings, {"j": 1.0}, 1.0, np.linspace(-2, 2, 40), 0.1))
    targets = found.targets(ratings, simulated=True)
    assert len(targets) == len(ratings)
    assert all(0.01 <= target.relevance <= 0.99 and target.weight == 1 and target.simulated for target in targets)
    assert found.anchored and targets[0].anchored
    offset, place = found.of("q7"), ratings.answers.start[7] + 3
    kappa = 1 / np.sqrt(1 + np.pi * (ratings.standard_errors[place] ** 2 + offset.variance) / (8 * found.width**2))
    expected = expit(kappa * (ratings.values[place] + offset.value - found.centre) / found.width)
    assert targets[place].relevance == pytest.approx(np.clip(expected, 0.01, 0.99))
    weights = np.array([target.weight for target in found.targets(ratings, weights="precision")]).reshape(40, 20)
    assert weights.mean(axis=1) == pytest.approx(np.ones(40))
    assert weights.std() > 0
    assert precision(ratings) == pytest.approx(weights.ravel())


def test_a_query_under_two_grades_is_not_placed() -> None:
    ratings = invented(40)
    every = drawn_grades(ratings, {"j": 1.0}, 1.0, np.linspace(-2, 2, 40), 0.1)
    first = next(grade for grade in every if grade.query == "q0")
    found = calibrate(ratings, [first, *(grade for grade in every if grade.query not in ("q0", "q1"))])
    for query in ("q0", "q1", "unknown"):
        assert found.of(query).value == 0
        assert found.of(query).variance == pytest.approx(found.spread**2)
        assert found.of(query).evidence == 0
    assert "38 of 40 queries placed" in found.report()


def test_fewer_than_a_hundred_grades_do_not_anchor() -> None:
    ratings = invented(20)
    found = calibrate(ratings, drawn_grades(ratings, {"j": 1.0}, 1.0, np.linspace(-2, 2, 20), 0.1))
    assert found.grades == 80 and not found.anchored
    assert "not anchored" in found.report()
    assert not found.targets(ratings)[0].anchored


def test_wrong_grades() -> None:
    ratings = invented(5)
    with pytest.raises(ValueError, match="from 0 to 10"):
        calibrate(ratings, [Grade("j", "q0", "d0", 11.0)])
    with pytest.raises(TooFewAnswers, match="grade_questions"):
        calibrate(ratings, [Grade("j", "q0", "unknown", 1.0)])
    found = calibrate(ratings, [*drawn_grades(ratings, {"j": 1.0}, 1.0, np.zeros(5), 0.1), Grade("j", "q9", "d0", 3.0)])
    assert found.ignored == 1 and "1 grades of documents" in found.report()


def test_extreme_grades_are_taken() -> None:
    ratings = invented(10)
    asked = grade_questions(ratings)
    found = calibrate(
        ratings, [Grade("j", *question.queries, *question.documents, 10.0 * (n % 2)) for n, question in enumerate(asked)]
    )
    assert np.all(np.isfinite(found.relevance(ratings)))
    nothing = calibrate(ratings, [Grade("j", *question.queries, *question.documents, 0.0) for question in asked])
    assert np.all(nothing.relevance(ratings) < 0.2)


def test_only_answered_grades_count_and_only_once() -> None:
    asked = Question(Kind.GRADE, ("q",), ("d",))
    found = grades(
        [
            Judgment("j", asked, Status.REFUSED, Form.GRADE, 3.0),
            Judgment("j", asked, Status.OK, Form.GRADE, 7.0),
            Judgment("j", asked, Status.OK, Form.GRADE, 2.0),
            Judgment("j", Question(Kind.COMPARE, ("q",), ("d", "e")), Status.OK, Form.VOTE, 1.0),
        ]
    )
    assert found == [Grade("j", "q", "d", 7.0)]


def crossed(ratings: Ratings, b: np.ndarray, pairs: int, seed: int = 0, islands: bool = False) -> list[Judgment]:
    """Votes between queries; with `islands`, none between the last five and the others."""
    draw, n = np.random.default_rng(seed), int(ratings.answers.sizes[0])
    queries, found = len(b), []
    while len(found) < pairs:
        one, other = draw.choice(queries, 2, replace=False)
        if islands and (one < queries - 5) != (other < queries - 5):
            continue
        i, j = draw.integers(n, size=2)
        e = [ratings.values[q * n + d] + ratings.standard_errors[q * n + d] * draw.normal() for q, d in ((one, i), (other, j))]
        p = expit(e[0] + b[one] - e[1] - b[other])
        question = Question(Kind.CROSS, (f"q{one}", f"q{other}"), (f"d{i}", f"d{j}"))
        found.append(Judgment("j", question, Status.OK, Form.VOTE, float(draw.random() < p)))
    return found


def test_cross_query_pairs_find_the_offsets() -> None:
    ratings = invented(60)
    b = 1.5 * np.random.default_rng(5).normal(size=60)
    found = calibrate_across(ratings, crossed(ratings, b, 1200))
    values = np.array([found.of(f"q{q}").value for q in range(60)])
    errors = np.array([found.of(f"q{q}").variance for q in range(60)]) ** 0.5
    assert np.corrcoef(values, b)[0, 1] > 0.9
    assert 0.85 < np.mean(np.abs(values - (b - b.mean())) < 1.96 * errors) <= 1
    assert found.spread == pytest.approx(b.std(), rel=0.25)
    assert not found.anchored and "not anchored" in found.report()
    marks = drawn_grades(ratings, {"j": 1.0}, 1.3, b - b.mean(), 0.1)
    anchored = calibrate_across(ratings, crossed(ratings, b, 1200), marks)
    assert anchored.anchored and anchored.of("q3") == found.of("q3")
    assert anchored.width == pytest.approx(1.3, rel=0.2)
    assert anchored.centre == pytest.approx(1.0, abs=0.3)
    agreement = audit(calibrate(ratings, marks), found)
    assert agreement.queries == 60
    assert agreement.low < agreement.correlation < agreement.high
    assert agreement.correlation > 0.85
    assert "over 60 queries" in str(agreement)


def test_queries_that_no_pair_ties_in_are_not_placed() -> None:
    ratings = invented(30)
    b = np.random.default_rng(5).normal(size=30)
    found = calibrate_across(ratings, crossed(ratings, b, 600, islands=True))
    assert [found.of(f"q{q}").evidence > 0 for q in (0, 24, 25, 29)] == [True, True, False, False]
    assert found.of("q29").variance == pytest.approx(found.spread**2)
    failed = Judgment("j", Question(Kind.CROSS, ("q0", "q1"), ("d0", "d0")), Status.REFUSED, Form.VOTE, 1.0)
    with pytest.raises(TooFewAnswers, match="cross-query"):
        calibrate_across(ratings, [failed])


def test_few_shared_queries_have_no_correlation() -> None:
    ratings = invented(3)
    found = calibrate(ratings, drawn_grades(ratings, {"j": 1.0}, 1.0, np.zeros(3), 0.1))
    assert np.isnan(audit(found, found).correlation)


def test_from_answers_to_targets() -> None:
    """Two queries, one with a relevant document and one without: their best documents part."""
    preferences = [
        Preference("j", query, f"d{i}", f"d{j}", 1.0) for query in ("good", "bad") for i in range(5) for j in range(i + 1, 5)
    ]
    ratings = rate(preferences)
    levels = {"good": (9, 6, 3, 1), "bad": (2, 1, 0, 0)}
    marks = [
        Grade(judge, question.query, question.documents[0], float(levels[question.query][n % 4]))
        for judge in ("j", "k")
        for n, question in enumerate(grade_questions(ratings))
    ]
    y = {(t.query, t.document): t.relevance for t in calibrate(ratings, marks).targets(ratings)}
    assert y["good", "d0"] > 0.6 > 0.4 > y["bad", "d0"] > y["bad", "d4"]
