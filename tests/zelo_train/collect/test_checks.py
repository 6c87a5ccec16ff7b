"""Checks: each fault is found, counted and named; a sound collection has none; nothing is changed."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zelo_train.collect.checks import check, leakage, near_duplicates, recall
from zelo_train.collect.collection import Collection
from zelo_train.records import Candidate, Document, Query

LOREM = "the quick brown fox jumps over the lazy dog while seven wizards brew a potion of considerable and lasting strength"


def collection(
    documents: dict[str, str] | None = None,
    queries: dict[str, tuple[str, str]] | None = None,
    qrels: dict[str, dict[str, int]] | None = None,
) -> Collection:
    texts = documents or {"d1": "one text here", "d2": "quite another thing", "d3": "a third of them"}
    asked = queries or {"q1": ("first thing asked", "train"), "q2": ("other matter", "test")}
    return Collection(
        {id: Document(id, text) for id, text in texts.items()},
        {id: Query(id, text, split=split or None) for id, (text, split) in asked.items()},  # type: ignore[arg-type]
        qrels if qrels is not None else {"q1": {"d1": 1}, "q2": {"d2": 1}},
    )


def test_a_sound_collection_has_no_findings() -> None:
    run = [Candidate(query, document, rank, 1.0) for query in ("q1", "q2") for rank, document in enumerate(("d1", "d2"), 1)]
    report = check(collection(), run)
    assert report.findings == ()
    assert report.counts["relevant among candidates"] == 1.0
    assert str(report).endswith("checks: 0 problems, 0 warnings, 0 notes")


@pytest.mark.parametrize(
    ("found", "name", "level", "count"),
    [
        (collection({"d1": "x", "d2": " \n", "d3": ""}), "empty documents", "warning", 2),
        (collection({"d1": "x " * 1001, "d2": "y " * 1000}), "over-long documents", "warning", 1),
        (collection({"d1": "Same  text", "d2": "same text", "d3": "same text "}), "duplicate documents", "warning", 2),
        (
            collection({"d1": LOREM, "d2": LOREM + " indeed", "d3": LOREM.replace("seven", "eight")}),
            "near-duplicate documents",
            "warning",
            1,
        ),
        (
            collection({"d1": "same", "d2": "same"}, qrels={"q1": {"d1": 1, "d2": 0}}),
            "equal documents with different grades",
            "problem",
            1,
        ),
        (collection(queries={"q1": ("", "train"), "q2": ("x", "test")}), "empty queries", "problem", 1),
        (collection(queries={"q1": ("x " * 65, ""), "q2": ("y", "")}), "over-long queries", "warning", 1),
        (collection(queries={"q1": ("x", ""), "q2": ("X ", "")}), "duplicate queries", "warning", 1),
        (collection(queries={"q1": ("x", "train"), "q2": ("X ", "test")}), "the same query in several splits", "problem", 1),
        (
            collection(
                queries={"q1": ("who made the very first of them?", "train"), "q2": ("Who made the very first of them", "dev")}
            ),
            "nearly the same query in several splits",
            "warning",
            1,
        ),
        (collection(qrels={"q1": {"gone": 1, "d1": 1}, "q2": {"d2": 1}}), "grades of unknown documents", "warning", 1),
        (collection(qrels={"gone": {"d1": 1}}), "grades of unknown queries", "warning", 1),
        (collection(qrels={"q1": {"d1": 0}, "q2": {"d2": 1}}), "queries with grades, none above 0", "note", 1),
        (collection(qrels={"q1": {"d1": 1}}), "queries without grades", "note", 1),
        (
            collection(qrels={"q1": {"d1": 1}, "q2": {"d1": 2, "d2": 1}}),
            "test queries whose relevant document was a training positive",
            "warning",
            1,
        ),
        (
            collection({"d1": LOREM, "d2": LOREM + " indeed"}),
            "test queries whose relevant document is nearly a training positive",
            "warning",
            1,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_found(found: Collection, name: str, level: str, count: int) -> None:
    report = check(found)
    finding = report.finding(name)
    assert finding is not None, str(report)
    assert (finding.count, finding.level) == (count, level)
    assert finding.examples
    assert f"{name}: {count}" in str(report)
    assert check(collection()).finding(name) is None


def test_a_query_graded_in_two_splits_is_a_problem() -> None:
    plain = collection()
    leaky = Collection(plain.documents, plain.queries, plain.qrels, {"q1": ("train", "test"), "q2": ("test",)})
    assert [finding.name for finding in check(leaky).problems] == ["the same query in several splits"]


def test_candidates() -> None:
    run = [
        Candidate("q1", "d1", 1, 1.0),
        Candidate("q1", "gone", 2, 0.5),
        Candidate("unknown", "d1", 1, 1.0),
    ]
    report = check(collection(qrels={"q1": {"d1": 1, "d2": 1}}), run)
    counts = {finding.name: finding.count for finding in report.findings}
    assert counts["queries without candidates"] == 1
    assert counts["unknown candidates"] == 1
    assert counts["candidates of unknown queries"] == 1
    assert report.counts["relevant among candidates"] == 0.5
    assert recall(collection(), []) == 0.0


def test_leakage() -> None:
    assert leakage(collection()) == 0.0
    assert leakage(collection(qrels={"q1": {"d1": 1}, "q2": {"d1": 1}})) == 1.0
    # A document that was judged not relevant in training gives nothing away.
    assert leakage(collection(qrels={"q1": {"d1": 0, "d3": 1}, "q2": {"d1": 1}})) == 0.0
    assert leakage(collection(qrels={})) == 0.0


# Near-duplicates


def jaccard(one: str, other: str, run: int) -> float:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        size = min(run, len(words))
        return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}

    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=40).map(" ".join), max_size=6), st.integers(1, 3))
def test_groups_hold_only_what_is_near(texts: list[str], run: int) -> None:
    """Whatever MinHash proposes is compared in full: each member is near another one of its group."""
    by_id = {str(n): text for n, text in enumerate(texts)}
    for group in near_duplicates(by_id, 0.8, run):
        for id in group:
            assert any(jaccard(by_id[id], by_id[other], run) >= 0.8 for other in group if other != id)


def test_near_pairs_are_found() -> None:
    """Of pairs with an index of .8 or more hardly one in a thousand is missed."""
    draw = random.Random(0)
    texts, pairs = {}, 0
    for n in range(400):
        words = [str(draw.randrange(100_000)) for _ in range(80)]
        edited = list(words)
        edited[draw.randrange(80)] = "edited"
        texts[f"{n}a"], texts[f"{n}b"] = " ".join(words), " ".join(edited)
        pairs += jaccard(texts[f"{n}a"], texts[f"{n}b"], 3) >= 0.8
    found = near_duplicates(texts, 0.8)
    assert pairs == 400
    assert len(found) >= 399
    assert all(len(group) == 2 for group in found)


def test_a_thousand_copies_do_not_take_a_million_comparisons() -> None:
    texts = {str(n): LOREM + f" {n}" for n in range(1000)}
    before = time.process_time()
    assert len(near_duplicates(texts, 0.8)) == 1
    assert time.process_time() - before < 2
