"""Judging that is killed again and again: `python asked_and_killed.py SETTINGS` forks, kills -9, and reports as JSON.

A program of its own, for it forks: what is imported once need not be imported forty times. Each child notes the key of an
answer in a file after its commit, so that the parent knows what must not be lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401 - imported before the fork

from zelo_train.cost import Budget, Price
from zelo_train.judge.ask import Ensemble
from zelo_train.judge.judges import ChatJudge
from zelo_train.llm import Endpoint
from zelo_train.records import Judgment, Kind, Question
from zelo_train.store import JudgeIdentity, Store, Texts

DOCUMENTS = {f"d{i}": f"document {i} is worth {i / 400:.4f}" for i in range(400)}
QUERIES = {f"q{i}": f"query {i}" for i in range(10)}
# A key in hexadecimal and a line feed.
NOTE = 33


def questions(count: int) -> list[Question]:
    draw = random.Random(1)
    found: dict[Question, None] = {}
    while len(found) < count:
        query = f"q{draw.randrange(len(QUERIES))}"
        found[Question(Kind.COMPARE, (query,), tuple(draw.sample(sorted(DOCUMENTS), 2)))] = None
    return list(found)


class Noting:
    """The store, and a note of each commit."""

    def __init__(self, store: Store, notes: Path) -> None:
        self.store = store
        self.find = store.find
        self.notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def put(self, judge: JudgeIdentity, judgment: Judgment, texts: Texts, *, run: str = "", raw: bytes | None = None) -> None:
        self.store.put(judge, judgment, texts, run=run, raw=raw)
        os.write(self.notes, texts.key(judge, judgment.question).hex().encode() + b"\n")


def ask(settings: dict[str, Any]) -> list[Judgment]:
    with Store(Path(settings["store"]), write=True) as store:
        judge = ChatJudge(
            "judge", settings["model"], Endpoint(settings["base_url"]), price=Price(1_000_000, 1_000_000), concurrency=50
        )
        purse = Budget(store, f"run {os.getpid()}", settings["cap"])
        place = Noting(store, Path(settings["notes"]))
        ensemble = Ensemble([judge], QUERIES.__getitem__, DOCUMENTS.__getitem__, place, purse, run=f"run {os.getpid()}")
        return ensemble.ask(questions(settings["questions"]))


def size(notes: Path) -> int:
    return notes.stat().st_size if notes.exists() else 0


def main() -> None:
    settings = json.loads(sys.argv[1])
    draw = random.Random(2)
    killed_at_work = 0
    notes = Path(settings["notes"])
    for _ in range(settings["kills"]):
        child = os.fork()
        if child == 0:
            ask(settings)
            os._exit(0)
        # Not after a time, which on a busy machine is none: after so many more answers, and a moment.
        wanted = size(notes) + draw.randrange(40) * NOTE
        patience = time.monotonic() + 10
        while size(notes) < wanted and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed_at_work += os.WIFSIGNALED(status)
    noted = len(notes.read_text().split())
    judgments = ask(settings)
    sys.stdout.write(
        json.dumps({"killed_at_work": killed_at_work, "noted": noted, "answered": sum(j.answered for j in judgments)})
    )


if __name__ == "__main__":
    main()
