"""The `zerank` command: one function per command.

Only what `zerank --help` needs is imported here; torch comes with the command that scores.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zerank_integrations.checkpoints import DEFAULT, known
from zerank_integrations.errors import ZerankError, ZerankWarning
from zerank_integrations.shell import FAILURE, Mistake, Shell

if TYPE_CHECKING:
    from tqdm import tqdm

    from zerank_integrations.ranked import Ranked, RankedDocument

# Below this a bar would come and go faster than it can be read.
MUCH = 50

MIB = 2**20

JSON_LINES = (".jsonl", ".ndjson")

shell = Shell(
    "zerank",
    "Score and rank documents with the zerank rerankers.",
    failures=[ZerankError],
    shown=ZerankWarning,
)
app, main = shell.app, shell.main


# Options that several commands share

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or zelo-mini (embedded, for demonstration).")]
Revision = Annotated[str | None, typer.Option(help="Hub commit, branch or tag.", show_default="pinned")]
Base = Annotated[str | None, typer.Option(help="The model a LoRA adapter lies over, if it has moved.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.", show_default="the best there is")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="What is computed in; auto: bfloat16 where the device has it."),
]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the Hub.")]


@shell.command
def rank(
    *,
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="Documents; - or none: standard input.", show_default=False)
    ] = None,
    query: Annotated[str, typer.Option("--query", "-q", help="What is looked for.")],
    whole: Annotated[bool, typer.Option("--whole", "-w", help="One document per file, not per line.")] = False,
    field: Annotated[
        str | None,
        typer.Option(help="Read every input as JSON Lines and take this field.", show_default="text, in .jsonl files"),
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", min=0, help="How many to show at most.")] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="The least relevance to show.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object per document.")] = False,
    model: Model = DEFAULT,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    local_files_only: LocalFilesOnly = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a whole prompt; longer documents are cut.", show_default="the model's context"),
    ] = None,
    max_passage_tokens: Annotated[
        int | None, typer.Option(min=1, help="Read longer documents as passages of this size; the best one counts.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Put into the query, for zerank-2.")] = None,
    control_tokens: Annotated[
        Literal["text", "parse"],
        typer.Option(help="Read <|im_end|> and the like in texts as characters, or match them as the published files do."),
    ] = "text",
) -> None:
    """Sort documents by relevance to a query.

    Each line of a file that is not empty is a document, as for grep; with --whole each file is. A file named .jsonl holds
    one JSON object per line.
    """
    if not query.strip():
        raise typer.BadParameter("it is empty; expected what is looked for", param_hint="--query")
    if whole and field is not None:
        raise typer.BadParameter("it does not go with --field, which reads one document per line", param_hint="--whole")
    if as_json and as_jsonl:
        raise typer.BadParameter("it does not go with --jsonl", param_hint="--json")
    if not files and sys.stdin.isatty():
        raise typer.BadParameter("there is none, and nothing is piped in", param_hint="FILE")
    documents = [document for file in files or ["-"] for document in _read(file, field, whole=whole)]
    if not documents:
        msg = f"there is no document in {', '.join(files or ['standard input'])}; expected one per line that is not empty"
        raise Mistake(msg)
    _notice(model)

    from zerank_integrations.reranker import Reranker

    try:
        reranker = Reranker(
            model,
            revision=revision,
            base=base,
            device=device,
            dtype=dtype,
            local_files_only=local_files_only,
            max_length=max_length,
            max_passage_tokens=max_passage_tokens,
            instruction=instruction,
            control_tokens=control_tokens,
        )
        with reranker:
            watched = sys.stderr.isatty() and len(documents) > MUCH
            if watched:
                # Loading draws bars of its own, which are through before ours begins.
                reranker.engine()
            ranked = reranker.rank(query, [d.text for d in documents], top_k, threshold, progress=watched)
    except ValueError as error:
        # A wrong argument; what is wrong with texts and checkpoints has its own errors.
        raise Mistake(str(error)) from error

    records = (_record(place, one, documents[one.index]) for place, one in enumerate(ranked, start=1))
    if as_json:
        print(_json({"query": query, "model": model, "documents": len(documents), "results": list(records)}, indent=1))
    elif as_jsonl:
        for record in records:
            print(_json(record))
    else:
        for line in _table(ranked, documents):
            print(line)
        if not ranked and threshold is not None and top_k != 0:
            shell.say(f"none of {len(documents)} documents has relevance {threshold:g} or more")


@shell.command
def check(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL|FOLDER", help="Hub id, folder, or zelo-mini.")] = DEFAULT,
    published_as: Annotated[
        Literal["zerank-1-small", "zerank-1", "zerank-2"] | None,
        typer.Option("--as", help="The published checkpoint the folder is a copy of: scores its golden rows."),
    ] = None,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="Transformers' name of an attention.")] = None,
    local_files_only: LocalFilesOnly = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find out whether a checkpoint is scored right.

    It is loaded, its prompt, tokenizer and head are examined, and pairs with known answers are scored. Exit status 1 if any
    check fails.
    """
    _notice(model)

    from zerank_integrations.check import Check, checks

    found: list[Check] = []
    for one in checks(
        model,
        published_as=published_as,
        revision=revision,
        base=base,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=local_files_only,
    ):
        found.append(one)
        if not as_json:
            mark = "skip" if one.skipped else "ok" if one.ok else "FAIL"
            print(f"{mark:4}  {one.name:15}  {one.figure}", flush=True)
            for line in one.remedy.splitlines():
                print(f"{'':23}{line}", flush=True)
    failed = sum(not one.ok for one in found)
    skipped = sum(one.skipped for one in found)
    if as_json:
        fields = ("name", "ok", "skipped", "figure", "remedy")
        listed = [{name: getattr(one, name) for name in fields} for one in found]
        print(_json({"model": model, "ok": not failed, "checks": listed}, indent=1))
    else:
        print(f"{len(found)} checks: {len(found) - failed - skipped} ok, {failed} failed, {skipped} skipped")
    if failed:
        raise typer.Exit(FAILURE)


@shell.command
def bench(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL|FOLDER", help="Hub id, folder, or zelo-mini.")] = DEFAULT,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE...", help="Documents, read as by rank; - is standard input.", show_default="the embedded collection"
        ),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", help="What is looked for; may be repeated.", show_default="the embedded collection's"),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="Read every input as JSON Lines and take this field.", show_default="text, in .jsonl files"),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", "-n", min=1, help="Documents of one request.")] = 100,
    runs: Annotated[int, typer.Option(min=1, help="Requests at most.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no request after this time; one is made at least.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    local_files_only: LocalFilesOnly = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a whole prompt; longer documents are cut.", show_default="the model's context"),
    ] = None,
) -> None:
    """Measure how quickly a model ranks documents on this machine.

    Each request ranks a number of documents, taken in turn. The time is a user's: from texts to the ranking.
    """
    if any(not text.strip() for text in query or []):
        raise typer.BadParameter("it is empty; expected what is looked for", param_hint="--query")
    if field is not None and not files:
        raise typer.BadParameter("it names no field of the embedded collection; expected a FILE", param_hint="--field")
    texts = [document.text for file in files or [] for document in _read(file, field, whole=False)]
    if files and not texts:
        msg = f"there is no document in {', '.join(files)}; expected one per line that is not empty"
        raise Mistake(msg)
    _notice(model)

    from zerank_integrations.bench import bench as measure
    from zerank_integrations.embedded.collection import load
    from zerank_integrations.reranker import Reranker

    collection = load() if not files or not query else None
    if collection is not None:
        texts = texts or [document.text for document in collection.documents.values()]
        query = query or [one.text for one in collection.queries.values()]
    try:
        reranker = Reranker(
            model,
            revision=revision,
            base=base,
            device=device,
            dtype=dtype,
            local_files_only=local_files_only,
            max_length=max_length,
        )
        with reranker, _steps_watched(1 + runs) as advance:
            found = measure(reranker, query or [], texts, count=documents, runs=runs, seconds=seconds, advance=advance)
    except ValueError as error:
        raise Mistake(str(error)) from error

    if as_json:
        print(_json({"model": model, "documents_per_run": documents} | found.record(), indent=1))
        return
    print(f"device      {found.device}, {found.dtype}, loaded in {found.loading:.1f} s")
    print(f"requests    {len(found.seconds)} of {documents} documents, {sum(found.tokens)} prompt tokens in all")
    print(f"documents   {found.documents_per_second:.1f} per second")
    print(f"tokens      {found.tokens_per_second:.0f} per second")
    print(f"latency     p50 {found.percentile(50) * 1000:.0f} ms, p95 {found.percentile(95) * 1000:.0f} ms per request")
    if found.peak_bytes is not None and found.model_bytes is not None:
        above = max(0, found.peak_bytes - found.model_bytes) / MIB
        print(f"memory      peak {found.peak_bytes / MIB:.0f} MiB, {above:.0f} MiB above the loaded model")


@contextmanager
def _steps_watched(steps: int) -> Iterator[Callable[[], object]]:
    """A bar where someone watches. Yields what is called when it begins and after each step."""
    bar: tqdm | None = None

    def advance() -> None:
        nonlocal bar
        if bar is not None:
            bar.update()
        elif sys.stderr.isatty():
            from tqdm import tqdm

            # Not before: loading draws bars of its own.
            bar = tqdm(total=steps, desc="measuring", unit="request")

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


# Documents


@dataclass(frozen=True, slots=True)
class Document:
    """A document and where it was found."""

    text: str
    file: str
    line: int | None = None
    id: object = None

    @property
    def place(self) -> str:
        """Its id, else file and line."""
        if self.id is not None:
            return str(self.id)
        return self.file if self.line is None else f"{self.file}:{self.line}"


def _read(file: str, field: str | None, *, whole: bool) -> Iterator[Document]:
    """The documents of one file: its lines, its records, or itself. Blank ones are none."""
    text = _text(file)
    if whole:
        if text.strip():
            yield Document(text, file)
        return
    # By line feeds alone: JSON may hold other separators, and grep and editors count lines so.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if field is not None or file.endswith(JSON_LINES) or (file == "-" and lines and _is_record(lines[0][1])):
        for number, line in lines:
            yield _from_json(line, file, number, field or "text")
    else:
        for number, line in lines:
            yield Document(line, file, number)


def _text(file: str) -> str:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except IsADirectoryError:
        msg = f"{file} is a folder; expected files: {Path(file) / '*'}"
        raise Mistake(msg) from None
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror}"
        raise Mistake(msg) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        msg = f"{file}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; expected UTF-8. Convert it: iconv -t utf-8"
        raise Mistake(msg) from None


def _is_record(line: str) -> bool:
    """Whether a pipe, which has no name to end in .jsonl, begins with a record: nobody wants the braces ranked as text."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("text"), str)


def _from_json(line: str, file: str, number: int, field: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        msg = f"{file}:{number}: no JSON ({error}); expected one object per line"
        raise Mistake(msg) from None
    if not isinstance(record, dict):
        msg = f"{file}:{number}: {type(record).__name__}; expected an object with the document in {field!r}"
        raise Mistake(msg)
    if not isinstance(record.get(field), str):
        there = f"{field!r} is {type(record[field]).__name__}" if field in record else f"only {sorted(record)}"
        msg = f"{file}:{number}: {there}; expected a text in {field!r}. Name another with --field"
        raise Mistake(msg)
    return Document(record[field], file, number, record.get("id", record.get("_id")))


# Output


def _record(place: int, ranked: RankedDocument, document: Document) -> dict[str, object]:
    return {
        "rank": place,
        "relevance": ranked.relevance,
        "logit": ranked.logit,
        "id": document.id,
        "file": document.file,
        "line": document.line,
        "index": ranked.index,
        "tokens": ranked.tokens,
        "truncated": ranked.truncated,
        "span": ranked.span,
        "text": ranked.text,
    }


def _json(value: object, indent: int | None = None) -> str:
    readable = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not readable, indent=indent)


def _table(ranked: Ranked, documents: list[Document]) -> Iterator[str]:
    """Relevance, place, and as many first words as the terminal is wide."""
    places = [_printable(documents[one.index].place) for one in ranked]
    wide = max(map(_cells, places), default=0)
    room = max(20, shutil.get_terminal_size((100, 24)).columns - wide - len("0.000    "))
    for place, one in zip(places, ranked, strict=True):
        mark = " [cut]" if one.truncated else ""
        words = _shortened(_printable(one.passage), room - len(mark))
        yield f"{one.relevance:.3f}  {place}{' ' * (wide - _cells(place))}  {words}{mark}".rstrip()


def _printable(text: str) -> str:
    """On one line, and nothing a terminal would obey: a document must not be able to move the cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def _cells(text: str) -> int:
    """Columns of a terminal: East Asian letters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _shortened(text: str, room: int) -> str:
    text = text[: room + 1]
    if _cells(text) <= room:
        return text
    while _cells(text) > room - 1:
        text = text[:-1]
    return text + "…"


def _notice(model: str) -> None:
    checkpoint = known(model)
    if checkpoint is not None and checkpoint.notice is not None:
        shell.say(checkpoint.notice)
