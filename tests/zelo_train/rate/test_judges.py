"""Judges' terms: cross-fitted ones come near the truth, joint ones do not; thin evidence leaves them alone."""

from __future__ import annotations

import numpy as np
import pytest

from zelo_train.rate.judges import FOLDS, cross_fit, explained, folds, normalised
from zelo_train.rate.link import Link
from zelo_train.simulate import Design, NoisyJudge, ensemble_world, joint_fit, judged, true_terms


@pytest.mark.slow
def test_cross_fitted_terms_are_nearer_the_truth_than_joint_ones() -> None:
    world = ensemble_world(60, seed=1)
    answers = judged(world, Design.CYCLES)
    truth = true_terms(world)
    crossed, joint = cross_fit(answers), joint_fit(answers)
    for found, true in zip(crossed, truth, strict=True):
        assert found.answers == 60 * 400
        assert abs(np.log(found.discrimination / true.discrimination)) < 0.25
        assert abs(found.position - true.position) < 0.2
        assert abs(found.flip - true.flip) < 0.05

    def far(terms: tuple) -> float:
        return sum(abs(np.log(found.discrimination / true.discrimination)) for found, true in zip(terms, truth, strict=True))

    assert far(crossed) < far(joint) / 2


def test_a_pair_is_in_one_fold_for_all_judges_and_both_orders() -> None:
    answers = judged(ensemble_world(5, seed=2), Design.CYCLES)
    fold = folds(answers, 0)
    for pair in np.unique(answers.pair):
        assert len(set(fold[answers.pair == pair])) == 1
    assert np.bincount(fold, minlength=FOLDS).min() > len(fold) / FOLDS * 0.8


def test_thin_evidence_leaves_terms_at_their_defaults() -> None:
    one = NoisyJudge("one", discrimination=1.0, position=1.0, flip=0.2)
    (few,) = cross_fit(judged(ensemble_world(1, judges=(one,)), Design.CYCLES, degree=2))
    assert (few.discrimination, few.position, few.flip) == (1, 0, 0)
    assert "100 answers, and b needs 200" in few.note
    (some,) = cross_fit(judged(ensemble_world(4, judges=(one,)), Design.CYCLES))
    assert (some.discrimination, some.flip) == (1, 0)
    assert some.position > 0.3
    assert "1,600 answers over 4 queries" in some.note


def test_flips_are_admitted_only_where_they_help() -> None:
    honest = NoisyJudge("one", position=-0.5)
    (terms,) = cross_fit(judged(ensemble_world(25, judges=(honest,)), Design.CYCLES))
    assert terms.flip == 0
    assert "held-out log-loss" in terms.note
    assert terms.discrimination == 1
    assert terms.position == pytest.approx(-0.5, abs=0.25)
    turning = NoisyJudge("one", flip=0.2)
    (terms,) = cross_fit(judged(ensemble_world(40, judges=(turning,)), Design.CYCLES))
    assert terms.flip == pytest.approx(0.2, abs=0.08)
    assert terms.note == ""


def test_terms_of_known_differences() -> None:
    draw = np.random.default_rng(0)
    d = draw.normal(size=40_000) * 3
    p = 0.1 + 0.8 / (1 + np.exp(-(1.5 * d + 0.4)))
    votes = (draw.random(len(d)) < p).astype(float)
    found = explained(d, votes, np.ones(len(d)), Link.LOGISTIC, flips=True)
    assert found.discrimination == pytest.approx(1.5, rel=0.05)
    assert found.position == pytest.approx(0.4, abs=0.05)
    assert found.flip == pytest.approx(0.1, abs=0.01)


def test_mean_log_discrimination_is_zero() -> None:
    terms = true_terms(ensemble_world(2))
    assert sum(np.log(term.discrimination) for term in terms) == pytest.approx(0)
    assert normalised(terms, [False] * 3) == terms
