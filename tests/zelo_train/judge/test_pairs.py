"""Pair designs: seeded, connected, without duplicates, resumable, balanced."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zelo_train.judge.pairs import (
    Design,
    Pair,
    Plan,
    audits,
    cross_pairs,
    cycles,
    informative,
    neighbours,
    plan_round,
    ring,
    shown,
    windows,
)


def names(n: int) -> list[str]:
    return [f"d{d}" for d in range(n)]


def parts(documents: list[str], pairs: list[Pair]) -> int:
    """Connected components, by merging."""
    group = {document: {document} for document in documents}
    for one, other in pairs:
        merged = group[one] | group[other]
        for document in merged:
            group[document] = merged
    return len({id(members) for members in group.values()})


def all_rounds(n: int, seed: int, design: Design = Design.NEIGHBOURS, rounds: int = 3) -> list[Plan]:
    draw, plans = np.random.default_rng(seed), []
    while True:
        plan = plan_round(
            design, "q", names(n), plans, ratings=draw.normal(size=n), covariance=np.eye(n), rounds=rounds, seed=seed
        )
        if plan is None:
            return plans
        plans.append(plan)


@given(n=st.integers(2, 40), seed=st.integers(0, 99), design=st.sampled_from(Design))
@settings(max_examples=60, deadline=None)
def test_connected_and_no_pair_twice(n: int, seed: int, design: Design) -> None:
    plans = all_rounds(n, seed, design)
    pairs = [pair for plan in plans for pair in plan.pairs]
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(one != other for one, other in pairs)
    assert parts(names(n), list(plans[0].pairs)) == 1
    assert [plan.round for plan in plans] == list(range(1, len(plans) + 1))


@given(n=st.integers(4, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_neighbours_meet_at_most_twice_a_round(n: int, seed: int) -> None:
    for plan in all_rounds(n, seed)[1:]:
        assert max(Counter(itertools.chain(*plan.pairs)).values()) <= 2
        assert len(plan.pairs) <= n


def test_sizes() -> None:
    assert [len(plan.pairs) for plan in all_rounds(100, 0)] == [100, 100, 100]
    assert len(cycles("q", names(100))) == 400
    assert set(Counter(itertools.chain(*cycles("q", names(100)))).values()) == {8}
    for n in (10, 11, 12, 20):
        assert len(cycles("q", names(n))) == min(4 * n, n * (n - 1) // 2)


@pytest.mark.parametrize("design", Design)
def test_one_two_and_three_documents(design: Design) -> None:
    assert all_rounds(1, 0, design) == []
    assert [len(plan.pairs) for plan in all_rounds(2, 0, design)] == [1]
    (triangle,) = all_rounds(3, 0, design)
    assert {frozenset(pair) for pair in triangle.pairs} == {frozenset(pair) for pair in itertools.combinations(names(3), 2)}


def test_closest_unmet_documents_meet_first() -> None:
    """Five documents in the order of their names, a ring already met: gap 1 has what the ring left, then gap 2."""
    met = [("d0", "d1"), ("d1", "d2"), ("d2", "d3"), ("d3", "d4"), ("d4", "d0")]
    assert neighbours("q", names(5), np.arange(5, 0, -1.0), met) == [
        ("d0", "d2"),
        ("d1", "d3"),
        ("d2", "d4"),
        ("d0", "d3"),
        ("d1", "d4"),
    ]
    assert neighbours("q", names(4), np.arange(4, 0, -1.0), []) == [("d0", "d1"), ("d1", "d2"), ("d2", "d3"), ("d0", "d3")]


def test_seed_query_and_ids_alone_decide() -> None:
    assert ring("q", names(20), 1) == ring("q", names(20)[::-1], 1)
    assert ring("q", names(20), 1) != ring("q", names(20), 2)
    assert ring("q", names(20), 1) != ring("other", names(20), 1)
    assert cycles("q", names(20), 8, 1) == cycles("q", names(20)[::-1], 8, 1)


def test_a_resumed_round_is_the_stored_one() -> None:
    ratings = np.random.default_rng(0).normal(size=30)
    first = plan_round(Design.NEIGHBOURS, "q", names(30))
    assert first is not None
    stored = Plan(first.query, first.round, tuple((str(one), str(other)) for one, other in first.pairs))
    again = [plan_round(Design.NEIGHBOURS, "q", names(30), [plan], ratings=ratings) for plan in (first, stored)]
    assert again[0] == again[1]
    assert again[0] is not None and again[0].round == 2


@given(n=st.integers(3, 40), seed=st.integers(0, 99), judge=st.sampled_from(["a", "b"]))
@settings(max_examples=40, deadline=None)
def test_each_document_is_shown_first_as_often_as_second(n: int, seed: int, judge: str) -> None:
    plans = all_rounds(n, seed)
    balance: Counter[str] = Counter()
    for number, comparison in shown(judge, plans, seed):
        balance[comparison.left] += 1
        balance[comparison.right] -= 1
        if number == 1 and sum(abs(count) for count in balance.values()) == 0:
            assert set(balance) == set(names(n))
    assert max(abs(count) for count in balance.values()) <= 2
    ring_only: Counter[str] = Counter()
    for _, comparison in shown(judge, plans[:1], seed):
        ring_only.update({comparison.left: 1, comparison.right: -1})
    assert set(ring_only.values()) == {0}


def test_judges_see_different_orders() -> None:
    plans = all_rounds(40, 0)
    assert list(shown("a", plans)) != list(shown("b", plans))
    assert list(shown("a", plans)) == list(shown("a", plans))


def test_audits_are_of_round_one_only_and_about_five_and_one_percent() -> None:
    swapped = repeated = asked = 0
    for q in range(40):
        plans = [plan_round(Design.NEIGHBOURS, f"q{q}", names(100))]
        assert plans[0] is not None
        later = Plan(f"q{q}", 2, (("d0", "d50"),))
        own = audits("a", [plans[0], later])
        asked_now = {comparison for _, comparison in shown("a", [plans[0]])}
        assert all(comparison.swapped in asked_now for comparison in own.swapped)
        assert all(comparison in asked_now for comparison in own.repeated)
        swapped, repeated, asked = swapped + len(own.swapped), repeated + len(own.repeated), asked + len(asked_now)
    assert 0.04 < swapped / asked < 0.06
    assert 0.005 < repeated / asked < 0.015


@pytest.mark.parametrize("n", [2, 3, 9, 10, 11, 57, 100])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_windows_cover_and_tie_everything(n: int, k: int) -> None:
    first = windows("q", names(n), k)
    assert max(len(question.documents) for question in first) <= k
    assert {document for question in first for document in question.documents} == set(names(n))
    pairs = [(question.documents[0], other) for question in first for other in question.documents[1:]]
    assert parts(names(n), pairs) == 1
    for one, other in itertools.pairwise([*first, first[0]] if len(first) > 2 else first):
        assert len(set(one.documents) & set(other.documents)) == 1
    later = windows("q", names(n), k, 2, ratings=-np.arange(n, dtype=float))
    assert {document for question in later for document in question.documents} == set(names(n))
    for one, other in itertools.pairwise(later):
        assert len(set(one.documents) & set(other.documents)) == 1


def test_later_windows_are_shifted_by_half_a_window() -> None:
    spans = [sorted(int(d[1:]) for d in q.documents) for q in windows("q", names(20), 10, 2, ratings=-np.arange(20.0))]
    assert [(span[0], span[-1]) for span in spans] == [(0, 5), (5, 14), (14, 19)]


def test_informative_asks_about_the_uncertain_top() -> None:
    ratings = np.array([3.0, 2.9, 0.0, -3.0, -3.1])
    sigma = np.diag([1.0, 1.0, 0.1, 1.0, 1.0])
    assert informative(names(5), ratings, sigma, [], 1, top=2) == [("d0", "d1")]
    met = list(itertools.combinations(names(5), 2))[:-1]
    assert informative(names(5), ratings, sigma, met, 9) == [("d3", "d4")]


def test_cross_pairs_tie_all_queries() -> None:
    ranked = [(f"q{q}", names(30)) for q in range(25)]
    asked = cross_pairs(ranked, 4, seed=1)
    assert asked == cross_pairs(ranked, 4, seed=1)
    assert parts([query for query, _ in ranked], [question.queries for question in asked]) == 1
    assert len(set(asked)) == len(asked) == 50
    assert {document for question in asked for document in question.documents} == {"d0", "d3", "d9", "d19"}


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="twice"):
        plan_round(Design.CYCLES, "q", ["a", "b", "a"])
    with pytest.raises(ValueError, match="needs a rating for each of 4 documents"):
        plan_round(Design.NEIGHBOURS, "q", names(4), [Plan("q", 1, ())])
    with pytest.raises(ValueError, match="even number"):
        cycles("q", names(4), 3)
    with pytest.raises(ValueError, match="at least 2"):
        windows("q", names(4), 1)
