"""Batches: the judge stage through a provider's batch API, one round after another.

    write, read     files that a person hands over and gets back
    batches         the same, handed over and fetched from here

A batch is open from when it is noted until it is read or given up. Meanwhile its questions are in no other one, and the most it
can cost is reserved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from zelo_train.config import Config
from zelo_train.errors import JudgeError, WorkspaceError
from zelo_train.interrupt import run
from zelo_train.pipeline.collect import collected
from zelo_train.pipeline.judge import GRADES, Judging
from zelo_train.pipeline.judges import Confirm
from zelo_train.pipeline.stages import Say, silent
from zelo_train.records import Question
from zelo_train.store import Batch, Store, Workspace

if TYPE_CHECKING:
    from zelo_train.judge.batch import BatchFile, Fetched
    from zelo_train.judge.judges import ChatJudge


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of a provider's lines.

    Attributes:
        final: questions that have their last word now.
        again: expired or failed at the provider: they go into the next batch.
        changed: answered, but the texts or settings have changed since: of no use.
        missing: without a line so far.
    """

    final: int
    again: int
    changed: int
    missing: int = 0

    def __str__(self) -> str:
        told = f"kept {self.final:,} answers; {self.again:,} questions must be asked again"
        if self.changed:
            told += f"; {self.changed:,} answers are to texts or settings that have changed since, and of no use"
        if self.missing:
            told += (
                f"\n{self.missing:,} questions have no line in these files: read all files of a batch together, the one with"
                " errors too, or give them up: zelo judge --drop-batches"
            )
        return told


def write_batches(workspace: Workspace, config: Config, folder: Path) -> tuple[str, list[BatchFile]]:
    """Write the next round as files for a provider's batch API (OpenAI's JSONL). Needs the lock; sends nothing.

    Returns:
        Which round, and the files; none when all of it is answered or under way.

    Raises:
        CapReached: a file could exceed the cap; those before it are written.
    """
    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        what, left = _open_questions(judging)
        return what, _written(judging, left, folder)


def read_batches(workspace: Workspace, config: Config, paths: Sequence[Path]) -> Reading:
    """Keep the answers in a provider's output and error files. Needs the lock.

    Raises:
        JudgeError: a line answers nothing that is under way; nothing is kept then.
    """
    from zelo_train.judge.batch import READ

    lines = _by_key(line for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        touched = [one for one in store.batches() if one.state != READ and not lines.keys().isdisjoint(one.keys)]
        strange = len(lines.keys() - {key for one in touched for key in one.keys})
        if strange:
            raise JudgeError(
                f"{strange:,} lines answer nothing that is under way; expected the output of batches that this workspace wrote"
                " and has not read"
            )
        reader = _Reader(judging, touched)
        found = reader.keep(lines)
        missing = 0
        for one in touched:
            # A provider gives each question a line in one of its files; without all of them more may still come.
            without = len(set(one.keys) - lines.keys() - reader.costs(one).keys())
            missing += without
            if not without:
                reader.close(one)
    return replace(found, missing=missing)


def batches(
    workspace: Workspace, config: Config, *, confirm: Confirm | None = None, say: Say = silent, progress: bool = False
) -> int:
    """Take what the provider has done and, when nothing is under way there, hand it the next round. Needs the lock.

    Args:
        workspace: where answers go, and in judge/batches the files as long as they are under way.
        config: its settings.
        confirm: asked before a text leaves this machine.
        say: told what happens.
        progress: show bars.

    Returns:
        How many questions are under way at the provider; 0 when every round is answered.

    Raises:
        JudgeError: a host was not confirmed, or a provider refused a batch.
        CapReached: the round could exceed the cap; the files before that are handed over by the next call.
    """
    from zelo_train.judge import batch as batching

    folder = workspace.stage_folder("judge") / "batches"
    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        chats = _chat_judges(judging)
        under_way = [one for one in store.batches() if one.state != batching.READ]
        by_hand = sum(len(one.keys) for one in under_way if one.state == batching.WRITTEN and not _file(folder, one).exists())
        if by_hand:
            raise WorkspaceError(
                f"{by_hand:,} questions are in files that `zelo judge --write-batches` wrote for a person to hand over;"
                " expected them back first: zelo judge --read-batches FILE, or give them up: zelo judge --drop-batches"
            )
        reader = _Reader(judging, under_way)
        waiting, failures = 0, []
        for one in under_way:
            found = _fetched(chats, one, folder, store)
            if found is None:
                waiting += len(one.keys)
                continue
            say(f"{one.judge}, {one.client}: {reader.keep(_by_key(found.lines))}")
            reader.close(one)
            _file(folder, one).unlink(missing_ok=True)
            if found.failure:
                failures.append(f"judge {one.judge!r}: the provider took nothing of batch {one.client}: {found.failure}")
        if failures:
            raise JudgeError("\n".join(failures))
        if waiting:
            say(f"{waiting:,} questions are under way: run the same command again later")
            return waiting

        what, left = _open_questions(judging, progress=progress)
        leaving = [
            replace(one, cost=round(one.cost * batching.SHARE))
            for one in judging.ensemble.departures(left, judging.budget.left)
        ]
        if leaving and not (confirm and confirm(leaving)):
            raise JudgeError(
                f"texts would go to {', '.join(one.host for one in leaving)}, which was not confirmed; expected a yes"
            )
        written = _written(judging, left, folder)
        for file in written:
            run(batching.submit(chats[file.batch.judge], file.path, file.batch, store))
            say(f"{file.batch.judge}, {file.batch.client}: {len(file.questions):,} questions of {what} are handed over")
        return sum(len(file.questions) for file in written)


def drop_batches(workspace: Workspace) -> int:
    """Give up batches that were not read. What was reserved for them stays counted: they may be charged. Returns how many."""
    from zelo_train.judge.batch import READ

    with workspace.store(write=True) as store:
        dropped = [one for one in store.batches() if one.state != READ]
        for one in dropped:
            store.put_batch(replace(one, state=READ))
    return len(dropped)


# Asking


def _open_questions(judging: Judging, *, progress: bool = False) -> tuple[str, dict[str, list[Question]]]:
    """The first round that endpoints have not answered, and its questions; the other judges answer it at once."""
    from zelo_train.rate import preferences
    from zelo_train.rate import rate as rating

    chats = _chat_judges(judging)

    def left(asked: Mapping[str, Sequence[Question]]) -> dict[str, list[Question]]:
        judging.ensemble.ask({name: own for name, own in asked.items() if name not in chats}, progress=progress)
        # Each once: asking again on purpose, to audit a judge, is for `zelo judge`.
        return {name: judging.ensemble.unanswered(judge, list(dict.fromkeys(asked[name]))) for name, judge in chats.items()}

    rounds = range(1, judging.rounds + 1)
    for number in rounds:
        judging.plan(number)
        found = left(judging.questions([number]))
        if any(found.values()):
            return f"round {number} of {judging.rounds}", found
    if judging.config.rate.calibration == "grades":
        ratings = rating(preferences(judging.judgments(rounds)), candidates=judging.candidates)
        grades = [question for listed in judging.grade_plan(ratings).values() for question in listed]
        return "grades", left({judge.name: grades for judge in judging.judges})
    return "the rest", {}


def _written(judging: Judging, left: Mapping[str, Sequence[Question]], folder: Path) -> list[BatchFile]:
    from zelo_train.judge.batch import write

    return [
        file
        for name, judge in _chat_judges(judging).items()
        for file in write(judging.ensemble, judge, left.get(name, ()), folder, judging.store)
    ]


def _chat_judges(judging: Judging) -> dict[str, ChatJudge]:
    from zelo_train.judge.judges import ChatJudge

    return {judge.name: judge for judge in judging.judges if isinstance(judge, ChatJudge)}


def _file(folder: Path, one: Batch) -> Path:
    return folder / f"{one.client}.jsonl"


# Reading


def _fetched(chats: Mapping[str, ChatJudge], one: Batch, folder: Path, store: Store) -> Fetched | None:
    """What the provider has made of a batch. One that was written or half handed over when a process died is handed over."""
    from zelo_train.judge.batch import fetch, submit

    if one.judge not in chats:
        raise JudgeError(
            f"batch {one.client} belongs to judge {one.judge!r}, which zelo.yaml no longer names; expected it: put it back, or"
            " give the batch up: zelo judge --drop-batches"
        )
    judge = chats[one.judge]
    return run(fetch(judge, run(submit(judge, _file(folder, one), one, store))))


class _Reader:
    """Keeps what providers answer to open batches.

    Args:
        judging: whose questions they are.
        of: the batches.
    """

    def __init__(self, judging: Judging, of: Sequence[Batch]) -> None:
        self._judging = judging
        self._chats = _chat_judges(judging)
        wanted = {key for one in of for key in one.keys}
        questions = judging.questions(range(1, judging.rounds + 1)) if wanted else {}
        grades = [question for listed in judging.stored(GRADES).values() for question in listed] if wanted else []
        key_of = judging.ensemble.texts.key
        # By judge and key, as texts and settings are now.
        self._asked: dict[str, dict[bytes, Question]] = {}
        for name, judge in self._chats.items():
            keyed = ((key_of(judge.identity(one), one), one) for one in (*questions.get(name, ()), *grades))
            self._asked[name] = {key: question for key, question in keyed if key in wanted}

    def keep(self, lines: Mapping[bytes, Sequence[str]]) -> Reading:
        """Commit the answers in these lines."""
        from zelo_train.judge.batch import keep, read

        final = again = 0
        known: set[bytes] = set()
        for name, judge in self._chats.items():
            own = {key: question for key, question in self._asked[name].items() if key in lines}
            known |= own.keys()
            found = read(self._judging.ensemble, judge, own.values(), [line for key in own for line in lines[key]])
            keep(self._judging.ensemble, judge, found)
            final, again = final + len(found.judgments), again + len(found.again)
        return Reading(final, again, len(lines.keys() - known))

    def costs(self, one: Batch) -> dict[bytes, int]:
        """What a batch's final answers cost, by key."""
        by_key = {key: self._asked[one.judge][key] for key in one.keys if key in self._asked[one.judge]}
        answers = self._judging.answers(self._chats[one.judge], by_key.values())
        costs = {judgment.question: judgment.cost for judgment in answers}
        return {key: costs[question] for key, question in by_key.items() if question in costs}

    def close(self, one: Batch) -> None:
        """Put what a batch's answers cost in the place of what was reserved."""
        from zelo_train.judge.batch import READ

        cost = sum(self.costs(one).values())
        # First: if the process dies in between, too much stays counted rather than too little.
        self._judging.store.put_batch(replace(one, state=READ))
        self._judging.store.move(self._judging.budget.run, one.judge, -one.worst, cost)


def _by_key(lines: Iterable[str]) -> dict[bytes, list[str]]:
    """A provider's lines by the key that each answers.

    Raises:
        JudgeError: one is no line of a batch's output.
    """
    found: dict[bytes, list[str]] = {}
    for line in lines:
        if not line.strip():
            continue
        try:
            key = bytes.fromhex(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError):
            msg = f"{line[:60]!r} is no line of a batch's output; expected JSON with a custom_id of ours"
            raise JudgeError(msg) from None
        found.setdefault(key, []).append(line)
    return found
