"""From judgments to what the fits read: preferences, grades, and both as arrays."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from zelo_train import chance
from zelo_train.records import Form, Grade, Judgment, Kind, Preference

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

# A judge's tokens can claim .99999, which no judge deserves: one such answer would outweigh all others about a document.
SOFT_LEAST = 0.01


def preferences(judgments: Iterable[Judgment]) -> Iterator[Preference]:
    """What answered comparisons say about pairs, one after another.

    A failure is no answer and leaves no trace. SOFT and VOTE give one preference each (a tie is half a win); an ORDER of k
    documents gives its k(k-1)/2 pairs at weight 2/k, so that it counts as k - 1 answers. The same question to the same judge
    counts once: at temperature 0 asking again tells nothing new. The swapped question is another question and counts.
    """
    seen: defaultdict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
    for judgment in judgments:
        question = judgment.question
        if question.kind is not Kind.COMPARE or not judgment.answered:
            continue
        query, shown = question.query, question.documents
        if shown in seen[judgment.judge, query]:
            continue
        seen[judgment.judge, query].add(shown)
        if judgment.form is Form.ORDER:
            place = {document: rank for rank, document in enumerate(judgment.order)}
            for i, j in combinations(range(len(shown)), 2):
                yield Preference(judgment.judge, query, shown[i], shown[j], float(place[i] < place[j]), 2 / len(shown))
        elif judgment.value is not None:
            value = judgment.value if judgment.form is Form.VOTE else min(max(judgment.value, SOFT_LEAST), 1 - SOFT_LEAST)
            yield Preference(judgment.judge, query, shown[0], shown[1], value)


def grades(judgments: Iterable[Judgment]) -> list[Grade]:
    """The answered grades; the same document graded twice by the same judge for the same query counts once."""
    found: dict[tuple[str, str, str], Grade] = {}
    for judgment in judgments:
        if judgment.question.kind is Kind.GRADE and judgment.answered and judgment.value is not None:
            (document,) = judgment.question.documents
            grade = Grade(judgment.judge, judgment.question.query, document, judgment.value)
            found.setdefault((grade.judge, grade.query, grade.document), grade)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Answers:
    """Preferences as arrays: K answers by G judges about D documents of Q queries.

    Attributes:
        queries: (Q) ids.
        documents: (D) ids, query after query.
        start: (Q + 1) where each query's documents start in `documents`.
        judges: (G) names.
        query: (K) index into `queries`, ascending.
        left, right: (K) indices into `documents`; left was shown first.
        judge: (K) index into `judges`.
        p: (K) P(left more relevant), votes too, clipped to [.01, .99] only where it is neither 0, .5 nor 1.
        weight: (K) how many answers it counts as.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    start: Indices
    judges: tuple[str, ...]
    query: Indices
    left: Indices
    right: Indices
    judge: Indices
    p: Floats
    weight: Floats

    @property
    def sizes(self) -> Indices:
        """(Q) how many documents each query has."""
        return np.diff(self.start)

    @property
    def owner(self) -> Indices:
        """(D) whose document it is: index into `queries`."""
        return np.repeat(np.arange(len(self.queries)), self.sizes)

    @property
    def pair(self) -> Indices:
        """(K) a number for the unordered pair that was asked about, the same for both orders and all judges."""
        low, high = np.minimum(self.left, self.right), np.maximum(self.left, self.right)
        return low * len(self.documents) + high

    def only(self, rows: NDArray[np.bool_]) -> Answers:
        """The same documents and judges with fewer answers; rows: (K) which to keep."""
        return Answers(
            self.queries,
            self.documents,
            self.start,
            self.judges,
            self.query[rows],
            self.left[rows],
            self.right[rows],
            self.judge[rows],
            self.p[rows],
            self.weight[rows],
        )

    def of_queries(self, chosen: Indices) -> Answers:
        """Only these queries (ascending indices) with their documents and answers."""
        kept = np.zeros(len(self.queries), bool)
        kept[chosen] = True
        return self.of_documents(kept[self.owner])

    def of_documents(self, kept: NDArray[np.bool_]) -> Answers:
        """Only these documents, the queries that keep any, and the answers about two of them; kept: (D)."""
        owner = self.owner
        sizes = np.bincount(owner[kept], minlength=len(self.queries))
        queries = np.flatnonzero(sizes)
        new_query = np.cumsum(sizes > 0) - 1
        new_document = np.cumsum(kept) - 1
        rows = kept[self.left] & kept[self.right]
        return Answers(
            tuple(self.queries[q] for q in queries),
            tuple(self.documents[d] for d in np.flatnonzero(kept)),
            np.concatenate([[0], np.cumsum(sizes[queries])]),
            self.judges,
            new_query[self.query[rows]],
            new_document[self.left[rows]],
            new_document[self.right[rows]],
            self.judge[rows],
            self.p[rows],
            self.weight[rows],
        )

    def keys(self) -> chance.Keys:
        """(D) a key per document that depends on the query's and the document's id alone."""
        query = np.array([chance.key(query) for query in self.queries], np.uint64)
        document = np.array([chance.key(document) for document in self.documents], np.uint64)
        return chance.mix(query[self.owner], document)


def soft_clipped(p: Floats) -> Floats:
    """Soft probabilities within [.01, .99]; votes (0, .5, 1) as they are."""
    return np.where((p == 0) | (p == 1), p, np.clip(p, SOFT_LEAST, 1 - SOFT_LEAST))


def answers_of(preferences: Iterable[Preference], candidates: Mapping[str, Sequence[str]] | None = None) -> Answers:
    """Preferences as arrays.

    Args:
        preferences: in any order; for one pair any number of judges and both orders.
        candidates: query → its documents, also those no answer speaks of. Without it, a query's documents are those that
            its preferences name.

    Raises:
        ValueError: a preference outside [0, 1], a weight that is not positive, a document against itself, or a document that is
            not among its query's candidates.
    """
    places: dict[str, dict[str, int]] = {}
    for query, documents in (candidates or {}).items():
        places[query] = {document: place for place, document in enumerate(dict.fromkeys(documents))}
    judges: dict[str, int] = {}
    queries: dict[str, int] = {query: index for index, query in enumerate(places)}
    # Eight bytes a value; in lists they would be objects.
    query_rows, left_rows, right_rows, judge_rows = (array("q") for _ in range(4))
    p_rows, weight_rows = array("d"), array("d")
    for preference in preferences:
        query, left, right = preference.query, preference.left, preference.right
        own = places.get(query)
        if own is None:
            if candidates is not None:
                raise ValueError(
                    f"a preference about query {query!r}, which has no candidates: add them or drop the preference"
                )
            own = places[query] = {}
            queries[query] = len(queries)
        if left == right:
            raise ValueError(f"query {query!r}: document {left!r} was compared with itself; two documents were expected")
        if candidates is not None and (left not in own or right not in own):
            stranger = right if left in own else left
            raise ValueError(f"query {query!r}: document {stranger!r} was compared but is none of its candidates")
        query_rows.append(queries[query])
        left_rows.append(own.setdefault(left, len(own)))
        right_rows.append(own.setdefault(right, len(own)))
        judge_rows.append(judges.setdefault(preference.judge, len(judges)))
        p_rows.append(preference.p)
        weight_rows.append(preference.weight)
    p, weight = np.array(p_rows, np.float64), np.array(weight_rows, np.float64)
    # Written so that nan is refused too.
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("a preference lies outside [0, 1]: P(left more relevant) was expected")
    if not np.all((weight > 0) & np.isfinite(weight)):
        raise ValueError("a preference's weight is not positive: leave the preference out instead")
    start = np.concatenate([[0], np.cumsum([len(own) for own in places.values()], dtype=np.int64)]).astype(np.int64)
    query_index = np.array(query_rows, np.int64)
    order = np.argsort(query_index, kind="stable")
    query_index = query_index[order]
    first = start[query_index]
    return Answers(
        tuple(places),
        tuple(document for own in places.values() for document in own),
        start,
        tuple(judges),
        query_index,
        first + np.array(left_rows, np.int64)[order],
        first + np.array(right_rows, np.int64)[order],
        np.array(judge_rows, np.int64)[order],
        soft_clipped(p)[order],
        weight[order],
    )
