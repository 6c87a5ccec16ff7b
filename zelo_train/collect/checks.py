"""What is wrong with a collection, told before money is spent on it. Nothing is dropped here or anywhere in silence."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zelo_train.collect.collection import Collection, normalised
from zelo_train.records import Candidate, Split

if TYPE_CHECKING:
    import numpy as np

Level = Literal["problem", "warning", "note"]

SHOWN = 3

# A document from here on is named in full; longer ids are cut in the report.
_ID_WIDTH = 48

_WORD = re.compile(r"\w+")

# 16 bands of 4: a pair that shares .8 of its word triples is missed once in 5,000 times, one that shares .3 met once in 8.
_BANDS, _ROWS = 16, 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: what it is.
        count: how many there are.
        total: of how many; 0 for what is said of the whole collection.
        level: "problem" makes figures wrong or money wasted, "warning" may, "note" is worth knowing.
        examples: a few ids.
        advice: what it means and what to do.
    """

    name: str
    count: int
    total: int
    level: Level
    examples: tuple[str, ...]
    advice: str

    def __str__(self) -> str:
        mark = {"problem": "!!", "warning": " !", "note": "  "}[self.level]
        if not self.total:
            return f"{mark} {self.name}\n     {self.advice}"
        share = f" ({self.count / self.total:.1%})"
        shown = ", ".join(id if len(id) <= _ID_WIDTH else id[: _ID_WIDTH - 1] + "…" for id in self.examples)
        return f"{mark} {self.name}: {self.count:,} of {self.total:,}{share}\n     {self.advice}\n     for example: {shown}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, and what a collection consists of."""

    counts: Mapping[str, int | float]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Those that make figures wrong or waste money."""
        return tuple(finding for finding in self.findings if finding.level == "problem")

    def finding(self, name: str) -> Finding | None:
        """The one of that name, or None where nothing of it was found."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def __str__(self) -> str:
        shown = {name: f"{value:.3f}" if isinstance(value, float) else f"{value:,}" for name, value in self.counts.items()}
        wide, right = max(map(len, shown), default=0), max(map(len, shown.values()), default=0)
        counts = [f"{name:{wide}}  {value:>{right}}" for name, value in shown.items()]
        order: tuple[Level, ...] = ("problem", "warning", "note")
        found = [str(one) for level in order for one in self.findings if one.level == level]
        by_level = Counter(finding.level for finding in self.findings)
        total = ", ".join(f"{by_level[level]} {level}{'' if by_level[level] == 1 else 's'}" for level in order)
        return "\n".join([*counts, "", *found, *([""] if found else []), f"checks: {total}"])


def check(
    collection: Collection,
    candidates: Iterable[Candidate] | None = None,
    *,
    long_words: int = 1000,
    long_query_words: int = 64,
    near_duplicate: float = 0.8,
) -> Report:
    """Look a collection over.

    Args:
        collection: what was read.
        candidates: what will be judged, if it is known.
        long_words: a document with more is over-long.
        long_query_words: a query with more is over-long.
        near_duplicate: share of common word triples (of common words, for queries) from which two are near-duplicates.

    Returns:
        Counts and findings; a finding with nothing in it is left out.
    """
    listed = list(candidates) if candidates is not None else None
    found = [
        *_documents(collection, long_words, near_duplicate),
        *_queries(collection, long_query_words, near_duplicate),
        *_qrels(collection),
        *_leaks(collection, near_duplicate),
        *(_candidates(collection, listed) if listed is not None else ()),
    ]
    return Report(_counts(collection, listed), tuple(finding for finding in found if finding.count))


def _found(name: str, ids: Iterable[str], total: int, level: Level, advice: str) -> Finding:
    listed = list(ids)
    return Finding(name, len(listed), total, level, tuple(listed[:SHOWN]), advice)


def _counts(collection: Collection, candidates: Sequence[Candidate] | None) -> dict[str, int | float]:
    counts: dict[str, int | float] = {"documents": len(collection.documents), "queries": len(collection.queries)}
    split_of = Counter(query.split for query in collection.queries.values())
    for split in ("train", "dev", "test"):
        if split_of[split]:
            counts[f"queries, {split}"] = split_of[split]
    synthetic = sum(query.synthetic for query in collection.queries.values())
    if synthetic:
        counts["queries, synthetic"] = synthetic
    if collection.qrels:
        counts["grades"] = sum(map(len, collection.qrels.values()))
        counts["grades above 0"] = sum(grade > 0 for grades in collection.qrels.values() for grade in grades.values())
        counts["leakage"] = leakage(collection)
    if candidates is not None:
        counts["candidates"] = len(candidates)
        if collection.qrels:
            counts["relevant among candidates"] = recall(collection, candidates)
    return counts


def _documents(collection: Collection, long_words: int, near: float) -> Iterator[Finding]:
    documents = collection.documents.values()
    total = len(documents)
    yield _found(
        "empty documents",
        (document.id for document in documents if not document.full_text.strip()),
        total,
        "warning",
        "They can be no candidates. Look at how the texts were read; a scanned file has none.",
    )
    yield _found(
        "over-long documents",
        (document.id for document in documents if len(document.text.split()) > long_words),
        total,
        "warning",
        f"More than {long_words:,} words. Judges and rerankers read their beginning only: cut them into smaller documents.",
    )
    groups = _groups({document.id: normalised(document.full_text) for document in documents if document.full_text.strip()})
    yield _found(
        "duplicate documents",
        (id for group in groups for id in group[1:]),
        total,
        "warning",
        "Equal to an earlier one, case and spaces aside. They are judged against each other, which is money for nothing.",
    )
    first = [group[0] for group in groups]
    alone = {document.id: document.full_text for document in documents if document.full_text.strip()}
    for group in groups:
        for id in group[1:]:
            alone.pop(id)
    near_groups = near_duplicates(alone, near)
    yield _found(
        "near-duplicate documents",
        (id for group in near_groups for id in group[1:]),
        total,
        "warning",
        f"Share at least {near:.0%} of word triples with an earlier one. Pairs of them are hard to judge and teach little.",
    )
    torn = [
        f"{query}: {', '.join(sorted(graded))}"
        for query, grades in collection.qrels.items()
        for graded in _differently_graded(grades, {id: group[0] for group in groups for id in group})
    ]
    if first:
        yield _found(
            "equal documents with different grades",
            torn,
            len(collection.qrels),
            "problem",
            "No reranker can tell them apart: give them one grade.",
        )


def _differently_graded(grades: Mapping[str, int], first: Mapping[str, str]) -> Iterator[list[str]]:
    same: dict[str, list[str]] = defaultdict(list)
    for document in grades:
        if document in first:
            same[first[document]].append(document)
    for documents in same.values():
        if len({grades[document] for document in documents}) > 1:
            yield documents


def _queries(collection: Collection, long_words: int, near: float) -> Iterator[Finding]:
    queries = collection.queries.values()
    total = len(queries)
    if not total:
        advice = (
            "There is nothing to judge. Name a file of them: collect.queries; or have a model write some: collect.synthetic."
        )
        yield Finding("no queries", 1, 0, "problem", (), advice)
    yield _found(
        "empty queries",
        (query.id for query in queries if not query.text.strip()),
        total,
        "problem",
        "There is nothing to judge: remove them.",
    )
    yield _found(
        "over-long queries",
        (query.id for query in queries if len(query.text.split()) > long_words),
        total,
        "warning",
        f"More than {long_words} words. Each is read again with every document: see whether a whole document was meant.",
    )
    split = {query.id: query.split for query in queries}
    texts = {query.id: normalised(query.text) for query in queries if query.text.strip()}
    groups = _groups(texts)
    yield _found(
        "duplicate queries",
        (id for group in groups for id in group[1:]),
        total,
        "warning",
        "Equal to an earlier one, case and spaces aside. They count twice in figures.",
    )
    across = [group for group in groups if len({split[id] for id in group}) > 1]
    within = {id: place for place, group in enumerate(across) for id in group}
    yield _found(
        "the same query in several splits",
        [
            *(" = ".join(group) for group in across),
            *(f"{id} ({', '.join(found)})" for id, found in collection.splits.items() if len(found) > 1),
        ],
        total,
        "problem",
        "What is evaluated was trained on, so figures are too good: keep each in one split.",
    )
    near_across = [
        group
        for group in near_duplicates(texts, near, run=1)
        if len({split[id] for id in group}) > 1 and len({within.get(id, -1) for id in group} - {-1}) != 1
    ]
    yield _found(
        "nearly the same query in several splits",
        (" ~ ".join(group[:2]) for group in near_across),
        total,
        "warning",
        f"Share at least {near:.0%} of their words: see whether they ask the same.",
    )


def _qrels(collection: Collection) -> Iterator[Finding]:
    if not collection.qrels:
        return
    graded = [(query, document) for query, grades in collection.qrels.items() for document in grades]
    yield _found(
        "grades of unknown documents",
        (f"{query}: {document}" for query, document in graded if document not in collection.documents),
        len(graded),
        "warning",
        "They cannot be found, which holds down every figure: see whether the corpus is whole.",
    )
    yield _found(
        "grades of unknown queries",
        (query for query in collection.qrels if query not in collection.queries),
        len(collection.qrels),
        "warning",
        "They are left unused: see whether the queries are whole.",
    )
    yield _found(
        "queries with grades, none above 0",
        (query for query in collection.qrels if query in collection.queries and not collection.relevant(query)),
        len(collection.queries),
        "note",
        "NDCG leaves them out; calibration and thresholds need such queries.",
    )
    yield _found(
        "queries without grades",
        (query for query in collection.queries if not collection.qrels.get(query)),
        len(collection.queries),
        "note",
        "Judges can rate them; figures from grades leave them out.",
    )


def _leaks(collection: Collection, near: float) -> Iterator[Finding]:
    tested = _evaluated(collection, "test")
    if not tested or not _evaluated(collection, "train"):
        return
    advice = "A document that was relevant in training is relevant to them: give figures also on the other queries."
    positives = {document for query in _evaluated(collection, "train") for document in collection.relevant(query)}
    yield _found(
        "test queries whose relevant document was a training positive",
        (query for query in tested if not positives.isdisjoint(collection.relevant(query))),
        len(tested),
        "warning",
        advice,
    )
    asked = {document for query in tested for document in collection.relevant(query)}
    texts = {id: collection.documents[id].full_text for id in positives | asked if id in collection.documents}
    twins: dict[str, set[str]] = defaultdict(set)
    for group in near_duplicates(dict(sorted(texts.items())), near):
        for id in group:
            twins[id].update(set(group) - {id})
    yield _found(
        "test queries whose relevant document is nearly a training positive",
        (
            query
            for query in tested
            if positives.isdisjoint(collection.relevant(query))
            and any(not positives.isdisjoint(twins[document]) for document in collection.relevant(query))
        ),
        len(tested),
        "warning",
        f"The same by way of a document that shares at least {near:.0%} of its word triples.",
    )


def _evaluated(collection: Collection, split: Split) -> list[str]:
    return [query for query in collection.of_split(split) if collection.relevant(query)]


def leakage(collection: Collection) -> float:
    """The share of test queries of which a relevant document was relevant to a training query, too; 0 without test queries."""
    tested = _evaluated(collection, "test")
    positives = {document for query in collection.of_split("train") for document in collection.relevant(query)}
    return sum(not positives.isdisjoint(collection.relevant(query)) for query in tested) / len(tested) if tested else 0.0


def recall(collection: Collection, candidates: Iterable[Candidate]) -> float:
    """The share of relevant documents that are among a query's candidates, as a mean over queries with candidates."""
    found: dict[str, set[str]] = defaultdict(set)
    for candidate in candidates:
        found[candidate.query].add(candidate.document)
    shares = [
        len(found[query] & relevant.keys()) / len(relevant) for query in found if (relevant := collection.relevant(query))
    ]
    return sum(shares) / len(shares) if shares else 0.0


def _candidates(collection: Collection, candidates: Sequence[Candidate]) -> Iterator[Finding]:
    per_query = Counter(candidate.query for candidate in candidates)
    total = len(collection.queries)
    yield _found(
        "queries without candidates",
        (query for query in collection.queries if not per_query[query]),
        total,
        "warning",
        "Nothing was found for them, so nothing is judged. Dense candidates find documents that share no word.",
    )
    yield _found(
        "queries with one candidate",
        (query for query in collection.queries if per_query[query] == 1),
        total,
        "warning",
        "There is no pair to judge, so it stays unrated.",
    )
    yield _found(
        "candidates of unknown queries",
        dict.fromkeys(candidate.query for candidate in candidates if candidate.query not in collection.queries),
        len(per_query),
        "warning",
        "They are left out: see whether the run belongs to these queries.",
    )
    yield _found(
        "unknown candidates",
        (f"{one.query}: {one.document}" for one in candidates if one.document not in collection.documents),
        len(candidates),
        "warning",
        "They are left out, for there is no text to show: see whether the run belongs to this corpus.",
    )


# Duplicates


def _groups(texts: Mapping[str, str]) -> list[list[str]]:
    """Ids of equal texts, in order; only where there are several."""
    same: dict[str, list[str]] = defaultdict(list)
    for id, text in texts.items():
        same[text].append(id)
    return [group for group in same.values() if len(group) > 1]


def near_duplicates(texts: Mapping[str, str], threshold: float, run: int = 3) -> list[list[str]]:
    """Groups of texts that are nearly the same.

    Two texts are compared by the Jaccard index of their runs of words. Pairs worth comparing are found by MinHash (Broder,
    1997) in bands, each compared with the first of its bucket, so that a thousand copies cost a thousand comparisons.

    Args:
        texts: by id.
        threshold: the least share of runs in common.
        run: words in a run; shorter texts are one run.

    Returns:
        Ids in the order of `texts`, groups of at least two.
    """
    import numpy as np

    numbers: dict[str, int] = {}
    shingles: dict[str, np.ndarray] = {}
    for id, text in texts.items():
        words = np.array([numbers.setdefault(word, len(numbers) + 1) for word in _WORD.findall(text.lower())], dtype=np.uint64)
        if len(words):
            shingles[id] = np.unique(_runs(words, min(run, len(words))))
    rng = np.random.default_rng(0)
    size = _BANDS * _ROWS
    factors = rng.integers(1, 2**63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 2**63, size, dtype=np.uint64)
    leader = {id: id for id in shingles}

    def root(id: str) -> str:
        while leader[id] != id:
            leader[id] = leader[leader[id]]
            id = leader[id]
        return id

    buckets: dict[tuple[int, bytes], str] = {}
    for id, hashes in shingles.items():
        # The high bits of a product are its well mixed ones.
        smallest = ((hashes[:, None] * factors + offsets) >> np.uint64(32)).min(axis=0)
        for band in range(_BANDS):
            other = buckets.setdefault((band, smallest[band * _ROWS : (band + 1) * _ROWS].tobytes()), id)
            a, b = root(other), root(id)
            if a != b:
                common = len(np.intersect1d(shingles[other], hashes, assume_unique=True))
                if common >= threshold * (len(shingles[other]) + len(hashes) - common):
                    leader[b] = a
    groups: dict[str, list[str]] = defaultdict(list)
    for id in shingles:
        groups[root(id)].append(id)
    return [group for group in groups.values() if len(group) > 1]


def _runs(words: np.ndarray, run: int) -> np.ndarray:
    """One 64-bit number per run of words."""
    import numpy as np

    mixed = np.zeros(len(words) - run + 1, dtype=np.uint64)
    for at in range(run):
        # Multiplication by an odd constant and a shift, per word (Steele, Lea and Flood's SplitMix, 2014).
        mixed = (mixed ^ words[at : len(words) - run + 1 + at]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed
