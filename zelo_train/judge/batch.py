"""Batch files: questions written for a provider's batch API, and its answers read back.

    write   questions → JSONL files of at most 50,000 lines, one request a line, named by the key of its answer
    submit  files → provider; a batch is noted before it is sent, and recognised there by its name if the note was the last act
    fetch   provider → the lines of its output and error files
    read    lines → judgments

A line that expired is no answer and no failure: it is asked again with the next batch.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from zelo_train.errors import JudgeError, MissingPackage
from zelo_train.judge.ask import Ensemble
from zelo_train.judge.judges import ChatJudge
from zelo_train.llm import Endpoint, Fault, fault_of_status, reply_of
from zelo_train.records import Judgment, Question, Status
from zelo_train.store import Batch

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# OpenAI's limits: lines, and bytes with some room.
MOST_LINES = 50_000
MOST_BYTES = 190_000_000
URL: Final = "/v1/chat/completions"
# Batches cost half.
SHARE = 0.5

WRITTEN, SUBMITTING, SUBMITTED, READ = "written", "submitting", "submitted", "read"


class Batches(Protocol):
    """Where batches are noted: the workspace's store."""

    def put_batch(self, batch: Batch) -> None:
        """Write a batch, or what has become of it, in one commit."""
        ...

    def batches(self) -> list[Batch]:
        """Every batch, in the order first written."""
        ...


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A file for the provider.

    Attributes:
        path: of the file.
        batch: its note.
        questions: in the order of the lines.
    """

    path: Path
    batch: Batch
    questions: tuple[Question, ...]


def write(
    ensemble: Ensemble,
    judge: ChatJudge,
    questions: Sequence[Question],
    folder: Path,
    batches: Batches,
    *,
    share: float = SHARE,
    most_lines: int = MOST_LINES,
    most_bytes: int = MOST_BYTES,
) -> list[BatchFile]:
    """Write what the judge has not answered and no open batch asks. The most a file can cost is reserved before it is noted.

    Args:
        ensemble: whose texts and answers these are.
        judge: who will read them.
        questions: each once.
        folder: made if absent; the same questions give the same file names.
        batches: where the batches are noted, before they are sent anywhere.
        share: of the price that a batch costs.
        most_lines: of one file.
        most_bytes: of one file.

    Returns:
        The files, none when nothing is left to ask.

    Raises:
        CapReached: a file could exceed the cap; those before it are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    under_way = {key for batch in batches.batches() if batch.state != READ for key in batch.keys}
    lines: list[tuple[bytes, bytes, Question, int]] = []
    size = 0
    files: list[BatchFile] = []

    def close() -> None:
        nonlocal size
        keys = tuple(key for key, _, _, _ in lines)
        client = f"zelo-{blake2b(b''.join(keys), digest_size=8).hexdigest()}"
        worst = sum(cost for _, _, _, cost in lines)
        # Never settled by this process: it stays reserved until the answers are read.
        ensemble.purse.reserve(judge.name, worst)
        path = folder / f"{client}.jsonl"
        path.write_bytes(b"".join(line for _, line, _, _ in lines))
        batch = Batch(client, None, WRITTEN, keys, judge.name, worst)
        batches.put_batch(batch)
        files.append(BatchFile(path, batch, tuple(question for _, _, question, _ in lines)))
        lines.clear()
        size = 0

    for question in dict.fromkeys(ensemble.unanswered(judge, questions)):
        key = ensemble.texts.key(judge.identity(question), question)
        if key in under_way:
            continue
        body = judge.body(ensemble.asked(question))
        request = {"custom_id": key.hex(), "method": "POST", "url": URL, "body": body}
        line = json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if lines and (len(lines) >= most_lines or size + len(line) > most_bytes):
            close()
        lines.append((key, line, question, round(judge.worst(body) * share)))
        size += len(line)
    if lines:
        close()
    return files


@dataclass(frozen=True)
class BatchAnswers:
    """What came back.

    Attributes:
        judgments: final ones, failures included.
        again: expired, cancelled or missing: to be asked again.
        reasons: an example for each kind of failure.
    """

    judgments: tuple[Judgment, ...]
    again: tuple[Question, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)


def read(
    ensemble: Ensemble, judge: ChatJudge, questions: Iterable[Question], lines: Iterable[str | bytes], *, share: float = SHARE
) -> BatchAnswers:
    """Read a provider's output and error files, in any order.

    Args:
        ensemble: whose texts these are.
        judge: who was asked.
        questions: those of the batch.
        lines: of the files.
        share: of the price that a batch costs.

    Returns:
        The judgments, each once. They are not yet kept: see `keep`.

    Raises:
        JudgeError: a line that is not a batch's, or of another batch; the message names it.
    """
    wanted = {ensemble.texts.key(judge.identity(question), question).hex(): question for question in questions}
    found: dict[str, Judgment] = {}
    reasons: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["custom_id"]
        except (ValueError, KeyError, TypeError) as error:
            msg = f"line {number} is no line of a batch's output ({error!r}); expected JSON with a custom_id"
            raise JudgeError(msg) from None
        if name not in wanted:
            msg = (
                f"line {number} answers {name!r}, which is not in this batch; expected the output of the file that was "
                "written for these questions, texts and parameters"
            )
            raise JudgeError(msg)
        judgment, reason = _judgment(judge, wanted[name], row, share)
        if judgment is not None and (name not in found or not found[name].answered):
            found[name] = judgment
        if reason:
            reasons[judgment.status.value if judgment else "expired"] = reason
    again = tuple(question for name, question in wanted.items() if name not in found)
    return BatchAnswers(tuple(found.values()), again, reasons)


def keep(ensemble: Ensemble, judge: ChatJudge, answers: BatchAnswers) -> None:
    """Commit each judgment by itself, as `Ensemble.ask` does."""
    for judgment in answers.judgments:
        ensemble.place.put(judge.identity(judgment.question), judgment, ensemble.texts, run=ensemble.run)


def _judgment(judge: ChatJudge, question: Question, row: Mapping[str, Any], share: float) -> tuple[Judgment | None, str]:
    """A line's judgment, or None where it must be asked again; and why there is no answer."""
    failure = row.get("error") or {}
    if failure.get("code") in ("batch_expired", "batch_cancelled"):
        return None, str(failure.get("message") or failure["code"])
    response = row.get("response") or {}
    status = int(response.get("status_code") or 0)
    content = json.dumps(response.get("body") or {}).encode()
    answerer = judge.chat.answers_as if isinstance(judge.chat, Endpoint) else ""
    reply, fault, read_value = None, None, None
    try:
        if status != 200:
            raise fault_of_status(status, {}, content, "the batch") if status else Fault("server", str(failure)[:160])
        reply = reply_of(content, judge.model, answerer)
        read_value = judge.read(question, reply)
    except Fault as error:
        fault, reply = error, reply or error.reply
    if fault is not None and fault.kind in ("throttled", "server", "unreachable", "garbage"):
        return None, fault.reason
    if fault is not None and fault.kind == "fatal":
        raise JudgeError(f"judge {judge.name!r} could not be asked: {fault.reason}")
    used = (0, 0, 0) if reply is None else (reply.tokens_in, reply.tokens_cached, reply.tokens_out)
    form, value, order = read_value or (None, None, ())
    return Judgment(
        judge=judge.name,
        question=question,
        status=Status.OK if fault is None else fault.status,
        form=form,
        value=value,
        order=order,
        tokens_in=used[0],
        tokens_cached=used[1],
        tokens_out=used[2],
        cost=round(judge.price.of(*used) * share),
    ), "" if fault is None else fault.reason


# The provider's side


@dataclass(frozen=True, slots=True)
class Fetched:
    """What the provider made of a batch.

    Attributes:
        lines: of its output and error files.
        failure: why it took none of the batch; empty when it did.
    """

    lines: tuple[str, ...] = ()
    failure: str = ""


async def submit(judge: ChatJudge, path: Path, batch: Batch, batches: Batches) -> Batch:
    """Hand a file to the provider, once.

    The batch is noted as being submitted before it is; if this process dies in between, the next call finds the batch at the
    provider by the name we gave it, instead of buying it twice.

    Returns:
        The batch with the provider's id.

    Raises:
        JudgeError: the provider refused it.
    """
    if batch.provider is not None:
        return batch
    async with _provider(judge, f"the batch {batch.client} was not taken") as client:
        if batch.state == SUBMITTING:
            async for theirs in client.batches.list():
                if (theirs.metadata or {}).get("client") == batch.client:
                    return _note(batches, batch, theirs.id)
        batch = replace(batch, state=SUBMITTING)
        batches.put_batch(batch)
        uploaded = await client.files.create(file=path, purpose="batch")
        theirs = await client.batches.create(
            input_file_id=uploaded.id,
            endpoint=URL,
            completion_window="24h",
            metadata={"client": batch.client},
        )
        return _note(batches, batch, theirs.id)


def _note(batches: Batches, batch: Batch, provider: str) -> Batch:
    noted = replace(batch, provider=provider, state=SUBMITTED)
    batches.put_batch(noted)
    return noted


async def fetch(judge: ChatJudge, batch: Batch) -> Fetched | None:
    """What has become of a batch; None while it is under way.

    Raises:
        JudgeError: the batch was never submitted, or the provider cannot be asked.
    """
    if batch.provider is None:
        msg = f"batch {batch.client} has no id at the provider; expected one: submit it first"
        raise JudgeError(msg)
    async with _provider(judge, f"the batch {batch.client} cannot be fetched") as client:
        theirs = await client.batches.retrieve(batch.provider)
        if theirs.status in ("validating", "in_progress", "finalizing", "cancelling"):
            return None
        if theirs.status == "failed":
            errors = "; ".join(error.message or "" for error in (theirs.errors.data if theirs.errors else None) or ())
            return Fetched(failure=errors or "no reason given")
        lines: list[str] = []
        for name in (theirs.output_file_id, theirs.error_file_id):
            if name:
                lines += (await client.files.content(name)).text.splitlines()
        return Fetched(tuple(lines))


@asynccontextmanager
async def _provider(judge: ChatJudge, failing: str) -> AsyncIterator[AsyncOpenAI]:
    """The provider's files and batches. Raises JudgeError with what is `failing` when it answers with an error."""
    if not isinstance(judge.chat, Endpoint):
        msg = f"judge {judge.name!r} has no endpoint; expected one with a batch API"
        raise JudgeError(msg)
    try:
        import openai
    except ImportError as error:
        msg = f"a batch API needs the openai SDK ({error}); install it: pip install 'zerank-integrations[zelo]'"
        raise MissingPackage(msg) from error
    # Taken from the environment by the SDK, and no other host's affair.
    unsaid: dict[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    client = openai.AsyncOpenAI(
        base_url=judge.chat.base_url,
        api_key=judge.chat.key or "none",
        # One that was created and whose reply was lost must be looked for, not created again.
        max_retries=0,
        # A redirect would carry the texts to a host that nobody confirmed.
        http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not judge.chat.local),
        default_headers=None if judge.chat.host == "api.openai.com" else unsaid,
    )
    try:
        async with client:
            yield client
    except openai.APIError as error:
        msg = (
            f"judge {judge.name!r}: {failing} by {judge.chat.host} ({error}); expected an endpoint with a batch API, "
            "or try again later: what is noted is not sent twice"
        )
        raise JudgeError(msg) from error
