"""The noise model keeps its promises, and the tables show what the defaults rest on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from zelo_train import chance, simulate
from zelo_train.evaluate.metrics import ndcg_of
from zelo_train.noise import NoisyJudge, document_keys, truth_from_qrels
from zelo_train.rate.calibration import calibrate, grade_questions
from zelo_train.rate.judges import cross_fit
from zelo_train.records import Form
from zelo_train.simulate import (
    Design,
    calibration_table,
    covered,
    ensemble_world,
    few_relevant_world,
    judged,
    matched_world,
    qrels_world,
    quality,
    rated,
    ratings_of,
    real_table,
    skewed_world,
    true_terms,
)


def some_pairs(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    keys = document_keys("q", [f"d{d}" for d in range(2 * n)])
    truth = draw.normal(size=2 * n) * 2
    return keys[:n], keys[n:], truth[:n], truth[n:]


def test_order_of_calls_changes_no_answer() -> None:
    judge = NoisyJudge("j", 1.0, 0.3, 0.1, taste=0.5, noise=0.5, form=Form.SOFT)
    left, right, a, b = some_pairs()
    whole = judge.compare(7, left, right, a, b)
    order = np.random.default_rng(1).permutation(len(left))
    assert np.array_equal(judge.compare(7, left[order], right[order], a[order], b[order]), whole[order])
    assert judge.compare(7, left[5], right[5], a[5], b[5]) == whole[5]
    assert not np.array_equal(judge.compare(8, left, right, a, b), whole)
    assert not np.array_equal(replace(judge, name="k").compare(7, left, right, a, b), whole)
    # The swapped question is another question: not 1 − p.
    assert not np.allclose(judge.compare(7, right, left, b, a), 1 - whole)


def test_each_error_is_as_large_as_stated() -> None:
    left, right, a, b = some_pairs(20_000)
    equal = np.zeros_like(a)
    assert NoisyJudge("j", position=1.0).compare(0, left, right, equal, equal).mean() == pytest.approx(0.731, abs=0.01)
    sure = NoisyJudge("j", discrimination=50.0, flip=0.2).compare(0, left, right, a, b)
    assert np.mean(sure == (a > b)) == pytest.approx(0.8, abs=0.02)
    soft = NoisyJudge("j", form=Form.SOFT).compare(0, left, right, a, b)
    assert soft == pytest.approx(1 / (1 + np.exp(b - a)))
    liked = NoisyJudge("j", taste=0.5, form=Form.SOFT).compare(0, left, right, a, b)
    assert np.std(np.log(liked / (1 - liked)) - (a - b)) == pytest.approx(0.5 * np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("accuracy", [0.7, 0.8, 0.9, 0.97])
def test_accuracy_is_settable(accuracy: float) -> None:
    left, right, a, b = some_pairs(20_000)
    judge = NoisyJudge("j", flip=0.01, taste=0.05, noise=0.2).with_accuracy(accuracy, a - b)
    assert np.mean(judge.compare(0, left, right, a, b) == (a > b)) == pytest.approx(accuracy, abs=0.01)
    with pytest.raises(ValueError, match="allow between"):
        NoisyJudge("j", flip=0.2).with_accuracy(0.97, a - b)


def test_lists_are_ordered_by_truth_but_for_noise() -> None:
    keys = document_keys("q", [f"d{d}" for d in range(10)])
    truth = np.arange(10) * 3.0
    places = NoisyJudge("j", discrimination=20.0).order(0, keys, truth)
    assert places == tuple(range(9, -1, -1))
    assert NoisyJudge("j", discrimination=20.0, flip=0.4).order(0, keys, truth) in (places, places[::-1])
    assert sorted(NoisyJudge("j", taste=3.0).order(0, keys, truth)) == list(range(10))


def test_truth_from_qrels() -> None:
    keys = chance.mix(chance.key("q"), np.arange(30_000, dtype=np.uint64))
    grades = np.repeat([0.0, 1.0, 2.0], 10_000)
    scores = np.random.default_rng(0).normal(size=30_000) * 7
    truth = truth_from_qrels(grades, scores, keys)
    levels = [truth[grades == grade].mean() for grade in (0, 1, 2)]
    assert levels == pytest.approx([0.0, 2.5, 3.3], abs=0.03)
    assert truth[grades == 0].std() == pytest.approx(np.hypot(0.5, 0.4), rel=0.03)
    assert np.corrcoef(truth[grades == 1], scores[grades == 1])[0, 1] > 0.7


def test_neighbours_beat_cycles_at_fewer_pairs() -> None:
    """N = 300 against N = 400 in the noisy ensemble, paired over queries."""
    world = ensemble_world(60, seed=0)
    cycles, neighbours = (rated(world, judged(world, design)) for design in (Design.CYCLES, Design.NEIGHBOURS))
    assert (ndcg_of(neighbours, world.gains) - ndcg_of(cycles, world.gains)).mean() >= 0.05


@pytest.mark.parametrize("design", [Design.CYCLES, Design.NEIGHBOURS])
def test_intervals_cover(design: Design) -> None:
    """95 % intervals, where truth and judges are as the likelihood has them."""
    world = matched_world(30, 0)
    found = covered(world, judged(world, design), true_terms(world))
    assert 0.92 <= found["all"].mean <= 0.98
    assert 0.85 <= found["estimated top ten"].mean <= 0.98


def test_calibration_makes_queries_comparable() -> None:
    for table in calibration_table(30, 0):
        none, ranks = table.rows["none"], table.rows["ranks 1, 4, 10, 20"]
        assert ranks["cross-query accuracy, top ten"].mean > none["cross-query accuracy, top ten"].mean + 0.05
        assert float(ranks["best F1"]) > float(none["best F1"]) + 0.05
        assert float(ranks["best F1"]) > float(table.rows["best measured four"]["best F1"])


def test_simulated_targets_say_so() -> None:
    for world in (few_relevant_world(10), skewed_world(10)):
        ratings = ratings_of(world, judged(world, Design.NEIGHBOURS))
        found = calibrate(ratings, simulate.graded(world, grade_questions(ratings)))
        assert all(target.simulated for target in found.targets(ratings, simulated=True))


def test_soft_answers_tell_more_than_votes() -> None:
    world = ensemble_world(20, judges=(NoisyJudge("j", taste=0.3, noise=0.5),))
    soft = replace(world, judges=(replace(world.judges[0], form=Form.SOFT),))
    figures = [quality(one, rated(one, judged(one, Design.NEIGHBOURS)))["NDCG@10"].mean for one in (world, soft)]
    assert figures[1] > figures[0] + 0.03


def test_real_candidates_and_qrels() -> None:
    draw = np.random.default_rng(0)
    grades = (draw.random((12, 40)) < 0.08).astype(int) * draw.integers(1, 3, size=(12, 40))
    grades[0] = 0
    scores = grades + 1.5 * draw.normal(size=grades.shape)
    table = real_table(scores, grades, "invented")
    assert "judges simulated from its qrels, 11 queries of 40 candidates" in str(table).splitlines()[0]
    figures = {name: row["NDCG@10"].mean for name, row in table.rows.items()}
    assert figures["first stage"] < figures["cycle + neighbours, 2 rounds"] < figures["cycle + neighbours, 4 rounds"]
    assert figures["cycle + neighbours, 4 rounds"] <= figures["truth"] + 0.02
    assert np.array_equal(qrels_world(scores, grades).truth, qrels_world(scores, grades).truth)


def test_the_command_says_first_that_judges_are_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--table", "orders", "--queries", "4", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Judges are simulated")
    assert "4 queries of 100 documents, seed 3" in lines[1]
    assert "NDCG@10" in lines[4] and " ± " in lines[5]
    with pytest.raises(SystemExit):
        simulate.main(["--table", "unknown"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pairs", "soft", "judges", "lists", "weights"])
@pytest.mark.slow
def test_every_table_is_printed(name: str) -> None:
    for table in simulate.TABLES[name](6, 0):
        assert len(str(table).splitlines()) == len(table.rows) + 2


def test_cross_fitting_helps_the_ratings() -> None:
    world = ensemble_world(40, seed=0)
    answers = judged(world, Design.NEIGHBOURS)
    plain, crossed = rated(world, answers), rated(world, answers, cross_fit(answers))
    assert (ndcg_of(crossed, world.gains) - ndcg_of(plain, world.gains)).mean() > 0
