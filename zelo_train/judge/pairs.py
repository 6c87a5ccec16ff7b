"""Which pairs are asked, and which document is shown first.

A round's plan is a value: stored before its first question, read back on resume. Everything drawn is keyed by seed, query and
document, so the same input gives the same plan.

    "cycle, then neighbours" (default), 3 rounds, N = 3n
        round 1        one seeded permutation ring; n = 2: one pair; n = 3: a triangle
        later rounds   sort by (−e, keyed hash); scan gap 1, 2, …, positions from the top; take a pair if unmet and both have
                       fewer than two pairs in this round; stop at n pairs
    "cycles"           the paper's: k/2 random n-cycles without a common edge; n = 100, k = 8: N = 400
    "information"      the pairs whose answers lower the top's uncertainty most
"""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF002

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from zelo_train import chance
from zelo_train.records import Comparison, Kind, Question

Floats = NDArray[np.float64]
Pair = tuple[str, str]

ROUNDS = 3
DEGREE = 8
# The paper's cycles avoid each other by exchanging documents; past this many tries some small n have no such cycle left.
_TRIES = 200
SWAPPED_SHARE = 0.05
REPEATED_SHARE = 0.01
TOP = 10


class Design(StrEnum):
    """How pairs are chosen."""

    NEIGHBOURS = "cycle, then neighbours"
    CYCLES = "cycles"
    INFORMATION = "information"


@dataclass(frozen=True, slots=True)
class Plan:
    """The pairs of one round of one query, each in no particular order; `shown` orders them for a judge."""

    query: str
    round: int
    pairs: tuple[Pair, ...]


def plan_round(
    design: Design,
    query: str,
    documents: Sequence[str],
    earlier: Sequence[Plan] = (),
    *,
    ratings: Sequence[float] | Floats | None = None,
    covariance: Floats | None = None,
    rounds: int = ROUNDS,
    degree: int = DEGREE,
    seed: int = 0,
) -> Plan | None:
    """The next round's plan, or None when the design is through.

    Args:
        design: how pairs are chosen.
        query: its id.
        documents: n ids, its candidates.
        earlier: this query's plans so far, in order. Failed pairs count as met and are not replaced.
        ratings: (n) e from the answers so far, at a = 1, b = ε = 0; needed from round 2 on. A document without
            a rating has nan, and counts as average.
        covariance: (n, n) of `ratings`, for INFORMATION.
        rounds: how many rounds in all; CYCLES has one.
        degree: pairs per document, for CYCLES.
        seed: of everything drawn.

    Raises:
        ValueError: a document twice, a round without its ratings, or a degree that is not even.
    """
    documents = tuple(documents)
    if len(set(documents)) < len(documents):
        raise ValueError(f"query {query!r} has a candidate twice: remove duplicates before planning")
    number = len(earlier) + 1
    if len(documents) < 2 or number > (1 if design is Design.CYCLES else rounds):
        return None
    if number == 1:
        pairs = cycles(query, documents, degree, seed) if design is Design.CYCLES else ring(query, documents, seed)
        return Plan(query, 1, tuple(pairs))
    if ratings is None or len(ratings) != len(documents):
        raise ValueError(f"query {query!r}: round {number} needs a rating for each of {len(documents)} documents")
    e = np.nan_to_num(np.asarray(ratings, np.float64), nan=0.0)
    met = [pair for plan in earlier for pair in plan.pairs]
    if design is Design.INFORMATION:
        if covariance is None:
            raise ValueError(f"query {query!r}: the design {design.value!r} needs the covariance of the ratings")
        pairs = informative(documents, e, covariance, met, count=max(len(documents) // 4, 1))
    else:
        pairs = neighbours(query, documents, e, met, seed=seed)
    return Plan(query, number, tuple(pairs)) if pairs else None


def ring(query: str, documents: Sequence[str], seed: int = 0) -> list[Pair]:
    """One seeded permutation ring: n pairs; one pair for n = 2, none for n = 1."""
    order = sorted(documents, key=lambda document: chance.key(seed, "ring", query, document))
    if len(order) < 3:
        return [(order[0], order[1])] if len(order) == 2 else []
    return list(zip(order, [*order[1:], order[0]], strict=True))


def cycles(query: str, documents: Sequence[str], degree: int = DEGREE, seed: int = 0) -> list[Pair]:
    """The paper's design: degree/2 random n-cycles, no pair twice, connected since each cycle is.

    For n documents there are at most (n − 1)/2 such cycles. Where the last ones cannot avoid the others, random pairs fill up
    to n · degree / 2, and at n <= degree + 1 every pair is asked.
    """
    if degree < 2 or degree % 2:
        raise ValueError(f"degree {degree}: an even number of pairs per document was expected, as each cycle gives two")
    n = len(documents)
    documents = sorted(documents, key=lambda document: chance.key(seed, "cycles", query, document))
    if n <= degree + 1:
        return [(documents[i], documents[j]) for i in range(n) for j in range(i + 1, n)]
    draw = np.random.default_rng(chance.key(seed, "cycles", query))
    met: set[tuple[int, int]] = set()
    pairs: list[Pair] = []
    for _ in range(degree // 2):
        order = _fresh_cycle(n, met, draw)
        for i, j in zip(order, [*order[1:], order[0]], strict=True):
            if _unordered(i, j) not in met:
                met.add(_unordered(i, j))
                pairs.append((documents[i], documents[j]))
    missing = n * degree // 2 - len(pairs)
    if missing:
        unmet = [(i, j) for i in range(n) for j in range(i + 1, n) if (i, j) not in met]
        pairs += [(documents[i], documents[j]) for i, j in draw.permutation(unmet)[:missing]]
    return pairs


def _fresh_cycle(n: int, met: set[tuple[int, int]], draw: np.random.Generator) -> list[int]:
    """A random n-cycle with as few pairs from `met` as exchanges of documents can reach, mostly none."""
    order = [int(place) for place in draw.permutation(n)]

    def clashes(places: Iterable[int]) -> int:
        return sum(_unordered(order[p % n], order[(p + 1) % n]) in met for p in set(p % n for p in places))

    for _ in range(_TRIES):
        bad = [p for p in range(n) if _unordered(order[p], order[(p + 1) % n]) in met]
        if not bad:
            break
        for p in bad:
            other = int(draw.integers(n))
            around = (p - 1, p, other - 1, other)
            before = clashes(around)
            order[p], order[other] = order[other], order[p]
            if clashes(around) > before:
                order[p], order[other] = order[other], order[p]
    return order


def neighbours(query: str, documents: Sequence[str], ratings: Floats, met: Collection[Pair], seed: int = 0) -> list[Pair]:
    """Up to n pairs of documents that stand close in the ratings and have not met; two per document where there are."""
    n = len(documents)
    order = sorted(range(n), key=lambda i: (-ratings[i], chance.key(seed, "tie", query, documents[i])))
    place = {documents[i]: position for position, i in enumerate(order)}
    seen = np.zeros((n, n), bool)
    for left, right in met:
        seen[place[left], place[right]] = seen[place[right], place[left]] = True
    taken = np.zeros(n, np.int64)
    pairs: list[Pair] = []
    for gap in range(1, n):
        for top in range(n - gap):
            if len(pairs) == n:
                return pairs
            if taken[top] < 2 and taken[top + gap] < 2 and not seen[top, top + gap]:
                pairs.append((documents[order[top]], documents[order[top + gap]]))
                taken[[top, top + gap]] += 1
    return pairs


def informative(
    documents: Sequence[str], ratings: Floats, covariance: Floats, met: Collection[Pair], count: int, top: int = TOP
) -> list[Pair]:
    """`count` unmet pairs, one after the other, each the one whose answer lowers the top's variance most.

    An answer about (i, j) lowers the variance of document d by

        f (Σ_di − Σ_dj)² / (1 + f · Var(e_i − e_j)),   f = E[F'(e_i − e_j)]

    summed with the weight P(d is among the top ten).
    """
    n = len(documents)
    sigma = np.array(covariance, np.float64)
    place = {document: i for i, document in enumerate(documents)}
    open_pair = np.triu(np.ones((n, n), bool), 1)
    for left, right in met:
        i, j = sorted((place[left], place[right]))
        open_pair[i, j] = False
    order = np.sort(ratings)[::-1]
    cut = order.mean() if n <= top else (order[top - 1] + order[top]) / 2
    weight = ndtr((ratings - cut) / np.sqrt(np.diag(sigma) + 1e-9))
    difference = ratings[:, None] - ratings
    pairs: list[Pair] = []
    while len(pairs) < count and open_pair.any():
        variance = np.diag(sigma)
        between = np.maximum(variance[:, None] + variance - 2 * sigma, 0)
        mean = expit(difference / np.sqrt(1 + np.pi * between / 8))
        fisher = mean * (1 - mean)
        weighted = sigma @ (weight[:, None] * sigma)
        own = np.diag(weighted)
        gain = fisher * (own[:, None] + own - 2 * weighted) / (1 + fisher * between)
        i, j = divmod(int(np.argmax(np.where(open_pair, gain, -np.inf))), n)
        pairs.append((documents[i], documents[j]))
        open_pair[i, j] = False
        column = sigma[:, i] - sigma[:, j]
        sigma -= fisher[i, j] * np.outer(column, column) / (1 + fisher[i, j] * between[i, j])
    return pairs


def shown(judge: str, plans: Sequence[Plan], seed: int = 0) -> Iterator[tuple[int, Comparison]]:
    """(round, comparison) for each planned pair of one query, in the order of the plans, as this judge is asked.

    First comes the document that this judge has been shown first less often (first − second count), ties by keyed hash, never
    by rating: in a ring each document is then first once and second once.
    """
    balance: dict[str, int] = {}
    for plan in plans:
        for one, other in plan.pairs:
            lead = balance.get(one, 0) - balance.get(other, 0)
            if not lead:
                drawn = (chance.key(seed, "first", judge, plan.query, *sorted((one, other)), name) for name in (one, other))
                lead = 1 if next(drawn) > next(drawn) else -1
            first, second = (one, other) if lead < 0 else (other, one)
            balance[first] = balance.get(first, 0) + 1
            balance[second] = balance.get(second, 0) - 1
            yield plan.round, Comparison(plan.query, first, second)


@dataclass(frozen=True, slots=True)
class Audits:
    """What is asked beyond the plan, to know a judge: about 5 % of round 1's pairs swapped, 1 % once more."""

    swapped: tuple[Comparison, ...]
    repeated: tuple[Comparison, ...]


def audits(judge: str, plans: Sequence[Plan], seed: int = 0) -> Audits:
    """This judge's audits of one query's round 1; whether a pair is audited depends on the pair alone, not on the judge."""
    swapped, repeated = [], []
    for number, comparison in shown(judge, plans[:1], seed):
        low, high = sorted((comparison.left, comparison.right))
        draw = chance.key(seed, "audit", comparison.query, low, high) / 2**64
        if number == 1 and draw < SWAPPED_SHARE:
            swapped.append(comparison.swapped)
        elif number == 1 and draw < SWAPPED_SHARE + REPEATED_SHARE:
            repeated.append(comparison)
    return Audits(tuple(swapped), tuple(repeated))


def windows(
    query: str,
    documents: Sequence[str],
    k: int,
    round: int = 1,
    ratings: Sequence[float] | Floats | None = None,
    seed: int = 0,
) -> list[Question]:
    """Questions about k documents at a time.

    Round 1 lays windows round a seeded ring, each sharing one document with the next. Later rounds lay them down the rating
    order, shifted by ⌊(k − 1)/2⌋ against the round before, so that what was a seam becomes a middle. Within a window documents
    are shown in keyed order, which says nothing about their ratings. k = 2 gives the ring of pairs.

    Raises:
        ValueError: k below 2, or a later round without ratings.
    """
    if k < 2:
        raise ValueError(f"k = {k}: a comparison needs at least 2 documents")
    n, step = len(documents), k - 1
    if n < 2:
        return []
    if round == 1:
        order = sorted(documents, key=lambda document: chance.key(seed, "ring", query, document))
        if n <= k:
            spans = [order]
        else:
            # Two windows are tied by the document they share; closing the ring would make them share another.
            closed = [*order, order[0]] if n > 2 * step else order
            spans = [closed[begin : begin + k] for begin in range(0, len(closed) - 1, step)]
    else:
        if ratings is None or len(ratings) != n:
            raise ValueError(f"query {query!r}: round {round} needs a rating for each of {n} documents")
        ranked = sorted(range(n), key=lambda i: (-ratings[i], chance.key(seed, "tie", query, documents[i])))
        order = [documents[i] for i in ranked]
        shift = (round - 1) * (step // 2) % step
        spans = [order[max(begin, 0) : begin + k] for begin in range(-shift, n - 1, step)]
    return [
        Question(
            Kind.COMPARE,
            (query,),
            tuple(sorted(span, key=lambda document: chance.key(seed, "window", query, round, place, document))),
        )
        for place, span in enumerate(spans)
        if len(span) > 1
    ]


def cross_pairs(
    ranked: Sequence[tuple[str, Sequence[str]]], per_query: int = 4, seed: int = 0, ranks: Sequence[int] = (1, 4, 10, 20)
) -> list[Question]:
    """Questions whether one query's document fits it better than another query's document fits that one.

    Args:
        ranked: (query, its documents from best to worst by rating).
        per_query: questions per query, even: each ring over the queries gives two.
        seed: of the rings and of the ranks drawn.
        ranks: from which of its ranks a query's document is drawn.

    Returns:
        Questions whose graph over queries is connected; none twice.
    """
    if per_query < 2 or per_query % 2:
        raise ValueError(f"per_query = {per_query}: an even number was expected, as each ring over the queries gives two")
    questions: dict[tuple[Pair, Pair], Question] = {}
    usable = {query: documents for query, documents in ranked if documents}
    for turn in range(per_query // 2):
        # Another salt makes another ring.
        for one, other in ring(f"cross {turn}", list(usable), seed):
            sides = []
            for query in (one, other):
                documents = usable[query]
                pick = chance.key(seed, "cross", turn, one, other, query)
                sides.append((query, documents[min(ranks[pick % len(ranks)], len(documents)) - 1]))
            if chance.key(seed, "cross first", turn, one, other) % 2:
                sides.reverse()
            (first_query, first), (second_query, second) = sides
            unordered = (min(sides), max(sides))
            questions.setdefault(unordered, Question(Kind.CROSS, (first_query, second_query), (first, second)))
    return list(questions.values())


def _unordered(i: int, j: int) -> tuple[int, int]:
    return (i, j) if i < j else (j, i)
