"""The asking loop: every answer once, whatever the endpoint, the purse or the operating system do."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import openai_server
from zelo_train.cost import Budget, Price
from zelo_train.errors import CapReached, JudgeError
from zelo_train.judge.ask import BLOCK, Ensemble, Pocket
from zelo_train.judge.judges import ChatJudge
from zelo_train.llm import Endpoint, Fault, Patience, Reply, Scripted
from zelo_train.records import Form, Judgment, Kind, Question, Status
from zelo_train.store import Store

HERE = Path(__file__).parent
DOCUMENTS = {f"d{i}": f"document {i} is worth {i / 400:.4f}" for i in range(400)}
QUERIES = {f"q{i}": f"query {i}" for i in range(10)}
PRICE = Price(1_000_000, 2_000_000)


def questions(count: int, seed: int = 0) -> list[Question]:
    draw = random.Random(seed)
    found: dict[Question, None] = {}
    while len(found) < count:
        query = f"q{draw.randrange(len(QUERIES))}"
        found[Question(Kind.COMPARE, (query,), tuple(draw.sample(sorted(DOCUMENTS), 2)))] = None
    return list(found)


def expected(question: Question) -> float:
    first, second = (int(document[1:]) / 400 for document in question.documents)
    return openai_server.p_first(round(first, 4), round(second, 4))


def ensemble(*judges: ChatJudge, **options: object) -> Ensemble:
    return Ensemble(judges, QUERIES.__getitem__, DOCUMENTS.__getitem__, **options)


def judge(server: openai_server.Running, name: str = "judge", *, timeout: float = 5.0, **options: object) -> ChatJudge:
    return ChatJudge(name, server.model, Endpoint(server.base_url, timeout=timeout), price=PRICE, **options)


def check(judgments: Iterable[Judgment], asked: Sequence[Question]) -> None:
    """Every answer present exactly once, in order, and none wrong."""
    judgments = list(judgments)
    assert [judgment.question for judgment in judgments] == list(asked)
    for judgment in judgments:
        assert judgment.status is Status.OK
        assert judgment.form is Form.SOFT
        assert judgment.value == pytest.approx(expected(judgment.question), abs=1e-6)


@pytest.mark.slow
def test_three_thousand_questions_a_hundred_in_flight_every_tenth_fails(tmp_path: Path) -> None:
    asked = questions(3000)
    with openai_server.running(faults=0.1, delay=0.02, seed=3) as server, Store(tmp_path / "answers.db", write=True) as store:
        cap = 3_000_000
        purse = Budget(store, "run", cap)
        # Two faults in a hundred hang or drip: little patience keeps the test short, yet is enough on a busy machine.
        of = judge(server, timeout=5.0, concurrency=100, patience=Patience(first_wait=0.1, rest=0.2))
        judgments = ensemble(of, place=store, purse=purse, run="run").ask(asked)
        stats = server.stats()
        check(judgments, asked)
        assert set(stats["faulted"]) == set(openai_server.FAULTS)
        assert sum(stats["faulted"].values()) > 250
        assert 50 < stats["most_in_flight"] <= 100
        assert stats["early"] == 0
        # Served in full once each: nothing was bought twice.
        assert (stats["served"], stats["served_twice"]) == (3000, 0)
        rows = store.counts()
        assert rows == {("judge", Kind.COMPARE, Status.OK): 3000}
        # What the provider billed is counted, with the most that tries without a bill can have cost.
        spent = sum(judgment.cost for judgment in judgments)
        assert stats["billed_in"] + 2 * stats["billed_out"] <= spent == store.outlay() <= cap
        before = stats["requests"]
        assert ensemble(of, place=store, purse=purse).ask(asked) == judgments
        assert server.stats()["requests"] == before


@pytest.mark.slow
def test_forty_kills_lose_nothing_and_buy_nothing_twice(tmp_path: Path) -> None:
    count = 2000
    with openai_server.running(delay=0.02) as server:
        settings = {
            "store": str(tmp_path / "answers.db"),
            "notes": str(tmp_path / "notes"),
            "base_url": server.base_url,
            "model": server.model,
            "questions": count,
            "kills": 40,
            "cap": 20_000_000,
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "asked_and_killed.py"), json.dumps(settings)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[2])},
        )
        assert done.returncode == 0, done.stderr
        stats = server.stats()
    told = json.loads(done.stdout)
    assert told["killed_at_work"] >= 30
    assert told["noted"] > 300
    assert told["answered"] == count
    notes = (tmp_path / "notes").read_text().split()
    database = sqlite3.connect(tmp_path / "answers.db")
    keys = [key.hex() for (key,) in database.execute("SELECT key FROM answer")]
    (cost,) = database.execute("SELECT sum(cost) FROM answer").fetchone()
    reserved, settled = database.execute("SELECT sum(reserved), sum(settled) FROM spend").fetchone()
    database.close()
    # What was committed is there, and was committed once.
    assert len(keys) == len(set(keys)) == count
    assert len(notes) == len(set(notes))
    assert set(notes) <= set(keys)
    # Only what was under way when it was killed can have been served again: at most what was in flight, per kill.
    assert stats["served"] - count <= told["killed_at_work"] * 50
    assert cost <= settled + reserved <= settings["cap"]
    assert stats["billed_in"] + stats["billed_out"] <= settled + reserved


@pytest.mark.slow
def test_seven_hundred_questions_a_second(tmp_path: Path) -> None:
    """Against a server that takes 50 ms; in the time this process had a core, for others may be busy on it."""
    asked = questions(3200)
    with openai_server.running(delay=0.05) as server, Store(tmp_path / "answers.db", write=True) as store:
        purse = Budget(store, "run", 10**9)
        of = ensemble(judge(server, concurrency=100), place=store, purse=purse)
        of.ask(asked[:200])
        wall, own = time.perf_counter(), time.process_time()
        check(of.ask(asked[200:]), asked[200:])
        wall, own = time.perf_counter() - wall, time.process_time() - own
    rate = 3000 / own
    sys.stderr.write(f"\n{rate:.0f} questions per second of CPU, {3000 / wall:.0f} by the clock\n")
    assert rate >= 700
    # A hundred in flight at 50 ms are 2,000 a second: a process that waits for one after the other is far below this.
    assert 3000 / wall >= 150


def test_resume_is_free_and_adding_a_judge_changes_no_answer(tmp_path: Path) -> None:
    asked = questions(60)
    with openai_server.running() as server, Store(tmp_path / "answers.db", write=True) as store:
        one = ensemble(judge(server, "one"), place=store).ask(asked[:40])
        assert ensemble(judge(server, "one"), place=store).ask(asked)[:40] == one
        assert server.stats()["requests"] == 60
        both = ensemble(judge(server, "one"), judge(server, "two"), place=store).ask(asked)
        assert both[:40] == one
        assert server.stats()["requests"] == 120
        assert server.stats()["bodies"] == 60


def test_swapped_is_another_question_and_twice_is_asked_twice(tmp_path: Path) -> None:
    question = questions(1)[0]
    swapped = Question(question.kind, question.queries, question.documents[::-1])
    with openai_server.running() as server, Store(tmp_path / "answers.db", write=True) as store:
        asked = [question, swapped, question]
        judgments = ensemble(judge(server), place=store).ask(asked)
        assert [judgment.value for judgment in judgments] == pytest.approx(
            [expected(question), 1 - expected(question), expected(question)], abs=1e-6
        )
        assert server.stats()["requests"] == 3
        assert ensemble(judge(server), place=store).ask(asked) == judgments
        assert server.stats()["requests"] == 3


def test_each_judge_its_own_questions(tmp_path: Path) -> None:
    asked = questions(10)
    with openai_server.running() as server:
        judgments = ensemble(judge(server, "one"), judge(server, "two")).ask({"one": asked[:3], "two": asked[2:5]})
    assert [(judgment.judge, judgment.question) for judgment in judgments] == [
        *(("one", question) for question in asked[:3]),
        *(("two", question) for question in asked[2:5]),
    ]


def test_the_cap_stops_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    asked = questions(200)
    with openai_server.running() as server, Store(tmp_path / "answers.db", write=True) as store:
        cap = 60_000
        with pytest.raises(CapReached, match=r"raise judge\.cap"):
            ensemble(judge(server), place=store, purse=Budget(store, "first", cap)).ask(asked)
        kept = sum(store.counts().values())
        assert 0 < kept < 200
        assert store.outlay() <= cap
        # Nothing stays reserved, and what is left would not pay one question at its worst.
        assert sum(spend.reserved for spend in store.spent()) == 0
        check(ensemble(judge(server), place=store, purse=Budget(store, "second", 10**7)).ask(asked), asked)
        assert server.stats()["served_twice"] == 0


def test_one_judge_down_the_other_is_asked_to_the_end_and_resume_finishes(tmp_path: Path) -> None:
    asked = questions(50)
    patience = Patience(first_wait=0.001, rest=0.001, probes=2)
    with openai_server.running() as up, Store(tmp_path / "answers.db", write=True) as store:
        with openai_server.running(only=["500"], faults=1.0) as down:
            broken = judge(down, "down", patience=patience)
            with pytest.raises(JudgeError, match=r"'down' failed .* in a row"):
                ensemble(judge(up, "up"), broken, place=store).ask(asked)
        # The outage is nobody's answer: not even a failure is kept.
        assert store.counts() == {("up", Kind.COMPARE, Status.OK): 50}
        judgments = ensemble(judge(up, "up"), judge(up, "down"), place=store).ask(asked)
        check(judgments[50:], asked)


def test_a_question_that_cannot_be_answered_is_a_failure_and_not_an_answer() -> None:
    asked = questions(30)
    bad = asked[7]

    def script(body: Mapping[str, Any]) -> Reply | str:
        text = body["messages"][-1]["content"]
        if all(DOCUMENTS[document] + "\n" in text for document in bad.documents) and QUERIES[bad.query] + "\n" in text:
            raise Fault("server", "HTTP 500")
        return Reply("A", top=((("A", -0.1), ("B", -2.4)),))

    of = ensemble(ChatJudge("judge", "m", Scripted(script), patience=Patience(first_wait=0.001)))
    judgments = of.ask(asked)
    (failed,) = [judgment for judgment in judgments if not judgment.answered]
    assert (failed.question, failed.status, failed.value, failed.form, failed.tries) == (bad, Status.GAVE_UP, None, None, 6)
    assert of.reasons["judge"] == {"gave up": "HTTP 500"}
    # Final: it is not asked again unless told so.
    assert of.unanswered(of.judges[0], asked) == []
    again = ensemble(*of.judges, place=of.place, again=[Status.GAVE_UP])
    assert again.unanswered(of.judges[0], asked) == [bad]


def test_nothing_leaves_the_machine_unconfirmed() -> None:
    asked = questions(20)
    far = ChatJudge("far", "m", Endpoint("https://judge.example.com/v1"), price=PRICE)
    of = ensemble(far)
    (departure,) = of.departures(asked, cap=5_000_000)
    assert (departure.host, departure.judges, departure.questions) == ("judge.example.com", ("far",), 20)
    assert departure.bytes > 20 * 500
    assert departure.cost > 0
    assert "judge.example.com: 20 questions of far" in departure.line("USD")
    assert "at most 5.00 USD" in departure.line("USD")
    with pytest.raises(JudgeError, match=r"judge\.example\.com, which was not confirmed"):
        of.ask(asked)
    with openai_server.running() as server:
        assert ensemble(judge(server)).departures(asked) == []


def test_estimates_are_near_what_it_takes() -> None:
    asked = questions(100)
    with openai_server.running() as server:
        of = ensemble(judge(server, concurrency=10))
        (before,) = of.estimates(asked, latency=0.5)
        judgments = of.ask(asked)
        (after,) = of.estimates(asked)
    assert before.calls == 100
    assert before.tokens_in == pytest.approx(sum(judgment.tokens_in for judgment in judgments), rel=0.1)
    assert before.cost == pytest.approx(sum(judgment.cost for judgment in judgments), rel=0.1)
    assert before.seconds == 100 * 0.5 / 10
    assert (after.calls, after.cost) == (0, 0)


def test_ctrl_c_keeps_what_is_under_way(tmp_path: Path) -> None:
    asked = questions(2000)
    with openai_server.running(delay=0.1) as server, Store(tmp_path / "answers.db", write=True) as store:
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ensemble(judge(server), place=store).ask(asked)
        assert time.monotonic() - start < 5
        kept = sum(store.counts().values())
        assert 0 < kept < 2000
        assert kept == server.stats()["served"]


async def test_asking_in_a_running_loop() -> None:
    asked = questions(5)
    with openai_server.running() as server:
        of = ensemble(judge(server))
        check(await of.aask(asked), asked)
        check(await of.aask(asked), asked)


def test_a_pocket_takes_money_out_in_blocks_and_puts_it_back() -> None:
    class Ledger:
        def __init__(self) -> None:
            self.moves: list[tuple[int, int]] = []

        def outlay(self) -> int:
            return 0

        def move(self, run: str, judge: str, reserved: int, settled: int) -> None:
            self.moves.append((reserved, settled))

    ledger = Ledger()
    budget = Budget(ledger, "run", cap=10 * BLOCK * 100)
    pocket = Pocket(budget)
    tickets = [pocket.reserve("judge", 100) for _ in range(2 * BLOCK)]
    assert ledger.moves == [(100 * BLOCK, 0)] * 2
    for ticket in tickets:
        pocket.settle(ticket, 7)
    pocket.empty()
    assert budget.outlay == 2 * BLOCK * 7
    assert sum(reserved for reserved, _ in ledger.moves) == 0
    # Near the cap it goes on try by try, to the last that fits.
    last = Pocket(Budget(ledger, "run", cap=250))
    assert [last.reserve("judge", 100), last.reserve("judge", 100)] == [1, 2]
    with pytest.raises(CapReached):
        last.reserve("judge", 100)


def test_no_two_judges_of_one_name() -> None:
    with pytest.raises(JudgeError, match="a name of its own"):
        ensemble(ChatJudge("a", "m", Scripted(lambda _: "A")), ChatJudge("a", "m", Scripted(lambda _: "A")))
    with pytest.raises(JudgeError, match="at least one"):
        ensemble()


def test_many_loops_one_after_the_other() -> None:
    """Each round of the pipeline is a loop of its own."""
    asked = questions(6)
    with openai_server.running() as server:
        of = ensemble(judge(server))
        for start in range(0, 6, 2):
            check(of.ask(asked[start : start + 2]), asked[start : start + 2])
