"""One client for OpenAI-compatible endpoints: one try at a time, many tries in order, and what stands in for a server.

    body → Chat.send → Reply          one try: `Endpoint` over HTTP, `Replay` from a file, `Scripted` from a function
    body → Client.complete → Outcome  up to six tries, each reserved before it is sent and settled after it

A try that brought nothing raises `Fault`, whatever the server called it: an HTTP 200 with garbage is a failure like a 500.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import math
import os
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from zelo_train.cost import Price
from zelo_train.errors import CapReached, JudgeError, MissingPackage
from zelo_train.records import Status

if TYPE_CHECKING:
    from aiohttp import ClientSession

T = TypeVar("T")

Body = Mapping[str, Any]

# Tokens that a chat template adds around a message, at most.
_TOKENS_PER_MESSAGE = 16


# What comes back


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said.

    Attributes:
        text: the message, without surrounding white space.
        refusal: what it said when it declined, if the endpoint marks that.
        finish: why it stopped: "stop", "length", "content_filter".
        top: for each token of the message, the likeliest tokens there and their log-probabilities; empty when not given.
        tokens_in, tokens_cached, tokens_out: as the endpoint counts them.
        content: the whole response as it came.
    """

    text: str
    refusal: str = ""
    finish: str = "stop"
    top: tuple[tuple[tuple[str, float], ...], ...] = ()
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    content: bytes = field(default=b"", repr=False)


FaultKind = Literal["throttled", "unreachable", "server", "garbage", "rejected", "too long", "refused", "unparsable", "fatal"]

# Tries of which nobody can say whether the provider counted them.
_UNKNOWN_BILL = frozenset({"unreachable", "garbage"})
# Asking the same again within a minute cannot help.
_FINAL = frozenset({"rejected", "too long"})
_STATUS: Mapping[str, Status] = {
    "too long": Status.TOO_LONG,
    "refused": Status.REFUSED,
    "unparsable": Status.UNPARSABLE,
}
# The model did answer; more than a few such answers are not bought.
_ANSWERED = frozenset({"refused", "unparsable"})


class Fault(Exception):
    """One try that brought no answer.

    Attributes:
        kind: "throttled" (429), "unreachable" (no connection, dropped, timed out), "server" (5xx), "garbage" (200, but not an
            answer of this model), "rejected" (another 4xx), "too long", "refused", "unparsable", "fatal" (no key, no model).
        reason: a few words for the report.
        retry_after: seconds the server asked to wait, if it did.
        reply: the reply that was paid for, when there was one.
    """

    def __init__(self, kind: FaultKind, reason: str, *, retry_after: float | None = None, reply: Reply | None = None) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind: FaultKind = kind
        self.reason = reason
        self.retry_after = retry_after
        self.reply = reply

    @property
    def status(self) -> Status:
        """How a question ends that ends with this."""
        return _STATUS.get(self.kind, Status.GAVE_UP)


class Chat(Protocol):
    """Whoever answers one chat-completions body."""

    async def send(self, body: Body) -> Reply:
        """One try. Raises Fault when it brings no reply."""
        ...

    async def aclose(self) -> None:
        """Let go of connections; a later send opens new ones."""
        ...


def reply_of(content: bytes, model: str, answers_as: str = "") -> Reply:
    """Read a chat-completions response.

    Args:
        content: the response's body.
        model: what was asked for.
        answers_as: the name the endpoint answers with, when it is another one.

    Raises:
        Fault: not JSON, not a completion, no choice, or another model's answer ("garbage"); a content filter ("refused").
    """
    try:
        data = json.loads(content)
    except ValueError:
        head = content[:60].decode("utf-8", "replace").strip().replace("\n", " ")
        raise Fault("garbage", f"HTTP 200 with something that is not JSON: {head!r}") from None
    try:
        if isinstance(data.get("error"), dict):
            raise Fault("garbage", f"HTTP 200 with an error: {str(data['error'].get('message', ''))[:120]!r}")
        choices = data["choices"]
        if not choices:
            raise Fault("garbage", "a completion without choices", reply=_usage_only(data))
        answered_by = str(data.get("model") or "")
        if answered_by and not _same_model(model, answered_by, answers_as):
            raise Fault("garbage", f"asked {model!r}, answered by {answered_by!r}", reply=_usage_only(data))
        choice = choices[0]
        message = choice["message"]
        tokens = (choice.get("logprobs") or {}).get("content") or ()
        return Reply(
            text=(message.get("content") or "").strip(),
            refusal=message.get("refusal") or "",
            finish=choice.get("finish_reason") or "",
            top=tuple(
                tuple((str(at["token"]), float(at["logprob"])) for at in (token.get("top_logprobs") or (token,)))
                for token in tokens
            ),
            **_usage(data),
            content=content,
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise Fault("garbage", f"HTTP 200 with JSON that is not a completion ({type(error).__name__}: {error})") from None


def _usage(data: Mapping[str, Any]) -> dict[str, Any]:
    usage = data.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return {
        "tokens_in": int(usage.get("prompt_tokens") or 0),
        "tokens_cached": int(details.get("cached_tokens") or 0),
        "tokens_out": int(usage.get("completion_tokens") or 0),
    }


def _usage_only(data: Mapping[str, Any]) -> Reply | None:
    usage = _usage(data)
    return Reply("", **usage) if usage["tokens_in"] else None


def _same_model(asked: str, answered: str, answers_as: str) -> bool:
    """Whether an endpoint's name for its model means the one asked for: "gpt-x" answers as "gpt-x-2026-01-01"."""
    if answers_as:
        return answered == answers_as

    def bare(name: str) -> str:
        return name.rstrip("/").rsplit("/", 1)[-1].split(":")[0].lower()

    a, b = bare(asked), bare(answered)
    return a.startswith(b) or b.startswith(a)


# One try over HTTP


def is_loopback(base_url: str) -> bool:
    """Whether what is sent there stays on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Endpoint:
    """An OpenAI-compatible server: vLLM, SGLang, Ollama, LiteLLM's proxy, Gemini, Anthropic's, most vendors'.

    Args:
        base_url: up to and with "/v1" or what stands for it.
        api_key_env: the environment variable that holds the key; empty for none.
        timeout: seconds one try may take from start to end. A server that drips bytes is not waited for longer.
        answers_as: the model name it answers with, when that is not the one asked for.
        in_flight: connections at most.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str = "",
        timeout: float = 60.0,
        answers_as: str = "",
        in_flight: int = 100,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            msg = f"base_url is {base_url!r}; expected an address such as https://host/v1"
            raise JudgeError(msg)
        self.base_url = base_url
        self._url = urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.answers_as = answers_as
        self.in_flight = in_flight
        self._open: tuple[asyncio.AbstractEventLoop, ClientSession] | None = None

    @property
    def host(self) -> str:
        """Where texts go, with the port if the address has one."""
        return urlsplit(self.base_url).netloc.rpartition("@")[2]

    @property
    def local(self) -> bool:
        """Whether what is sent there stays on this machine."""
        return is_loopback(self.base_url)

    @property
    def key(self) -> str:
        """What it lets us in with; empty where it asks for none.

        Raises:
            JudgeError: the environment variable is not there.
        """
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            msg = f"the environment variable {self.api_key_env} is empty; expected the API key of {self.host}: export it"
            raise JudgeError(msg)
        return key

    def _session(self) -> ClientSession:
        loop = asyncio.get_running_loop()
        if self._open is None or self._open[0] is not loop:
            try:
                from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
            except ImportError as error:
                msg = f"asking an endpoint needs aiohttp ({error}); install it: pip install 'zerank-integrations[zelo]'"
                raise MissingPackage(msg) from error
            headers = {"Content-Type": "application/json", "User-Agent": "zerank-integrations"}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            if self.host == "api.openai.com":
                # Whose account is charged; no other host's affair.
                own = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
                headers |= {header: os.environ[name] for header, name in own.items() if os.environ.get(name)}
            session = ClientSession(
                connector=TCPConnector(limit=self.in_flight, ssl=self._certificates()),
                timeout=ClientTimeout(total=self.timeout),
                headers=headers,
                proxy=self._proxy(),
                cookie_jar=DummyCookieJar(),
            )
            self._open = (loop, session)
        return self._open[1]

    def _certificates(self) -> SSLContext | bool:
        """The system's authorities, and certifi's where the system has none of its own."""
        if urlsplit(self.base_url).scheme != "https":
            return True
        context = create_default_context()
        with suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
        return context

    def _proxy(self) -> str | None:
        """As the environment says; never for this machine."""
        parts = urlsplit(self.base_url)
        return None if self.local or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)

    async def send(self, body: Body) -> Reply:
        """One try; the response is read whole within `timeout` seconds."""
        session = self._session()
        from aiohttp import ClientError

        # The openai SDK's layers on top of the same transport take three times the CPU: see docs/log.md.
        content = json.dumps({**body, "stream": False}, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            # A redirect would carry the texts to a host that nobody confirmed.
            async with session.post(self._url, data=content, allow_redirects=False) as response:
                content = await response.read()
        except TimeoutError:
            raise Fault("unreachable", f"no whole answer within {self.timeout:g} s") from None
        except ClientError as error:
            raise Fault("unreachable", f"{type(error).__name__}: {error}"[:160]) from None
        if not 200 <= response.status < 300:
            raise fault_of_status(response.status, response.headers, content, self.host)
        return reply_of(content, str(body["model"]), self.answers_as)

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        if self._open is not None:
            loop, session = self._open
            self._open = None
            if loop is asyncio.get_running_loop():
                await session.close()


def fault_of_status(status: int, headers: Mapping[str, str], content: bytes, host: str = "the server") -> Fault:
    """What an HTTP status that is not 200 means for the question and for the judge."""
    text = content[:2000].decode("utf-8", "replace")
    low = text.lower()
    said = f"HTTP {status} from {host}: {text[:160]!r}"
    if status == 429 and not any(word in low for word in ("insufficient_quota", "billing")):
        return Fault("throttled", said, retry_after=_retry_after(headers))
    if status in (400, 403, 422) and any(word in low for word in ("content_filter", "content_policy", "moderation", "safety")):
        return Fault("refused", said)
    if status == 413 or (
        status in (400, 422)
        and any(word in low for word in ("context_length", "context length", "too long", "too many tokens", "max_model_len"))
    ):
        return Fault("too long", said)
    if status in (401, 402, 403, 404, 429) or 300 <= status < 400:
        return Fault("fatal", said)
    if status in (408, 409, 425) or status >= 500:
        return Fault("server", said, retry_after=_retry_after(headers))
    return Fault("rejected", said)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `Retry-After` in seconds or as a date; None without a usable one."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


# What stands in for a server


class Scripted:
    """A judge's model as a function: for tests and for trying prompts without a server.

    Args:
        script: from a body to a reply, or to its text. It may raise Fault.
    """

    def __init__(self, script: Callable[[Body], Reply | str]) -> None:
        self.script = script

    async def send(self, body: Body) -> Reply:
        """What the script says."""
        said = self.script(body)
        return said if isinstance(said, Reply) else Reply(said, tokens_in=most_tokens(body), tokens_out=1)

    async def aclose(self) -> None:
        """Nothing to let go of."""


def body_hash(body: Body) -> str:
    """The name of a request in a recording: equal bodies have equal names."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


class Recorder:
    """Passes bodies on to another chat and writes each reply to a JSONL file that `Replay` reads."""

    def __init__(self, chat: Chat, path: str | os.PathLike[str]) -> None:
        self.chat = chat
        self.path = Path(path)

    async def send(self, body: Body) -> Reply:
        """The other chat's reply; written before it is handed on."""
        reply = await self.chat.send(body)
        line = {
            "body": body_hash(body),
            **{name: getattr(reply, name) for name in Reply.__dataclass_fields__ if name != "content"},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return reply

    async def aclose(self) -> None:
        """Close the other chat."""
        await self.chat.aclose()


class Replay:
    """Answers from a recording; a body that was not recorded is a Fault, never a guess."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._replies: dict[str, Reply] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                top = tuple(tuple((str(token), float(p)) for token, p in at) for at in row.pop("top", ()))
                name = row.pop("body")
                self._replies[name] = Reply(**row, top=top)

    async def send(self, body: Body) -> Reply:
        """The recorded reply."""
        try:
            return self._replies[body_hash(body)]
        except KeyError:
            msg = (
                f"{self.path} has no reply to this question; expected a recording made with the same texts, prompts and "
                "parameters: record it again"
            )
            raise Fault("fatal", msg) from None

    async def aclose(self) -> None:
        """Nothing to let go of."""


# Money


class Purse(Protocol):
    """Where money is counted, in millionths: `cost.Budget`."""

    def reserve(self, judge: str, millionths: int) -> int:
        """Set aside the most that one try can cost. Returns a ticket; raises CapReached when the cap does not allow it."""
        ...

    def settle(self, ticket: int, millionths: int) -> None:
        """Put what was spent in the place of what was set aside."""
        ...


class Free:
    """The purse of judges that cost nothing."""

    def reserve(self, judge: str, millionths: int) -> int:
        """Always."""
        return 0

    def settle(self, ticket: int, millionths: int) -> None:
        """Nothing to do."""


def most_tokens(body: Body) -> int:
    """The most tokens a body's messages can be: a token is at least one byte of UTF-8."""
    return sum(len(str(message["content"]).encode()) + _TOKENS_PER_MESSAGE for message in body["messages"])


def likely_tokens(body: Body) -> int:
    """About how many tokens a body's messages are: four bytes each, which is near for English."""
    return sum(len(str(message["content"]).encode()) // 4 + _TOKENS_PER_MESSAGE for message in body["messages"])


# Many tries


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an endpoint is put up with.

    Attributes:
        tries: how often a question is sent at most.
        answers: how many refusals or unreadable answers to one question are paid for at most.
        first_wait: seconds; the n-th wait is random between 0 and first_wait · 2ⁿ⁻¹ (full jitter), four times that after a 429.
        longest_wait: seconds a single wait lasts at most, a server's own Retry-After apart.
        retry_after: a longer Retry-After than this, in seconds, stops the judge.
        failures: so many in a row, over all questions, open the circuit breaker.
        rest: seconds it stays open at first, doubled after each failed probe.
        probes: so many failed probes stop the judge; one, if it has not answered yet.
    """

    tries: int = 6
    answers: int = 3
    first_wait: float = 0.5
    longest_wait: float = 60.0
    retry_after: float = 600.0
    failures: int = 20
    rest: float = 2.0
    probes: int = 5


class Gate:
    """Who may send now: adapts how many are in flight, paces, and breaks the circuit.

    The number in flight starts at eight. After each window of as many tries it grows by half, or shrinks by a third when more
    than one in twenty was throttled or timed out; so a few stray faults do not slow a judge down, and a real limit does.
    After `patience.failures` failures in a row nothing is sent for a while; then one probe decides. All times are monotonic.

    Args:
        judge: its name, for messages.
        in_flight: the most that may be in flight.
        per_minute: the most that may be sent in a minute; None for no such limit.
        patience: when to give up.
    """

    def __init__(
        self, judge: str, in_flight: int = 100, per_minute: float | None = None, patience: Patience | None = None
    ) -> None:
        self.judge = judge
        self.most = max(1, in_flight)
        self.limit = float(min(8, self.most))
        self.patience = patience or Patience()
        self.in_flight = 0
        self.streak = 0
        self.succeeded = 0
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._closed_until = 0.0
        self._failed_probes = 0
        self._probing = False
        self._window = 0
        self._pressed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.stopped: JudgeError | None = None

    @property
    def allowed(self) -> int:
        """How many may be in flight now; one, while a probe decides."""
        return 1 if self._probing else int(self.limit)

    async def enter(self) -> None:
        """Wait for a place. Raises JudgeError once the judge is stopped."""
        while True:
            if self.stopped is not None:
                raise self.stopped
            rest = self._closed_until - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest)
            elif self.in_flight < self.allowed:
                break
            else:
                place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(place)
                try:
                    await place
                except asyncio.CancelledError:
                    # The place that was given to this one goes to the next.
                    self._wake()
                    raise
        self.in_flight += 1
        if self._gap:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
            try:
                await asyncio.sleep(at - now)
            except asyncio.CancelledError:
                self.leave()
                raise

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._wake()

    def success(self) -> None:
        """A reply came."""
        self.streak = 0
        self.succeeded += 1
        self._probing = False
        self._failed_probes = 0
        self._count(pressed=False)

    def alive(self) -> None:
        """A reply came, if not one that can be used: the endpoint works, and the question may be tried again."""
        if self._probing:
            self.streak = self._failed_probes = 0
            self._probing = False
        self._count(pressed=False)

    def failure(self, fault: Fault) -> None:
        """A try brought nothing; enough of them in a row open the circuit."""
        # A text that is too long says nothing of the judge.
        if fault.kind == "too long":
            return
        if fault.kind == "fatal":
            self.stop(JudgeError(f"judge {self.judge!r} cannot be asked: {fault.reason}"))
        if fault.retry_after is not None and fault.retry_after > self.patience.retry_after:
            self.stop(
                JudgeError(
                    f"judge {self.judge!r} asks to wait {fault.retry_after:.0f} s, longer than "
                    f"{self.patience.retry_after:.0f} s ({fault.reason}); what is answered is kept: run the same command "
                    "again then"
                )
            )
        self.streak += 1
        self._count(pressed=fault.kind in ("throttled", "unreachable"))
        if self._probing or self.streak >= self.patience.failures:
            self._open(fault)

    def stop(self, error: JudgeError) -> None:
        """Let nobody send any more."""
        self.stopped = self.stopped or error
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)

    def _open(self, fault: Fault) -> None:
        now = time.monotonic()
        if now < self._closed_until:
            return  # one that was under way when the circuit opened
        self._failed_probes += self._probing
        # One that never answered is more likely misnamed than busy: nobody should wait a minute to hear it.
        probes = self.patience.probes if self.succeeded else 1
        if self._failed_probes >= probes or fault.kind in _FINAL | _ANSWERED:
            self.stop(
                JudgeError(
                    f"judge {self.judge!r} failed {self.streak} times in a row, the last time with {fault}; "
                    "expected answers: what is answered is kept; repair the endpoint and run the same command again"
                )
            )
            return
        rest = min(self.patience.rest * 2**self._failed_probes, self.patience.longest_wait)
        self._closed_until = now + max(rest, fault.retry_after or 0.0)
        self._probing = True

    def _count(self, *, pressed: bool) -> None:
        self._window += 1
        self._pressed += pressed
        if self._window >= max(8, int(self.limit)):
            grow = self._pressed <= max(1, self._window // 20)
            self.limit = min(float(self.most), self.limit * 1.5) if grow else max(1.0, self.limit / 1.5)
            self._window = self._pressed = 0

    def _wake(self) -> None:
        free = self.allowed - self.in_flight
        while self._waiting and free > 0:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1


@dataclass(slots=True)
class Outcome(Generic[T]):
    """How a question ended.

    Attributes:
        status: OK, or why there is no answer.
        answer: what was read from the reply; None without one.
        reason: of the last failed try.
        reply: the last one, when there was one.
        tokens_in, tokens_cached, tokens_out, cost: over all tries; cost in millionths. A try whose reply never arrived counts
            with the most it can have cost.
        tries: how often it was sent.
    """

    status: Status
    answer: T | None = None
    reason: str = ""
    reply: Reply | None = None
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: int = 0
    tries: int = 0


@dataclass(slots=True)
class Client:
    """Asks a chat until it answers, within its patience and its owner's money.

    Attributes:
        chat: who answers.
        gate: who may send now.
        price: of its tokens.
        faults: how many tries of each kind failed, by kind.
        reasons: an example for each kind.
    """

    chat: Chat
    gate: Gate
    price: Price = field(default_factory=Price)
    faults: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: random.Random = field(default_factory=random.Random)

    async def complete(self, body: Body, read: Callable[[Reply], T], purse: Purse, most_out: int) -> Outcome[T]:
        """Send until a reply can be read.

        Args:
            body: of a chat-completions request.
            read: from a reply to an answer; raises Fault "refused" or "unparsable" when it holds none.
            purse: before each try the most it can cost is set aside, after it what it did cost is put in its place.
            most_out: tokens that one reply can have at most.

        Returns:
            The answer, or the status that says why there is none.

        Raises:
            JudgeError: the judge is stopped, by its circuit breaker or because it can never answer.
            CapReached: the next try could exceed the cap.
        """
        patience = self.gate.patience
        worst = self.price.of(most_tokens(body), 0, most_out)
        outcome: Outcome[T] = Outcome(Status.GAVE_UP)
        replies = 0
        while True:
            await self.gate.enter()
            try:
                fault = await self._try(body, read, purse, worst, outcome)
                if fault is None:
                    self.gate.success()
                else:
                    self.faults[fault.kind] += 1
                    self.reasons[fault.kind] = fault.reason
                    replies += fault.kind in _ANSWERED
                    if fault.kind in _ANSWERED and replies < patience.answers:
                        self.gate.alive()
                    else:
                        self.gate.failure(fault)
            finally:
                self.gate.leave()
            if fault is None:
                outcome.status = Status.OK
                return outcome
            outcome.reason = fault.reason
            if self.gate.stopped is not None:
                # This question was never really asked: it ends nowhere and is asked again with the next run.
                raise self.gate.stopped
            if fault.kind in _FINAL or outcome.tries >= patience.tries or replies >= patience.answers:
                outcome.status = fault.status
                return outcome
            if fault.kind not in _ANSWERED:
                await self.sleep(self._wait(outcome.tries, fault))

    async def _try(self, body: Body, read: Callable[[Reply], T], purse: Purse, worst: int, outcome: Outcome[T]) -> Fault | None:
        """One try and its bill. Returns what went wrong, if anything did."""
        ticket = await self._reserve(purse, worst)
        outcome.tries += 1
        # What is under way when this is cancelled counts in full.
        spent = worst
        reply, fault = None, None
        try:
            try:
                reply = await self.chat.send(body)
                outcome.answer = read(reply)
            except Fault as error:
                fault = error
                reply = reply or error.reply
            if reply is not None:
                # An endpoint that does not say what it used is taken at the likely number.
                used = (reply.tokens_in or likely_tokens(body), reply.tokens_cached, reply.tokens_out or 1)
                outcome.reply = reply
                outcome.tokens_in += used[0]
                outcome.tokens_cached += used[1]
                outcome.tokens_out += used[2]
                spent = self.price.of(*used)
            elif fault is not None and fault.kind not in _UNKNOWN_BILL:
                spent = 0
        finally:
            outcome.cost += spent
            purse.settle(ticket, spent)
        return fault

    async def _reserve(self, purse: Purse, worst: int) -> int:
        """Set money aside; where the cap forbids it, first let those under way bring back what they do not need."""
        while True:
            try:
                return purse.reserve(self.gate.judge, worst)
            except CapReached:
                if self.gate.in_flight <= 1:
                    raise
                # This one gives its place up for the wait: the last one under way decides.
                self.gate.leave()
                try:
                    await self.sleep(0.02)
                finally:
                    self.gate.in_flight += 1

    def _wait(self, tries: int, fault: Fault) -> float:
        """Seconds before the next try: full jitter, after what the server asked for."""
        patience = self.gate.patience
        widest = patience.first_wait * 2 ** (tries - 1) * (4 if fault.kind == "throttled" else 1)
        return (fault.retry_after or 0.0) + self.jitter.uniform(0.0, min(widest, patience.longest_wait))
