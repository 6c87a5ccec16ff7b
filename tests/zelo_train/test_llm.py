"""The client against a real server on loopback, with everything that can go wrong."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import openai_server
from zelo_train.cost import Price
from zelo_train.errors import CapReached, JudgeError
from zelo_train.llm import (
    Client,
    Endpoint,
    Fault,
    Free,
    Gate,
    Outcome,
    Patience,
    Purse,
    Recorder,
    Replay,
    Reply,
    Scripted,
    fault_of_status,
    is_loopback,
    most_tokens,
    reply_of,
)
from zelo_train.records import Status

QUICK = Patience(first_wait=0.01, rest=0.02)
BODY: dict[str, Any] = {
    "model": "test-model",
    "messages": [{"role": "user", "content": "worth 0.8 or worth 0.2"}],
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": True,
    "top_logprobs": 20,
}


def body(number: int) -> dict[str, Any]:
    return {**BODY, "messages": [{"role": "user", "content": f"{number}: worth 0.8 or worth 0.2"}]}


def letter(reply: Reply) -> str:
    if reply.refusal:
        raise Fault("refused", reply.refusal)
    if reply.text not in ("A", "B"):
        raise Fault("unparsable", reply.text)
    return reply.text


def client(server: openai_server.Running, patience: Patience = QUICK, in_flight: int = 8, **options: object) -> Client:
    chat = Endpoint(server.base_url, timeout=options.pop("timeout", 5.0))
    return Client(chat, Gate("judge", in_flight, patience=patience), **options)


async def ask(client: Client, number: int = 0, purse: Purse | None = None) -> Outcome[str]:
    try:
        return await client.complete(body(number), letter, purse or Free(), 1)
    finally:
        await client.chat.aclose()


class Counted:
    """A purse that counts."""

    def __init__(self, cap: int = 10**9) -> None:
        self.cap = cap
        self.open: dict[int, int] = {}
        self.spent = 0
        self.most = 0

    def reserve(self, judge: str, millionths: int) -> int:
        if self.spent + sum(self.open.values()) + millionths > self.cap:
            raise CapReached("no more")
        ticket = len(self.open) + 1 + random.getrandbits(60)
        self.open[ticket] = millionths
        self.most = max(self.most, self.spent + sum(self.open.values()))
        return ticket

    def settle(self, ticket: int, millionths: int) -> None:
        assert millionths <= self.open.pop(ticket)
        self.spent += millionths


async def test_one_answer_with_its_probabilities_and_its_bill() -> None:
    with openai_server.running() as server:
        purse = Counted()
        outcome = await ask(client(server, price=Price(1_000_000, 2_000_000)), purse=purse)
        stats = server.stats()
    assert outcome.status is Status.OK
    assert outcome.answer == "A"
    assert outcome.tries == 1
    assert {token for token, _ in outcome.reply.top[0]} == {"A", " A", "B", "The"}
    assert (outcome.tokens_in, outcome.tokens_out) == (stats["billed_in"], stats["billed_out"])
    assert purse.spent == outcome.cost == stats["billed_in"] + 2 * stats["billed_out"]
    assert not purse.open
    assert stats["last"]["stream"] is False
    assert stats["streamed"] == 0


@pytest.mark.parametrize("fault", openai_server.FAULTS)
async def test_no_fault_passes_for_an_answer(fault: str) -> None:
    """Every question always fails in this one way: none is answered, and each says how it ended."""
    with openai_server.running(faults=1.0, only=[fault]) as server:
        tries = Patience(first_wait=0.001, rest=0.001, failures=100)
        asked = client(server, tries, timeout=0.15, price=Price(1_000_000))
        purse = Counted()
        outcome = await ask(asked, purse=purse)
        stats = server.stats()
    assert outcome.answer is None
    assert outcome.status is {"prose": Status.UNPARSABLE, "refusal": Status.REFUSED}.get(fault, Status.GAVE_UP)
    assert outcome.tries == (3 if fault in ("prose", "refusal") else 6) == stats["requests"]
    assert outcome.reason
    assert not purse.open
    assert purse.spent == outcome.cost >= (stats["billed_in"] if fault not in ("429", "500") else 0)
    assert stats["early"] == 0


@pytest.mark.parametrize("fault", openai_server.FAULTS)
async def test_each_fault_is_got_over(fault: str) -> None:
    with openai_server.running(only=[fault], down_for=2) as server:
        outcome = await ask(client(server, timeout=0.15))
        stats = server.stats()
    assert (outcome.status, outcome.answer, outcome.tries) == (Status.OK, "A", 3)
    assert stats["served"] == 1
    assert stats["early"] == 0


async def test_retry_after_is_kept_to() -> None:
    with openai_server.running(only=["429 with Retry-After"], down_for=1, retry_after=0.7) as server:
        start = time.monotonic()
        outcome = await ask(client(server))
        waited = time.monotonic() - start
        assert server.stats()["early"] == 0
    assert outcome.tries == 2
    assert waited >= 0.7


async def test_a_retry_after_of_a_day_stops_the_judge_and_says_so() -> None:
    with (
        openai_server.running(only=["429 with Retry-After"], down_for=9, retry_after=86400) as server,
        pytest.raises(JudgeError, match="86400 s"),
    ):
        await ask(client(server))


def test_waits_grow_with_full_jitter_and_longer_after_429() -> None:
    waiting = Client(Scripted(lambda _: "A"), Gate("judge"))

    def widest(tries: int, fault: Fault) -> float:
        draws = [waiting._wait(tries, fault) for _ in range(300)]
        assert min(draws) < 0.1 * max(draws)
        return max(draws)

    server = Fault("server", "500")
    assert 0.45 < widest(1, server) <= 0.5
    assert 7 < widest(5, server) <= 8
    assert 1.8 < widest(1, Fault("throttled", "429")) <= 2
    assert min(waiting._wait(1, Fault("throttled", "429", retry_after=3)) for _ in range(100)) >= 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"model": "another"}, "does not exist"), ({"key": "sesame"}, "Incorrect API key")],
)
async def test_what_can_never_work_stops_at_once(settings: dict[str, Any], said: str) -> None:
    with openai_server.running(**settings) as server:
        with pytest.raises(JudgeError, match=said):
            await ask(client(server))
        assert server.stats()["requests"] == 1


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with openai_server.running(key="sesame") as server:
        chat = Endpoint(server.base_url, api_key_env="TEST_JUDGE_KEY")
        monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
        with pytest.raises(JudgeError, match="TEST_JUDGE_KEY is empty"):
            await chat.send(BODY)
        monkeypatch.setenv("TEST_JUDGE_KEY", "sesame")
        assert (await chat.send(BODY)).text == "A"
        await chat.aclose()
    assert "sesame" not in repr(vars(chat))


async def test_other_hosts_are_not_told_what_is_openai_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "secret-of-another")
    with openai_server.running() as server:
        chat = Endpoint(server.base_url)
        await chat.send(BODY)
        await chat.aclose()
        assert "secret-of-another" not in repr(server.stats()["headers"])


async def test_a_proxy_is_the_environment_s_choice_and_never_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with openai_server.running() as server:
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
        far = Endpoint("http://judge.invalid/v1")
        # The test server is no proxy: it says what it was asked for.
        with pytest.raises(Fault, match=r"no http://judge\.invalid/v1/chat/completions"):
            await far.send(BODY)
        await far.aclose()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        near = Endpoint(server.base_url)
        assert (await near.send(BODY)).text == "A"
        await near.aclose()


async def test_an_address_keeps_its_query() -> None:
    with openai_server.running() as server:
        chat = Endpoint(f"{server.base_url}/?api-version=3")
        with pytest.raises(Fault, match=r"no /v1/chat/completions\?api-version=3"):
            await chat.send(BODY)
        await chat.aclose()


async def test_too_long_is_final_and_free() -> None:
    with openai_server.running(context=3) as server:
        purse = Counted()
        outcome = await ask(client(server, price=Price(1_000_000)), purse=purse)
    assert (outcome.status, outcome.tries, purse.spent) == (Status.TOO_LONG, 1, 0)


async def test_one_that_never_answered_is_given_up_in_seconds() -> None:
    """With everybody's patience: a wrong address is no outage."""
    with openai_server.running() as server:
        pass
    asking = Client(Endpoint(server.base_url), Gate("judge", 8))
    start = time.monotonic()
    results = await asyncio.gather(*(ask(asking, number) for number in range(12)), return_exceptions=True)
    assert time.monotonic() - start < 15
    assert isinstance(results[0], JudgeError)
    assert "failed" in str(results[0])


async def test_nobody_there() -> None:
    with openai_server.running() as server:
        pass
    patience = Patience(first_wait=0.001, rest=0.001, probes=2)
    gone = client(server, patience)
    with pytest.raises(JudgeError, match="in a row"):
        await asyncio.gather(*(gone.complete(body(i), letter, Free(), 1) for i in range(30)))
    await gone.chat.aclose()


async def test_the_breaker_opens_after_twenty_and_one_probe_closes_it() -> None:
    """While it is open nothing is sent; the failures of a short outage give nobody up."""
    with openai_server.running(only=["500"], up_for=1, down_for=22) as server:
        asked = client(server, Patience(first_wait=0.001, rest=0.3), in_flight=4)
        # One that never answered would be given up at the first probe that fails.
        assert (await asked.complete(body(8), letter, Free(), 1)).answer == "A"
        start = time.monotonic()
        outcomes = await asyncio.gather(*(asked.complete(body(i), letter, Free(), 1) for i in range(8)))
        took = time.monotonic() - start
        await asked.chat.aclose()
        stats = server.stats()
    assert all(outcome.answer == "A" for outcome in outcomes)
    assert stats["faulted"]["500"] == 22
    # Open once for .3 s, and again for .6 s after the probe, or the last one under way, that failed.
    assert took > 0.3


async def test_concurrency_grows_without_faults_and_shrinks_when_throttled() -> None:
    gate = Gate("judge", 100)
    for _ in range(400):
        gate.success()
    assert gate.limit == 100
    for turn in range(400):
        if turn % 3:
            gate.success()
        else:
            gate.failure(Fault("throttled", "429"))
    assert gate.limit < 25
    for turn in range(4000):
        if turn % 100:
            gate.success()
        else:
            gate.failure(Fault("throttled", "429"))
    assert gate.limit > 50, "one in a hundred is no reason to slow down"


async def test_pace() -> None:
    gate = Gate("judge", 100, per_minute=1200)
    start = time.monotonic()

    async def one() -> None:
        await gate.enter()
        gate.leave()

    await asyncio.gather(*(one() for _ in range(9)))
    assert time.monotonic() - start >= 8 * 0.05


async def test_the_cap_holds_in_full_flight_and_is_used_to_the_end() -> None:
    with openai_server.running(delay=0.01) as server:
        price = Price(1_000_000)
        one = (await ask(client(server, price=price))).cost
        purse = Counted(cap=40 * one)
        asked = client(server, price=price, in_flight=50)
        results = await asyncio.gather(*(asked.complete(body(i), letter, purse, 1) for i in range(100)), return_exceptions=True)
        await asked.chat.aclose()
    answered = [result for result in results if not isinstance(result, BaseException)]
    assert all(isinstance(result, CapReached) for result in results if isinstance(result, BaseException))
    assert purse.most <= purse.cap
    # The worst case of one question is most_tokens; when less than that is left, it is over.
    assert purse.spent == sum(result.cost for result in answered)
    assert purse.cap - purse.spent < price.of(most_tokens(body(99)), 0, 1)


async def test_a_cancelled_try_counts_in_full() -> None:
    with openai_server.running(only=["hang"], down_for=99) as server:
        purse = Counted()
        asked = client(server, price=Price(1_000_000))
        task = asyncio.create_task(asked.complete(body(0), letter, purse, 1))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asked.chat.aclose()
    assert purse.spent == most_tokens(body(0)) + 0
    assert asked.gate.in_flight == 0


def completion(**changes: object) -> dict[str, Any]:
    return {"model": "m", "choices": [{"message": {"content": "A"}, "finish_reason": "stop"}], **changes}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"3",
        b'{"choices": null}',
        json.dumps(completion(choices=[])).encode(),
        json.dumps(completion(choices=[{}])).encode(),
        json.dumps(completion(choices=["A"])).encode(),
        json.dumps(completion(choices=[{"message": {"content": ["A"]}}])).encode(),
        json.dumps(completion(model="another")).encode(),
        json.dumps(completion(error={"message": "overloaded"})).encode(),
        json.dumps(completion(usage={"prompt_tokens": "many"})).encode(),
        json.dumps(completion())[:-9].encode(),
    ],
)
def test_garbage_is_a_fault(content: bytes) -> None:
    with pytest.raises(Fault) as caught:
        reply_of(content, "m")
    assert caught.value.kind == "garbage"


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("gpt-5-mini", "gpt-5-mini-2026-01-01"), ("openai/gpt-5", "gpt-5"), ("gpt-5", "openai/gpt-5"), ("qwen3:4b", "qwen3:4b")],
)
def test_a_model_answers_by_several_names(asked: str, answered: str) -> None:
    assert reply_of(json.dumps(completion(model=answered)).encode(), asked).text == "A"
    with pytest.raises(Fault, match="answered by"):
        reply_of(json.dumps(completion(model=answered)).encode(), asked, answers_as="only-this")


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (429, b"slow down", "throttled"),
        (429, b'{"code": "insufficient_quota"}', "fatal"),
        (400, b"This model's maximum context length is 8192 tokens", "too long"),
        (413, b"", "too long"),
        (400, b'{"code": "content_filter"}', "refused"),
        (400, b"unknown parameter: top_logprobs", "rejected"),
        (307, b"", "fatal"),
        (404, b"no such model", "fatal"),
        (503, b"", "server"),
        (529, b"overloaded", "server"),
    ],
)
def test_statuses(status: int, content: bytes, kind: str) -> None:
    assert fault_of_status(status, {}, content).kind == kind


def test_retry_after_in_all_its_forms() -> None:
    def seconds(**headers: str) -> float | None:
        return fault_of_status(429, {name.replace("_", "-"): value for name, value in headers.items()}, b"").retry_after

    assert seconds(retry_after="2") == 2
    assert seconds(retry_after_ms="250", retry_after="9") == 0.25
    assert seconds(retry_after="Wed, 01 Jan 2020 00:00:00 GMT") == 0
    assert seconds(retry_after="soon") is None
    assert seconds(retry_after="nan") is None
    assert seconds() is None


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://api.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://10.0.0.1/v1", False),
    ],
)
def test_what_stays_on_this_machine(url: str, local: bool) -> None:
    assert is_loopback(url) is local


def test_an_address_that_is_none() -> None:
    with pytest.raises(JudgeError, match="https://host/v1"):
        Endpoint("api.example.com/v1")


async def test_a_recording_answers_what_was_recorded_and_nothing_else(tmp_path: Path) -> None:
    with openai_server.running() as server:
        recorder = Recorder(Endpoint(server.base_url), tmp_path / "replies.jsonl")
        first = await recorder.send(body(1))
        await recorder.aclose()
    replay = Replay(tmp_path / "replies.jsonl")
    again = await replay.send(body(1))
    assert (again.text, again.top, again.tokens_in) == (first.text, first.top, first.tokens_in)
    with pytest.raises(Fault, match="record it again"):
        await replay.send(body(2))


def scripted(*said: str | Fault) -> Callable[[object], str]:
    left = list(said)

    def say(_: object) -> str:
        now = left.pop(0)
        if isinstance(now, Fault):
            raise now
        return now

    return say


async def test_garbage_then_an_answer() -> None:
    asked = Client(Scripted(scripted(Fault("garbage", "HTML"), "what?", "B")), Gate("judge", patience=QUICK))
    outcome = await asked.complete(BODY, letter, Free(), 1)
    assert (outcome.answer, outcome.tries) == ("B", 3)
    assert asked.faults == {"garbage": 1, "unparsable": 1}
