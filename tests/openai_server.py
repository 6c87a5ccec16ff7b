"""A loopback server that speaks the OpenAI chat-completions protocol, and every way it can go wrong.

    with openai_server.running(delay=0.05, faults=0.1) as server:
        server.base_url, server.stats()

It runs in a process of its own, so that its time is not the client's. It judges by numbers: a document that says "worth 0.73"
is worth .73, and everything it answers follows from the worths in the last message, in the order shown:

    one worth    the grade 10 · worth, with log-probabilities around it
    two          P(A) = 1 / (1 + exp(-4 (a - b))) as log-probabilities of the tokens A and B
    more         the letters from best to worst

What goes wrong is a function of the seed, the body and how often that body has come, so that runs are repeatable. One answer in
full is served to one body at most once per success; `stats` tells how often that was.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAULTS = (
    "429 with Retry-After",
    "429",
    "500",
    "hang",
    "drop",
    "HTML",
    "cut JSON",
    "prose",
    "refusal",
    "empty choices",
    "wrong model",
    "slow drip",
)

WORTH = re.compile(r"worth (\d\.\d+)")
SHARPNESS = 4.0


def p_first(first: float, second: float) -> float:
    """What the server thinks of two worths."""
    return 1.0 / (1.0 + math.exp(-SHARPNESS * (first - second)))


@dataclass
class Settings:
    model: str = "test-model"
    delay: float = 0.0
    faults: float = 0.0
    only: tuple[str, ...] = FAULTS
    seed: int = 0
    retry_after: float = 0.05
    context: int = 100_000
    key: str = ""
    logprobs: bool = True
    # Faults for so many requests, after so many that it answers: a server that is down, then up again.
    down_for: int = 0
    up_for: int = 0
    fail_batches: bool = False
    # How it judges: "worth", "A" (always the first), "random", "longer".
    mind: str = "worth"


class Server:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.requests = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.streamed = 0
        self.early = 0
        self.seen: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.faulted: Counter[str] = Counter()
        self.billed_in = 0
        self.billed_out = 0
        self.not_before: dict[str, float] = {}
        self.headers: dict[str, str] = {}
        self.last: dict[str, Any] = {}
        self.files: list[bytes] = []
        self.batches: list[dict[str, Any]] = []

    def fault(self, name: str) -> str | None:
        """Which fault this body meets this time, if any."""
        if 0 < self.requests - self.settings.up_for <= self.settings.down_for:
            return self.settings.only[0]
        digest = hashlib.blake2b(f"{self.settings.seed} {name} {self.seen[name]}".encode(), digest_size=8).digest()
        draw = int.from_bytes(digest, "little") / 2**64
        if draw >= self.settings.faults:
            return None
        return self.settings.only[int(draw / self.settings.faults * len(self.settings.only))]

    def judge(self, body: dict[str, Any]) -> tuple[str, list[dict[str, float]]]:
        """The text and, for each of its tokens, the probabilities there."""
        shown = body["messages"][-1]["content"]
        worths = [float(found) for found in WORTH.findall(shown)]
        if self.settings.mind == "A":
            return ("A", [{"A": 0.97, "B": 0.03}]) if len(worths) > 1 else ("5", [{"5": 1.0}])
        if self.settings.mind == "random":
            p = hashlib.blake2b(shown.encode(), digest_size=1).digest()[0] / 255
            return ("A" if p > 0.5 else "B"), [{"A": 0.01 + 0.98 * p, "B": 0.99 - 0.98 * p}]
        if len(worths) == 1:
            grade = 10 * worths[0]
            low = min(9, int(grade))
            share = grade - low
            if low == 9:
                text = "10" if share > 0.5 else "9"
                return text, [{"9": 1 - share, "1": share}, {"0": 0.999, "5": 0.001}][: len(text)]
            return str(low + (share > 0.5)), [{str(low): 1 - share, str(low + 1): share}]
        if len(worths) == 2:
            p = p_first(*worths)
            # Some of the mass is on tokens that are neither, as with real models.
            return ("A" if p >= 0.5 else "B"), [{"A": 0.9 * p, " A": 0.05 * p, "B": 0.95 * (1 - p), "The": 0.05}]
        order = sorted(range(len(worths)), key=lambda i: -worths[i])
        return " > ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] for i in order), []

    def completion(self, body: dict[str, Any], text: str, tokens: list[dict[str, float]], **message: object) -> dict[str, Any]:
        sent = sum(len(m["content"].encode()) // 4 + 4 for m in body["messages"])
        written = max(1, len(tokens))
        self.billed_in += sent
        self.billed_out += written
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None, **message},
            "finish_reason": "stop",
            "logprobs": None,
        }
        if body.get("logprobs") and self.settings.logprobs:
            choice["logprobs"] = {
                "content": [
                    {
                        "token": max(at, key=at.__getitem__),
                        "logprob": math.log(max(at.values())),
                        "bytes": None,
                        "top_logprobs": [
                            {"token": token, "logprob": math.log(max(p, 1e-9)), "bytes": None}
                            for token, p in sorted(at.items(), key=lambda item: -item[1])[: body.get("top_logprobs", 0)]
                        ],
                    }
                    for at in tokens or [{text.split(" ")[0]: 0.9}]
                ]
            }
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.settings.model + "-2026-01-01",
            "choices": [choice],
            "usage": {
                "prompt_tokens": sent,
                "completion_tokens": written,
                "total_tokens": sent + written,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    def batch(self, method: str, path: str, content: bytes) -> bytes | None:
        """Files and batches; a batch is under way when it is first looked at, and done the second time."""
        match method, path.removeprefix("/v1").strip("/").split("/"):
            case "POST", ["files"]:
                # The multipart part with the lines in it.
                self.files.append(next(part for part in content.split(b"\r\n\r\n") if part.startswith(b'{"custom_id"')))
                found: dict[str, Any] = {"id": f"file-{len(self.files)}", "object": "file", "filename": "b", "bytes": 1}
                found |= {"created_at": 1, "purpose": "batch", "status": "processed"}
            case "POST", ["batches"]:
                found = {"id": f"batch-{len(self.batches) + 1}", "object": "batch", "status": "in_progress", "created_at": 1}
                found |= json.loads(content)
                self.batches.append(found)
            case "GET", ["batches"]:
                found = {"object": "list", "data": self.batches, "has_more": False}
            case "GET", ["batches", name]:
                found = dict(self.batches[int(name.removeprefix("batch-")) - 1])
                after: dict[str, Any] = {"status": "completed", "output_file_id": f"output-{found['input_file_id']}"}
                if self.settings.fail_batches:
                    after = {"status": "failed", "errors": {"data": [{"message": "the queue is full"}]}}
                self.batches[int(name.removeprefix("batch-")) - 1] |= after
            case "GET", ["files", name, "content"]:
                number = int(name.removeprefix("output-file-"))
                rows = [json.loads(line) for line in self.files[number - 1].split(b"\r\n")[0].splitlines()]
                lines = [
                    {
                        "custom_id": row["custom_id"],
                        "response": {"status_code": 200, "body": self.completion(row["body"], *self.judge(row["body"]))},
                        "error": None,
                    }
                    for row in rows
                ]
                return response(200, "\n".join(map(json.dumps, lines)).encode(), "application/octet-stream")
            case _:
                return None
        return response(200, json.dumps(found).encode())

    def stats(self) -> dict[str, Any]:
        return {
            "batches": len(self.batches),
            "requests": self.requests,
            "most_in_flight": self.most_in_flight,
            "streamed": self.streamed,
            "early": self.early,
            "bodies": len(self.seen),
            "served": sum(self.served.values()),
            "served_twice": sum(count > 1 for count in self.served.values()),
            "faulted": dict(self.faulted),
            "billed_in": self.billed_in,
            "billed_out": self.billed_out,
            "headers": self.headers,
            "last": self.last,
        }


REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 500: "Server Error"}


def response(status: int, content: bytes, kind: str = "application/json", **headers: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        f"content-type: {kind}",
        f"content-length: {len(content)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def error(status: int, message: str, code: str, **headers: str) -> bytes:
    return response(status, json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode(), **headers)


class Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.server = server
        self.received = b""
        self.busy: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self.busy:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = self.received[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", 0))
        if len(self.received) < end + 4 + size:
            return
        content = self.received[end + 4 : end + 4 + size]
        self.received = self.received[end + 4 + size :]
        method, path, _ = first.split(" ")
        if method == "GET" and path == "/stats":
            self.transport.write(response(200, json.dumps(self.server.stats()).encode()))
        elif method == "POST" and path == "/v1/chat/completions":
            task = asyncio.get_running_loop().create_task(self.answer(headers, content))
            self.busy.add(task)
            task.add_done_callback(self.busy.discard)
        elif reply := self.server.batch(method, path.split("?")[0], content):
            self.transport.write(reply)
        else:
            self.transport.write(error(404, f"no {path}", "not_found"))

    async def answer(self, headers: dict[str, str], content: bytes) -> None:
        server = self.server
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            await self.answer_once(headers, content)
        finally:
            server.in_flight -= 1

    async def answer_once(self, headers: dict[str, str], content: bytes) -> None:
        server, settings = self.server, self.server.settings
        server.requests += 1
        server.headers = headers
        if settings.key and headers.get("authorization") != f"Bearer {settings.key}":
            self.transport.write(error(401, "Incorrect API key provided", "invalid_api_key"))
            return
        body = json.loads(content)
        server.last = body
        complaint = self.complaint(body)
        if complaint:
            self.transport.write(complaint)
            return
        name = hashlib.blake2b(content, digest_size=12).hexdigest()
        if time.monotonic() < server.not_before.get(name, 0.0):
            server.early += 1
        fault = server.fault(name)
        server.seen[name] += 1
        if settings.delay:
            await asyncio.sleep(settings.delay)
        if fault is not None:
            server.faulted[fault] += 1
            await self.fail(fault, body, name)
            return
        text, tokens = server.judge(body)
        server.served[name] += 1
        self.transport.write(response(200, json.dumps(server.completion(body, text, tokens)).encode()))

    def complaint(self, body: dict[str, Any]) -> bytes | None:
        """What a real server would reject."""
        settings = self.server.settings
        if body.get("stream"):
            self.server.streamed += 1
            return error(400, "streaming is not offered", "unsupported")
        if body["model"] != settings.model:
            return error(404, f"The model {body['model']!r} does not exist", "model_not_found")
        if not all(m["role"] in ("system", "user", "assistant") and isinstance(m["content"], str) for m in body["messages"]):
            return error(400, "messages are malformed", "invalid_request")
        if body.get("top_logprobs") is not None and not (body.get("logprobs") and 0 <= body["top_logprobs"] <= 20):
            return error(400, "top_logprobs must be 0 to 20, with logprobs", "invalid_request")
        if sum(len(m["content"]) for m in body["messages"]) // 4 > settings.context:
            return error(400, f"maximum context length is {settings.context} tokens", "context_length_exceeded")
        return None

    async def fail(self, fault: str, body: dict[str, Any], name: str) -> None:
        server = self.server
        write = self.transport.write

        def whole(text: str, tokens: list[dict[str, float]] | None = None, **message: object) -> dict[str, Any]:
            return server.completion(body, text, tokens or [], **message)

        match fault:
            case "429 with Retry-After":
                server.not_before[name] = time.monotonic() + server.settings.retry_after
                write(error(429, "slow down", "rate_limit", Retry_After=f"{server.settings.retry_after:g}"))
            case "429":
                write(error(429, "slow down", "rate_limit"))
            case "500":
                write(error(500, "something broke", "server_error"))
            case "hang":
                await asyncio.sleep(3600)
            case "drop":
                # Half the time in the middle of the response.
                if server.seen[name] % 2:
                    write(response(200, json.dumps(whole("A")).encode())[:90])
                self.transport.abort()
            case "HTML":
                write(response(200, b"<html><body>502 Bad Gateway</body></html>", "text/html"))
            case "cut JSON":
                content = json.dumps(whole("A")).encode()
                write(response(200, content[: len(content) // 2]))
            case "prose":
                write(response(200, json.dumps(whole("Both documents discuss the matter at some length.")).encode()))
            case "refusal":
                refused = whole("", refusal="I'm sorry, I can't help with that.")
                write(response(200, json.dumps(refused).encode()))
            case "empty choices":
                write(response(200, json.dumps({**whole("A"), "choices": []}).encode()))
            case "wrong model":
                write(response(200, json.dumps({**whole("A", [{"A": 1.0}]), "model": "another-model"}).encode()))
            case "slow drip":
                content = response(200, json.dumps(whole("A")).encode())
                for at in range(len(content)):
                    write(content[at : at + 1])
                    await asyncio.sleep(0.05)


async def serve(settings: Settings) -> None:
    server = Server(settings)
    listening = await asyncio.get_running_loop().create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=512)
    sys.stdout.write(f"{listening.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    # It goes with its parent: the end of standard input ends it.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@dataclass(frozen=True)
class Running:
    port: int
    model: str

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=10) as answer:
            return json.load(answer)


@contextmanager
def running(**settings: object) -> Iterator[Running]:
    """A server for the length of a block; arguments as in `Settings`."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield Running(int(process.stdout.readline()), settings.get("model", Settings.model))
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="?", default="{}", help="JSON of what differs from Settings")
    asyncio.run(serve(Settings(**json.loads(parser.parse_args().settings))))
