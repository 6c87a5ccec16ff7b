"""Batches: the judge stage through files of a provider's batch API, one round after another."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from zelo_train.config import Config
from zelo_train.errors import CapReached, JudgeError
from zelo_train.pipeline.collect import collected
from zelo_train.pipeline.judge import GRADES, Judging
from zelo_train.records import Question
from zelo_train.store import Workspace

if TYPE_CHECKING:
    from zelo_train.judge.batch import BatchFile


def _open_questions(judging: Judging, confirmed: Collection[str]) -> tuple[str, dict[str, list[Question]]]:
    """The first round that endpoints have not answered, and its questions; the other judges answer it at once."""
    from zelo_train.judge.judges import ChatJudge
    from zelo_train.rate import preferences
    from zelo_train.rate import rate as rating

    def left(asked: Mapping[str, Sequence[Question]]) -> dict[str, list[Question]]:
        ask_now = {judge.name: asked[judge.name] for judge in judging.judges if not isinstance(judge, ChatJudge)}
        judging.ensemble.ask(ask_now, confirmed=confirmed)
        # Each once: asking again on purpose, to audit a judge, is for `zelo judge`.
        return {
            judge.name: judging.ensemble.unanswered(judge, list(dict.fromkeys(asked[judge.name])))
            for judge in judging.judges
            if isinstance(judge, ChatJudge)
        }

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


def write_batches(workspace: Workspace, config: Config, folder: Path) -> tuple[str, list[BatchFile]]:
    """Write the next round as files for a provider's batch API (OpenAI's JSONL). Needs the lock; sends nothing.

    What a file can cost is reserved. Questions of a file that was written and not read back are in no second one.

    Returns:
        Which round, and the files; none when all of it is answered or under way.

    Raises:
        CapReached: a file could exceed the cap; those before it are written.
    """
    from zelo_train.judge import batch as batching
    from zelo_train.judge.judges import ChatJudge

    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        what, left = _open_questions(judging, ())
        written = []
        for judge in judging.judges:
            if not isinstance(judge, ChatJudge):
                continue
            for file in batching.write(judging.ensemble, judge, left.get(judge.name, []), folder, store):
                try:
                    # Never settled by this process: it stays reserved until the answers are read.
                    judging.budget.reserve(judge.name, file.worst)
                except CapReached:
                    store.put_batch(replace(file.batch, state=batching.READ))
                    file.path.unlink()
                    raise
                written.append(file)
        return what, written


def read_batches(workspace: Workspace, config: Config, paths: Sequence[Path]) -> tuple[int, int]:
    """Keep the answers in a provider's output and error files. Needs the lock.

    Returns:
        How many questions are final now, and how many of these files' batches must be asked again.

    Raises:
        JudgeError: a line answers nothing that was asked.
    """
    from zelo_train.judge import batch as batching
    from zelo_train.judge.judges import ChatJudge

    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        ensemble = judging.ensemble
        rounds = [number for number in range(1, judging.rounds + 1) if judging.stored(number)]
        asked = judging.questions(rounds)
        grades = [question for listed in judging.stored(GRADES).values() for question in listed]
        answered = {bytes.fromhex(name) for line in lines if (name := _custom_id(line))}
        batches = [one for one in store.batches() if one.state != batching.READ and not answered.isdisjoint(one.keys)]
        final = again = 0
        taken: set[bytes] = set()
        for judge in judging.judges:
            if not isinstance(judge, ChatJudge):
                continue
            questions = dict.fromkeys([*asked[judge.name], *grades])
            by_key = {ensemble.texts.key(judge.identity(question), question): question for question in questions}
            own = [key for one in batches for key in one.keys if key in by_key]
            if not own:
                continue
            mine = [line for line in lines if bytes.fromhex(_custom_id(line)) in by_key]
            found = batching.read(ensemble, judge, [by_key[key] for key in own], mine)
            batching.keep(ensemble, judge, found)
            worst = sum(round(judge.worst(judge.body(ensemble.asked(by_key[key]))) * batching.SHARE) for key in own)
            store.move(judging.budget.run, judge.name, -worst, sum(one.cost for one in found.judgments))
            final, again = final + len(found.judgments), again + len(found.again)
            taken |= set(own)
        if not taken >= answered:
            raise JudgeError(
                f"{len(answered - taken)} lines answer nothing that is under way; expected the output of files that"
                " `zelo judge --write-batches` wrote from these texts and settings"
            )
        for one in batches:
            store.put_batch(replace(one, state=batching.READ))
    return final, again


def drop_batches(workspace: Workspace) -> int:
    """Give up batch files that were not read back. What was reserved for them stays counted. Returns how many files."""
    with workspace.store(write=True) as store:
        dropped = [one for one in store.batches() if one.state != "read"]
        for one in dropped:
            store.put_batch(replace(one, state="read"))
    return len(dropped)


def _custom_id(line: str) -> str:
    """The hexadecimal key that a line answers.

    Raises:
        JudgeError: it is no line of a batch's output.
    """
    try:
        name = json.loads(line)["custom_id"]
        bytes.fromhex(name)
    except (ValueError, KeyError, TypeError):
        raise JudgeError(f"{line[:60]!r} is no line of a batch's output; expected JSON with a custom_id of ours") from None
    return str(name)
