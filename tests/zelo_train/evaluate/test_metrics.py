"""The measures equal ir_measures' to 1e-9."""

from __future__ import annotations

import numpy as np
import pytest

from zelo_train.evaluate.metrics import ndcg, ndcg_of, per_query, ranking, recall, reciprocal_rank


def random_collection(seed: int, ties: bool = True) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Runs (with ties), unjudged documents, negative grades, queries without relevant documents or without a run."""
    draw = np.random.default_rng(seed)
    run, qrels = {}, {}
    for q in range(30):
        documents = [f"d{d}" for d in range(40)]
        if q != 3:
            found = draw.choice(documents, size=draw.integers(1, 40), replace=False)
            run[f"q{q}"] = {str(d): float(draw.integers(0, 12)) if ties else float(draw.random()) for d in found}
        judged = draw.choice(documents, size=draw.integers(1, 25), replace=False)
        qrels[f"q{q}"] = {str(document): int(draw.choice([-1, 0, 0, 0, 1, 2, 3])) for document in judged}
    return run, qrels


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_ir_measures(seed: int) -> None:
    ir_measures = pytest.importorskip("ir_measures")
    run, qrels = random_collection(seed)
    ours = {
        ir_measures.nDCG @ 10: per_query(ndcg, run, qrels, 10),
        ir_measures.nDCG @ 3: per_query(ndcg, run, qrels, 3),
        ir_measures.RR: per_query(reciprocal_rank, run, qrels, None),
        ir_measures.R @ 5: per_query(recall, run, qrels, 5),
        ir_measures.R @ 100: per_query(recall, run, qrels, 100),
    }
    theirs = list(ir_measures.iter_calc(list(ours), qrels, run))
    assert len(theirs) >= 5 * 29
    for metric in theirs:
        assert ours[metric.measure][metric.query_id] == pytest.approx(metric.value, abs=1e-9), metric


def test_cut_reciprocal_rank_equals_ir_measures() -> None:
    """Without ties: there ir_measures hands RR@k to another tool, which keeps the order of the input."""
    ir_measures = pytest.importorskip("ir_measures")
    run, qrels = random_collection(7, ties=False)
    ours = per_query(reciprocal_rank, run, qrels, 10)
    for metric in ir_measures.iter_calc([ir_measures.RR @ 10], qrels, run):
        assert ours[metric.query_id] == pytest.approx(metric.value, abs=1e-9), metric


def test_many_queries_at_once_equal_one_by_one() -> None:
    draw = np.random.default_rng(1)
    scores, gains = draw.normal(size=(20, 15)), draw.integers(0, 4, size=(20, 15)).astype(float)
    gains[4] = 0
    found = ndcg_of(scores, gains, 10)
    for q in range(20):
        ranked = ranking({str(d): scores[q, d] for d in range(15)})
        assert found[q] == pytest.approx(ndcg(ranked, {str(d): gains[q, d] for d in range(15)}, 10), abs=1e-12)


def test_equal_scores_are_ordered_by_id_descending() -> None:
    assert ranking({"a": 1.0, "c": 1.0, "b": 2.0}) == ["b", "c", "a"]


def test_nothing_relevant_and_nothing_found() -> None:
    assert ndcg(["a"], {"a": 0}) == reciprocal_rank(["a"], {"a": 0}) == recall(["a"], {"a": 0}) == 0
    assert ndcg([], {"a": 1}) == reciprocal_rank([], {"a": 1}) == recall([], {"a": 1}) == 0
    assert ndcg(["a"], {}) == 0
