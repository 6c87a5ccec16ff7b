"""Ratings against oracles, their symmetries, and what is left out."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import erf, expit

from zelo_train.errors import TooFewAnswers
from zelo_train.rate import JudgeTerms, preferences, rate
from zelo_train.rate.fit import covariance, fit
from zelo_train.records import Comparison, Form, Judgment, Kind, Preference, Question, Status

NO_TERMS: dict[str, JudgeTerms] = {}


def random_preferences(
    n: int, count: int, seed: int, p: Callable[[np.random.Generator], float] = lambda draw: float(draw.integers(2))
) -> list[Preference]:
    """A ring, so that all is connected, and further pairs."""
    draw = np.random.default_rng(seed)
    pairs = [(i, (i + 1) % n) for i in range(n)] + [tuple(draw.choice(n, 2, replace=False)) for _ in range(count)]
    return [Preference(f"j{draw.integers(2)}", "q", f"d{i}", f"d{j}", p(draw)) for i, j in pairs]


def by_document(found: list[Preference], **options: object) -> dict[str, float]:
    return {rating.document: rating.rating for rating in rate(found, **options)}  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_equals_choix(seed: int) -> None:
    choix = pytest.importorskip("choix")
    found = random_preferences(12, 60, seed)
    wins = [(int((x.left if x.p else x.right)[1:]), int((x.right if x.p else x.left)[1:])) for x in found]
    # choix subtracts alpha · Σe², a prior of precision 2 alpha.
    theirs = choix.opt_pairwise(12, wins, alpha=0.15, tol=1e-12)
    ours = by_document(found, judges=NO_TERMS)
    for d in range(12):
        assert ours[f"d{d}"] == pytest.approx(theirs[d], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_evalica_with_a_phantom_opponent(seed: int) -> None:
    """Against a phantom that everyone beats and loses to once, the maximum likelihood is finite without a prior."""
    evalica = pytest.importorskip("evalica")
    phantom = [Preference("j0", "q", f"d{d}", "phantom", p) for d in range(10) for p in (0.0, 1.0)]
    found = random_preferences(10, 30, seed, lambda draw: float(draw.choice([0, 0.5, 1]))) + phantom
    winners = {0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw, 1.0: evalica.Winner.X}
    theirs = evalica.bradley_terry(
        [x.left for x in found], [x.right for x in found], [winners[x.p] for x in found], tolerance=1e-12, limit=100_000
    ).scores
    ours = by_document(found, judges=NO_TERMS, prior=1e-9)
    for d in range(10):
        expected = np.log(theirs[f"d{d}"]) - np.log(theirs["phantom"])
        assert ours[f"d{d}"] - ours["phantom"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("link", ["logistic", "erf"])
@pytest.mark.parametrize("flip", [0.0, 0.15])
def test_equals_a_brute_force_optimum(link: str, flip: float) -> None:
    terms = {"j0": JudgeTerms(1.4, 0.5, flip), "j1": JudgeTerms(1 / 1.4, -0.3, flip / 3)}
    found = random_preferences(9, 60, 5, lambda draw: float(draw.choice([0.0, 1.0, 0.5, 0.2, 0.93])))
    found = [
        Preference(x.judge, x.query, x.left, x.right, x.p, weight) for x, weight in zip(found, [1, 0.2, 0.7] * 23, strict=True)
    ]
    left, right = (np.array([int(getattr(x, side)[1:]) for x in found]) for side in ("left", "right"))
    a, b, eps = (np.array([getattr(terms[x.judge], name) for x in found]) for name in ("discrimination", "position", "flip"))
    p, weight = np.array([x.p for x in found]), np.array([x.weight for x in found])

    def cost(e: np.ndarray) -> float:
        z = a * (e[left] - e[right]) + b
        inner = expit(z) if link == "logistic" else (1 + erf(z / 2.4)) / 2
        outer = eps + (1 - 2 * eps) * inner
        return float(-np.sum(weight * (p * np.log(outer) + (1 - p) * np.log(1 - outer))) + 0.15 * np.sum(e**2))

    ratings = rate(found, judges=terms, link=link)
    ours = {rating.document: rating.rating for rating in ratings}
    e = np.array([ours[f"d{d}"] for d in range(9)])
    best = minimize(cost, e, method="BFGS", options={"gtol": 1e-9})
    assert e == pytest.approx(best.x, abs=2e-6)
    assert cost(e) <= cost(np.zeros(9))
    assert e.sum() == pytest.approx(0, abs=1e-7)


def test_standard_errors_are_the_inverse_information() -> None:
    found = random_preferences(8, 40, 2)
    ratings = rate(found, judges=NO_TERMS)
    e = {rating.document: rating.rating for rating in ratings}
    information = 0.3 * np.eye(8)
    for x in found:
        i, j = int(x.left[1:]), int(x.right[1:])
        p = expit(e[x.left] - e[x.right])
        unit = np.eye(8)[i] - np.eye(8)[j]
        information += p * (1 - p) * np.outer(unit, unit)
    expected = np.sqrt(np.diag(np.linalg.inv(information)))
    for rating in ratings:
        assert rating.standard_error == pytest.approx(expected[int(rating.document[1:])], rel=1e-6)
    (sigma,) = covariance(ratings.answers, ratings.values, tuple(ratings.judges.values()))
    assert np.sqrt(np.diag(sigma)) == pytest.approx(ratings.standard_errors, rel=1e-9)
    assert sigma == pytest.approx(sigma.T)


@given(seed=st.integers(0, 1000), n=st.integers(2, 15), extra=st.integers(0, 40), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_of_documents_and_answers_does_not_matter(seed: int, n: int, extra: int, order: object) -> None:
    found = random_preferences(n, extra, seed, lambda draw: float(draw.choice([0.0, 1.0, 0.5, 0.3])))
    mixed = list(found)
    order.shuffle(mixed)  # type: ignore[attr-defined]
    other = list(range(n))
    order.shuffle(other)  # type: ignore[attr-defined]
    new = {f"d{d}": f"d{other[d]}" for d in range(n)}
    renamed = [Preference(x.judge, "q", new[x.left], new[x.right], x.p) for x in mixed]
    before, after = by_document(found, judges=NO_TERMS), by_document(renamed, judges=NO_TERMS)
    for document, rating in before.items():
        assert after[new[document]] == pytest.approx(rating, abs=1e-6)


@given(seed=st.integers(0, 1000), n=st.integers(2, 15), extra=st.integers(0, 40), link=st.sampled_from(["logistic", "erf"]))
@settings(max_examples=40, deadline=None)
def test_turning_every_answer_round_negates(seed: int, n: int, extra: int, link: str) -> None:
    found = random_preferences(n, extra, seed, lambda draw: float(draw.choice([0.0, 1.0, 0.5, 0.3])))
    turned = [Preference(x.judge, x.query, x.left, x.right, 1 - x.p) for x in found]
    before, after = by_document(found, judges=NO_TERMS, link=link), by_document(turned, judges=NO_TERMS, link=link)
    for document, rating in before.items():
        assert after[document] == pytest.approx(-rating, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([s for s in Status if s is not Status.OK]))))
@settings(max_examples=30, deadline=None)
def test_a_failed_call_never_changes_a_rating(failed: list[tuple[int, int, Status]]) -> None:
    answered = [
        Judgment("j", Comparison("q", f"d{i}", f"d{(i + 1) % 6}").question, Status.OK, Form.VOTE, float(i % 2))
        for i in range(6)
    ]
    failures = [
        # A value that should not be there must not be read either.
        Judgment("j", Comparison("q", f"d{i}", f"d{j}").question, status, Form.VOTE, 1.0)
        for i, j, status in failed
    ]
    mixed = failures[::2] + answered + failures[1::2]
    assert by_document(preferences(mixed)) == by_document(preferences(answered))


def test_queries_do_not_touch_each_other() -> None:
    one = random_preferences(20, 100, 1)
    other = [Preference(x.judge, "r", x.left, x.right, x.p) for x in random_preferences(7, 11, 2)]
    together = rate(one + other, judges=NO_TERMS)
    for query, alone in (("q", one), ("r", other)):
        expected = {rating.document: rating for rating in rate(alone, judges=NO_TERMS)}
        for rating in together.of(query):
            assert rating.rating == pytest.approx(expected[rating.document].rating, abs=1e-9)
            assert rating.standard_error == pytest.approx(expected[rating.document].standard_error, abs=1e-9)


def test_what_forms_of_answers_become() -> None:
    asked = Question(Kind.COMPARE, ("q",), ("a", "b", "c", "d"))
    pair = Question(Kind.COMPARE, ("q",), ("a", "b"))
    found = list(
        preferences(
            [
                Judgment("j", asked, Status.OK, Form.ORDER, order=(2, 0, 3, 1)),
                Judgment("j", pair, Status.OK, Form.SOFT, 0.9999),
                Judgment("j", pair, Status.OK, Form.SOFT, 0.5),
                Judgment("j", Comparison("q", "b", "a").question, Status.OK, Form.VOTE, 1.0),
                Judgment("j", Question(Kind.GRADE, ("q",), ("a",)), Status.OK, Form.GRADE, 7.0),
            ]
        )
    )
    order, rest = found[:6], found[6:]
    assert {(x.left, x.right): x.p for x in order} == {
        ("a", "b"): 1,
        ("a", "c"): 0,
        ("a", "d"): 1,
        ("b", "c"): 0,
        ("b", "d"): 0,
        ("c", "d"): 1,
    }
    assert {x.weight for x in order} == {2 / 4}
    assert [(x.left, x.p, x.weight) for x in rest] == [("a", 0.99, 1), ("b", 1.0, 1)]
    assert rate(order, judges=NO_TERMS).approximate
    assert "approximate" in rate(order, judges=NO_TERMS).report()
    assert [rating.document for rating in rate(order)] == ["c", "a", "d", "b"]


def test_undefeated_documents_stay_finite() -> None:
    ladder = [Preference("j", "q", f"d{i}", f"d{j}", 1.0) for i in range(6) for j in range(i + 1, 6)]
    ratings = rate(ladder)
    assert [rating.document for rating in ratings] == [f"d{d}" for d in range(6)]
    assert 1 < ratings.of("q")[0].rating < 10


def test_left_out_and_said_so() -> None:
    ring = [Preference("j", "ring", f"d{i}", f"d{(i + 1) % 10}", 1.0) for i in range(10)]
    islands = [Preference("j", "islands", f"d{i}", f"d{j}", 1.0) for i, j in [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]]
    path = [Preference("j", "path", f"d{i}", f"d{i + 1}", 1.0) for i in range(3)]
    pair = [Preference("j", "pair", "a", "b", 1.0)]
    candidates = {
        "ring": [f"d{i}" for i in range(12)],
        "islands": [f"d{i}" for i in range(6)],
        "path": [f"d{i}" for i in range(4)],
        "pair": ["a", "b"],
        "single": ["a"],
    }
    ratings = rate(ring + islands + path + pair, candidates=candidates)
    assert [report.query for report in ratings.left_out] == ["islands", "path", "single"]
    islands_report, path_report, single = ratings.left_out
    assert islands_report.parts == 2 and "2 parts" in islands_report.reason
    assert "2 of its 4 documents" in path_report.reason
    assert "no two documents" in single.reason
    assert len(ratings.of("ring")) == 10 and len(ratings.of("pair")) == 2
    (ring_report,) = (report for report in ratings.queries if report.query == "ring")
    assert ring_report.left_out == ("d10", "d11")
    assert "path" not in ratings and "ring" in ratings
    assert "3 of" not in ratings.report().splitlines()[0] and "2 of 5 queries rated" in ratings.report()
    with pytest.raises(KeyError, match="2 parts"):
        ratings.of("islands")
    with pytest.raises(TooFewAnswers, match="none of 1 queries"):
        rate(path)
    with pytest.raises(TooFewAnswers, match="no preferences"):
        rate([])


def test_doubtful_are_the_least_certain() -> None:
    found = random_preferences(20, 100, 3) + [Preference("j0", "q", "d0", f"d{d}", 1.0) for d in range(5, 15)]
    ratings = rate(found, judges=NO_TERMS)
    worst = ratings.doubtful(5)
    assert [x.standard_error for x in worst] == sorted((x.standard_error for x in ratings), reverse=True)[:5]
    assert len(ratings.doubtful(0)) == 0 and len(ratings.doubtful(99)) == 20


def test_wrong_input_is_refused() -> None:
    good = random_preferences(4, 4, 0)
    for wrong in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            rate([*good, Preference("j", "q", "d0", "d2", wrong)])
    with pytest.raises(ValueError, match="weight"):
        rate([*good, Preference("j", "q", "d0", "d2", 1.0, 0.0)])
    with pytest.raises(ValueError, match="itself"):
        rate([Preference("j", "q", "d0", "d0", 1.0)])
    with pytest.raises(ValueError, match="none of its candidates"):
        rate(good, candidates={"q": ["d0", "d1", "d2"]})
    with pytest.raises(ValueError, match="prior"):
        rate(good, prior=0)
    with pytest.raises(ValueError, match="probit"):
        rate(good, link="probit")


def test_a_millisecond_a_query() -> None:
    from zelo_train.simulate import Design, NoisyJudge, ensemble_world, judged

    answers = judged(ensemble_world(100, 0, (NoisyJudge("one"),)), Design.CYCLES)
    assert len(answers.p) == 100 * 400
    spent = []
    for _ in range(4):
        begin = time.process_time()
        fit(answers)
        spent.append(time.process_time() - begin)
    assert min(spent) / 100 <= 0.001
