"""A pilot: a hundred or more pairs whose order is known, before the money is spent.

The known order comes from qrels or from a sheet that a person filled in. Every pair is asked in both orders, so that what the
order does to a judge shows at once.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zelo_train import chance
from zelo_train.errors import CollectionError
from zelo_train.judge.report import MUCH_POSITION, MUCH_REFUSED, JudgeReport, Share, report
from zelo_train.records import Comparison, Judgment, Question

LEAST = 100
# Of known pairs: a judge that agrees in fewer than this knows too little, one in more than that is good enough.
TOO_FEW, GOOD = 0.60, 0.75

Advice = Literal["proceed", "change the prompt", "stop"]


@dataclass(frozen=True, slots=True)
class Known:
    """A pair whose order is known: `better` is more relevant to the query than `worse`."""

    query: str
    better: str
    worse: str


def from_qrels(
    candidates: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, float]], count: int = 200, seed: int = 0
) -> list[Known]:
    """Pairs of candidates with different grades, spread over queries and drawn by hash.

    Args:
        candidates: query to its documents.
        qrels: grades by query and document; what has none has 0.
        count: how many at most.
        seed: another seed draws others.

    Returns:
        Pairs, one query after another in turn, until there are `count` or none is left.

    Raises:
        CollectionError: fewer than a hundred pairs have different grades.
    """
    by_query = []
    for query in sorted(candidates, key=lambda query: chance.key(seed, "pilot", query)):
        grades = qrels.get(query, {})
        pairs = [
            Known(query, better, worse)
            for better in candidates[query]
            if grades.get(better, 0) > 0
            for worse in candidates[query]
            if grades.get(worse, 0) < grades[better]
        ]
        by_query.append(sorted(pairs, key=lambda pair: chance.key(seed, "pilot", query, pair.better, pair.worse)))
    known: list[Known] = []
    turn = 0
    while len(known) < count and any(len(pairs) > turn for pairs in by_query):
        known += [pairs[turn] for pairs in by_query if len(pairs) > turn]
        turn += 1
    return _enough(known[:count], "candidates with different grades")


def write_sheet(
    pairs: Iterable[Comparison],
    path: str | os.PathLike[str],
    query_text: Callable[[str], str],
    document_text: Callable[[str], str],
) -> int:
    """A CSV file for a person: texts side by side, and a column `preferred` to be filled in with left, right or tie.

    Returns:
        How many pairs it has.
    """
    count = 0
    # With a byte-order mark, without which spreadsheets misread everything but English.
    with Path(path).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "left", "right", "preferred", "query text", "left text", "right text"])
        for pair in pairs:
            texts = (query_text(pair.query), document_text(pair.left), document_text(pair.right))
            writer.writerow([pair.query, pair.left, pair.right, "", *map(_as_cell, texts)])
            count += 1
    return count


def _as_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def from_sheet(path: str | os.PathLike[str]) -> list[Known]:
    """What a person filled in; ties and empty rows are left out.

    Raises:
        CollectionError: not such a sheet, a preference that is none, or fewer than a hundred.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        lacking = {"query", "left", "right", "preferred"} - set(reader.fieldnames or ())
        if lacking:
            msg = f"{path} has no column {', '.join(sorted(lacking))}; expected query, left, right, preferred"
            raise CollectionError(msg)
        known = []
        for row in reader:
            match (row["preferred"] or "").strip().lower():
                case "left" | "a":
                    known.append(Known(row["query"], row["left"], row["right"]))
                case "right" | "b":
                    known.append(Known(row["query"], row["right"], row["left"]))
                case "" | "tie":
                    pass
                case other:
                    msg = f"{path}:{reader.line_num}: preferred is {other!r}; expected left, right, tie or nothing"
                    raise CollectionError(msg)
    return _enough(known, f"preferences in {path}")


def _enough(known: list[Known], what: str) -> list[Known]:
    if len(known) < LEAST:
        msg = (
            f"there are {len(known)} {what}; a pilot needs at least {LEAST} known pairs. Take more queries or candidates, or"
            " have a person fill in a sheet: zelo judge --write-sheet pairs.csv, then --pilot --sheet pairs.csv"
        )
        raise CollectionError(msg)
    return known


def questions(known: Iterable[Known]) -> list[Question]:
    """Every known pair in both orders."""
    pairs = [Comparison(pair.query, pair.better, pair.worse) for pair in known]
    return [question for pair in pairs for question in (pair.question, pair.swapped.question)]


@dataclass(frozen=True)
class Verdict:
    """What a pilot says about one judge.

    Attributes:
        judge: its report; position and flips are exact here, for every pair was asked in both orders.
        agreement: with the known preferences; ties count half, what is no answer does not count.
        advice: what to do.
        why: in words.
    """

    judge: JudgeReport
    agreement: Share
    advice: Advice
    why: str

    def lines(self, currency: str = "") -> list[str]:
        """For people."""
        low, high = self.agreement.interval
        return [
            *self.judge.lines(currency),
            f"  agrees with the known order in {self.agreement} (95 %: {low:.2f} to {high:.2f})",
            f"  advice: {self.advice}: {self.why}",
        ]


@dataclass(frozen=True)
class Pilot:
    """What a pilot says.

    Attributes:
        verdicts: one for each judge.
    """

    verdicts: tuple[Verdict, ...]

    @property
    def advice(self) -> Advice:
        """For the ensemble: the worst of its judges'."""
        return max((verdict.advice for verdict in self.verdicts), key=("proceed", "change the prompt", "stop").index)

    def lines(self, currency: str = "") -> list[str]:
        """For people; the first line says so if any judge was simulated."""
        lines = [line for verdict in self.verdicts for line in verdict.lines(currency)]
        if any(verdict.judge.simulated for verdict in self.verdicts):
            lines.insert(0, "SIMULATED: judges drawn from qrels; this says nothing about language models.")
        return [*lines, f"advice: {self.advice}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def pilot(known: Sequence[Known], judgments: Iterable[Judgment], length: Callable[[str], int] | None = None) -> Pilot:
    """Compare judgments of `questions(known)` with what is known.

    Args:
        known: the pairs.
        judgments: of any number of judges.
        length: from a document's id to the length of its text.
    """
    judgments = list(judgments)
    truth = {(pair.query, pair.better, pair.worse): 1.0 for pair in known}
    truth |= {(pair.query, pair.worse, pair.better): 0.0 for pair in known}
    agreed: dict[str, list[float]] = {}
    for judgment in judgments:
        wanted = truth.get((*judgment.question.queries, *judgment.question.documents))  # type: ignore[arg-type]
        if judgment.answered and judgment.value is not None and wanted is not None:
            p = judgment.value
            agreed.setdefault(judgment.judge, []).append(0.5 if p == 0.5 else float((p > 0.5) == (wanted > 0.5)))
    verdicts = []
    for judge in report(judgments, length).judges:
        answers = agreed.get(judge.judge, [])
        agreement = Share(sum(answers), len(answers))
        verdicts.append(Verdict(judge, agreement, *_advice(judge, agreement)))
    return Pilot(tuple(verdicts))


def _advice(judge: JudgeReport, agreement: Share) -> tuple[Advice, str]:
    if not agreement.of:
        return "stop", "it answered nothing"
    # Before its agreement, which order or length alone can raise.
    always = next((fault for fault in judge.faults if "always" in fault), None)
    if always is not None:
        return "stop", always
    if agreement.like_chance or agreement.share < TOO_FEW:
        return "stop", f"it agrees no more than {agreement.share:.2f}; a coin gives .5. Take another model"
    if judge.refused.share > MUCH_REFUSED:
        return "change the prompt", f"no answer that can be read to {judge.refused.share:.0%} of the questions"
    if abs(judge.position.share - 0.5) > MUCH_POSITION:
        return "change the prompt", f"{judge.position.share:.2f} of its answers prefer the first document"
    if agreement.share < GOOD:
        return "change the prompt", (
            f"it agrees in {agreement.share:.2f}, less than {GOOD}: say in judge.criterion what relevant means here, or take "
            "another model"
        )
    return "proceed", f"it agrees in {agreement.share:.2f}"
