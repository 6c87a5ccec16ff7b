"""What a run of judging says about its judges: who failed, who looks at the order, who cannot tell.

position   the share of answers that prefer the document shown first; .5 is fair, for every document is first as often as second
flips      of pairs asked in both orders, the share in which the answer follows the place and not the document
repeats    of questions asked twice, the share answered otherwise the second time
longer     the share of answers that prefer the longer document
self       the share of answers that a judge's other answers foretell: who won more elsewhere wins here
others     the share of answers in which the other judges' mean agrees
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from zelo_train.cost import money
from zelo_train.records import Form, Judgment, Kind, Status

# Fewer answers than this name nobody.
ENOUGH = 50
# A judge that shows one of these is named; no honest judge came near in simulation (position: .65 at b = 1).
ALWAYS = 0.95
MUCH_POSITION = 0.15
MUCH_REFUSED = 0.05
# Standard errors from .5 within which a share tells nothing.
SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class Share:
    """Of `of` cases, `count`; ties count half."""

    count: float = 0.0
    of: int = 0

    @property
    def share(self) -> float:
        """Between 0 and 1; NaN of none."""
        return self.count / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 per cent, after Wilson (1927)."""
        if not self.of:
            return 0.0, 1.0
        z, n, p = 1.96, self.of, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def like_chance(self) -> bool:
        """Whether a coin would give as much: less than three standard errors above one half."""
        return self.of >= ENOUGH and self.share - 0.5 < SIGMAS * 0.5 / math.sqrt(self.of)

    def __str__(self) -> str:
        return f"{self.share:.2f} of {self.of}" if self.of else "not asked"


@dataclass(frozen=True)
class JudgeReport:
    """One judge; the shares are explained above.

    Attributes:
        judge: its name.
        simulated: drawn from qrels.
        statuses: questions by how they ended.
        tries, tokens_in, tokens_cached, tokens_out, cost: over all questions.
        position, flips, repeats, longer, self, others: see the module.
        cut: documents that were longer than it reads.
        reasons: an example for each kind of failure.
    """

    judge: str
    simulated: bool
    statuses: Mapping[Status, int]
    tries: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    cost: int
    position: Share
    flips: Share
    repeats: Share
    longer: Share
    itself: Share
    others: Share
    cut: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def questions(self) -> int:
        """All that are final."""
        return sum(self.statuses.values())

    @property
    def refused(self) -> Share:
        """Refusals and answers that could not be read, of all questions."""
        return Share(self.statuses.get(Status.REFUSED, 0) + self.statuses.get(Status.UNPARSABLE, 0), self.questions)

    @property
    def without_answer(self) -> Share:
        """Everything that is no answer, of all questions."""
        return Share(self.questions - self.statuses.get(Status.OK, 0), self.questions)

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with this judge, in words; empty if nothing was found."""
        found = []
        if self.position.of >= ENOUGH and self.position.share >= ALWAYS:
            found.append(f"prefers the first document always ({self.position}): it does not read them")
        elif self.position.of >= ENOUGH and self.position.share <= 1 - ALWAYS:
            found.append(f"prefers the second document always ({self.position}): it does not read them")
        elif self.longer.of >= ENOUGH and self.longer.share >= ALWAYS:
            found.append(f"prefers the longer document always ({self.longer}): it judges length")
        elif self.longer.of >= ENOUGH and self.longer.share <= 1 - ALWAYS:
            found.append(f"prefers the shorter document always ({self.longer} for the longer): it judges length")
        elif self._random:
            found.append(f"answers at random: {self._random}")
        elif self.position.of >= ENOUGH and abs(self.position.share - 0.5) > MUCH_POSITION:
            found.append(f"looks at the order: {self.position} for the first document, expected .5")
        if self.refused.of >= ENOUGH and self.refused.share > MUCH_REFUSED:
            found.append(f"gives no answer that can be read to {self.refused} questions")
        return tuple(found)

    @property
    def _random(self) -> str:
        """The evidence that it tosses coins, if all there is says so."""
        signs = {
            "the other judges agree in": self.others,
            "its own other answers foretell": self.itself,
        }
        told = {words: share for words, share in signs.items() if share.of >= ENOUGH}
        if told and all(share.like_chance for share in told.values()):
            return ", ".join(f"{words} {share}" for words, share in told.items())
        if not told and self.flips.of >= ENOUGH and Share(self.flips.of - self.flips.count, self.flips.of).like_chance:
            return f"asked in the other order it prefers another document in {self.flips}"
        return ""

    def lines(self, currency: str = "") -> list[str]:
        """For people."""
        failed = ", ".join(f"{count} {status.value}" for status, count in self.statuses.items() if status is not Status.OK)
        lines = [
            f"{self.judge}{' (SIMULATED from qrels)' if self.simulated else ''}: {self.statuses.get(Status.OK, 0):,} of "
            f"{self.questions:,} questions answered{f' ({failed})' if failed else ''}, {self.tries:,} tries, "
            f"{self.tokens_in + self.tokens_out:,} tokens, {money(self.cost, currency)}",
            f"  first preferred {self.position}; flipped with the order {self.flips}; "
            f"other answer when repeated {self.repeats}",
            f"  longer preferred {self.longer}; foretold by itself {self.itself}; agrees with the others {self.others}",
        ]
        if self.cut:
            lines.append(f"  {self.cut:,} documents were cut to what it reads; the student must read them cut alike")
        lines += [f"  {kind}: {reason}" for kind, reason in self.reasons.items()]
        lines += [f"  ! {self.judge} {fault}" for fault in self.faults]
        return lines


@dataclass(frozen=True)
class Report:
    """All judges.

    Attributes:
        judges: one report each, in the order of their first judgment.
    """

    judges: tuple[JudgeReport, ...]

    @property
    def simulated(self) -> bool:
        """Whether any judge was."""
        return any(judge.simulated for judge in self.judges)

    def __getitem__(self, judge: str) -> JudgeReport:
        """A judge's report by name."""
        return next(report for report in self.judges if report.judge == judge)

    def lines(self, currency: str = "") -> list[str]:
        """For people; the first line says so if any judge was simulated."""
        lines = [line for judge in self.judges for line in judge.lines(currency)]
        if self.simulated:
            lines.insert(0, "SIMULATED: judges drawn from qrels; this says nothing about language models.")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def report(
    judgments: Iterable[Judgment],
    length: Callable[[str], int] | None = None,
    *,
    cut: Mapping[str, int] | None = None,
    reasons: Mapping[str, Mapping[str, str]] | None = None,
) -> Report:
    """What judgments say about their judges.

    Args:
        judgments: of any number of judges, failures and audits included.
        length: from a document's id to the length of its text; without it nothing is said about lengths.
        cut: documents that were longer than a judge reads, by judge: `Ensemble.cut`.
        reasons: an example for each kind of failure, by judge: `Ensemble.reasons`.
    """
    by_judge: dict[str, list[Judgment]] = {}
    for judgment in judgments:
        by_judge.setdefault(judgment.judge, []).append(judgment)
    pairs = {judge: _pairs(rows) for judge, rows in by_judge.items()}
    means = _means(pairs)
    return Report(
        tuple(
            JudgeReport(
                judge=judge,
                simulated=any(row.simulated for row in rows),
                statuses=Counter(row.status for row in rows),
                tries=sum(row.tries for row in rows),
                tokens_in=sum(row.tokens_in for row in rows),
                tokens_cached=sum(row.tokens_cached for row in rows),
                tokens_out=sum(row.tokens_out for row in rows),
                cost=sum(row.cost for row in rows),
                position=_position(pairs[judge]),
                flips=_flips(pairs[judge]),
                repeats=_repeats(rows),
                longer=Share() if length is None else _longer(pairs[judge], length),
                itself=_itself(pairs[judge]),
                others=_others(judge, pairs, means),
                cut=(cut or {}).get(judge, 0),
                reasons=(reasons or {}).get(judge, {}),
            )
            for judge, rows in by_judge.items()
        )
    )


# query, first shown, second shown → P(first more relevant)
_Pairs = dict[tuple[str, str, str], float]


def _pairs(rows: Iterable[Judgment]) -> _Pairs:
    """Answered comparisons of two, and a list's neighbours in the order shown. The first answer counts."""
    pairs: _Pairs = {}
    for row in rows:
        if row.question.kind is not Kind.COMPARE or not row.answered:
            continue
        shown, query = row.question.documents, row.question.query
        if row.form is Form.ORDER:
            place = {shown[at]: rank for rank, at in enumerate(row.order)}
            for first, second in pairwise(shown):
                pairs.setdefault((query, first, second), float(place[first] < place[second]))
        elif row.value is not None and len(shown) == 2:
            pairs.setdefault((query, *shown), row.value)
    return pairs


def _sign(p: float) -> int:
    return (p > 0.5) - (p < 0.5)


def _position(pairs: _Pairs) -> Share:
    return Share(sum((_sign(p) + 1) / 2 for p in pairs.values()), len(pairs))


def _flips(pairs: _Pairs) -> Share:
    both = [(p, pairs[query, second, first]) for (query, first, second), p in pairs.items() if (query, second, first) in pairs]
    # Each pair is met twice.
    return Share(sum(_sign(p) == _sign(q) != 0 for p, q in both) / 2, len(both) // 2)


def _repeats(rows: Sequence[Judgment]) -> Share:
    answers: dict[object, list[Judgment]] = defaultdict(list)
    for row in rows:
        if row.answered:
            answers[row.question].append(row)
    twice = [(one[0], one[1]) for one in answers.values() if len(one) > 1]
    return Share(sum(_differ(a, b) for a, b in twice), len(twice))


def _differ(one: Judgment, other: Judgment) -> bool:
    if one.form is Form.ORDER or other.form is Form.ORDER:
        return one.order != other.order
    if one.form is Form.GRADE:
        return abs((one.value or 0) - (other.value or 0)) > 0.5
    return _sign(one.value or 0) != _sign(other.value or 0)


def _longer(pairs: _Pairs, length: Callable[[str], int]) -> Share:
    compared = [
        _sign(p) * _sign(0.5 + length(first) - length(second))
        for (_, first, second), p in pairs.items()
        if length(first) != length(second)
    ]
    return Share(sum((sign + 1) / 2 for sign in compared), len(compared))


def _itself(pairs: _Pairs) -> Share:
    """Leave one out: does the document that won more of its other pairs win this one?

    Independent coins give one half. (A document's own pair is left out, in both orders, else it would foretell itself.)
    """
    won: dict[tuple[str, str], int] = Counter()
    for (query, first, second), p in pairs.items():
        won[query, first] += _sign(p)
        won[query, second] -= _sign(p)
    count, of = 0.0, 0
    for (query, first, second), p in pairs.items():
        own = _sign(p) - _sign(pairs.get((query, second, first), 0.5))
        foretold = (won[query, first] - own) - (won[query, second] + own)
        if foretold and _sign(p):
            count += (foretold > 0) == (p > 0.5)
            of += 1
    return Share(count, of)


def _means(pairs: Mapping[str, _Pairs]) -> dict[tuple[str, str, str], tuple[float, int]]:
    """Sum and number of all judges' signs for each pair, the pair's documents in sorted order."""
    sums: dict[tuple[str, str, str], tuple[float, int]] = {}
    for of_judge in pairs.values():
        for (query, first, second), p in of_judge.items():
            sign, key = (_sign(p), (query, first, second)) if first < second else (-_sign(p), (query, second, first))
            total, count = sums.get(key, (0.0, 0))
            sums[key] = total + sign, count + 1
    return sums


def _others(judge: str, pairs: Mapping[str, _Pairs], means: Mapping[tuple[str, str, str], tuple[float, int]]) -> Share:
    own = pairs[judge]
    count, of = 0.0, 0
    for (query, first, second), p in own.items():
        turned = first > second
        key = (query, second, first) if turned else (query, first, second)
        mine = _sign(p) - _sign(own.get((query, second, first), 0.5))
        rest = means[key][0] * (-1 if turned else 1) - mine
        if rest and _sign(p):
            count += (rest > 0) == (p > 0.5)
            of += 1
    return Share(count, of)
