"""The workspace: one folder with its answers in SQLite, its lock, and a note of what each stage was made from.

    zelo.yaml          the settings
    answers.db         judges, answers, plans, money (SQLite, write-ahead log)
    raw.db             whole replies of judges, compressed; only if asked for, may be deleted
    lock.db            who writes at present
    collect/ rate/ …   what each stage hands on, and stage.json: what it was made from

An answer is found by its key: a hash of the judge, its parameters, its prompt and the *texts* in the order shown. So the same
question is never bought twice, the swapped question is another question, an edited document is asked about anew, and another
judge leaves all stored answers as they are.

Every answer is committed by itself. With `synchronous=NORMAL` a killed process loses nothing that was committed; a power cut
may lose the last answers, never the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from zelo_train.errors import MissingPackage, WorkspaceError
from zelo_train.records import Form, Judgment, Kind, Question, Status

SETTINGS, ANSWERS, RAW, LOCK, STAGE = "zelo.yaml", "answers.db", "raw.db", "lock.db", "stage.json"

# "zelo" in ASCII: tells our files from other SQLite files.
APPLICATION_ID = 0x7A656C6F

# Applied in order, each in one transaction with `user_version` = how many have been. Never edit one; append.
STEPS = (
    """
    CREATE TABLE judge (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        model TEXT NOT NULL,
        parameters TEXT NOT NULL,
        prompt_version TEXT NOT NULL,
        prompt_hash TEXT NOT NULL,
        UNIQUE (name, model, parameters, prompt_version, prompt_hash)
    ) STRICT;
    CREATE TABLE text (
        id INTEGER PRIMARY KEY,
        hash BLOB NOT NULL UNIQUE
    ) STRICT;
    CREATE TABLE answer (
        key BLOB NOT NULL UNIQUE,
        judge INTEGER NOT NULL REFERENCES judge (id),
        kind TEXT NOT NULL CHECK (kind IN ('compare', 'grade', 'cross')),
        query TEXT NOT NULL,
        documents TEXT NOT NULL,
        result TEXT,
        status TEXT NOT NULL CHECK (status IN ('ok', 'refused', 'unparsable', 'gave up', 'too long')),
        tries INTEGER NOT NULL,
        tokens_in INTEGER NOT NULL,
        tokens_cached INTEGER NOT NULL,
        tokens_out INTEGER NOT NULL,
        cost INTEGER NOT NULL,
        run TEXT NOT NULL,
        time REAL NOT NULL,
        CHECK ((result IS NULL) = (status <> 'ok'))
    ) STRICT;
    CREATE TABLE plan (
        query TEXT NOT NULL,
        round INTEGER NOT NULL,
        pairs TEXT NOT NULL,
        PRIMARY KEY (query, round)
    ) STRICT;
    CREATE TABLE spend (
        run TEXT NOT NULL,
        judge TEXT NOT NULL,
        reserved INTEGER NOT NULL,
        settled INTEGER NOT NULL,
        PRIMARY KEY (run, judge)
    ) STRICT;
    """,
    """
    CREATE TABLE batch (
        client TEXT NOT NULL PRIMARY KEY,
        provider TEXT,
        state TEXT NOT NULL,
        keys BLOB NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE batch ADD COLUMN judge TEXT NOT NULL DEFAULT '';
    ALTER TABLE batch ADD COLUMN worst INTEGER NOT NULL DEFAULT 0;
    """,
)

KEY_BYTES = 16

# SQLite's limit on the variables of one statement was 999 for long.
AT_ONCE = 900


def digest(*parts: str | bytes) -> bytes:
    """16 bytes that stand for these parts in this order; each part's length is hashed too, so that borders count."""
    hashed = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.digest()


def canonical(value: object) -> str:
    """A JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


@dataclass(frozen=True)
class JudgeIdentity:
    """What makes a judge's answers its own: change any part and every question to it is a new one.

    Attributes:
        name: as in zelo.yaml.
        model: what the endpoint or library calls it.
        parameters: basic types that can change its answers (temperature, kind of answer; `simulated: true` where it applies).
        prompt_version: of the prompt file.
        prompt_hash: of the prompt as filled with the criterion.
    """

    name: str
    model: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt_version: str = ""
    prompt_hash: str = ""

    @cached_property
    def row(self) -> tuple[str, str, str, str, str]:
        """As the `judge` table holds it."""
        return self.name, self.model, canonical(dict(self.parameters)), self.prompt_version, self.prompt_hash

    @cached_property
    def hash(self) -> bytes:
        """16 bytes."""
        return digest(*self.row)

    @property
    def simulated(self) -> bool:
        """Whether its answers are drawn from qrels; part of its parameters, so that it stays with every answer."""
        return bool(self.parameters.get("simulated", False))


class Texts:
    """The texts behind a collection's ids, as hashes; each text is hashed once."""

    def __init__(self, query_text: Callable[[str], str], document_text: Callable[[str], str]) -> None:
        self._query_text, self._document_text = query_text, document_text
        self._queries: dict[str, bytes] = {}
        self._documents: dict[str, bytes] = {}

    def query(self, id: str) -> bytes:
        """The hash of a query's text. KeyError for an id that the collection lacks."""
        if id not in self._queries:
            self._queries[id] = digest(self._query_text(id))
        return self._queries[id]

    def document(self, id: str) -> bytes:
        """The hash of a document's text. KeyError for an id that the collection lacks."""
        if id not in self._documents:
            self._documents[id] = digest(self._document_text(id))
        return self._documents[id]

    def key(self, judge: JudgeIdentity, question: Question) -> bytes:
        """The key of a judge's answer to a question: 16 bytes."""
        queries = b"".join(map(self.query, question.queries))
        documents = b"".join(map(self.document, question.documents))
        return hashlib.blake2b(
            b"".join((judge.hash, question.kind[:2].encode(), queries, b"|", documents)), digest_size=KEY_BYTES
        ).digest()


@dataclass(frozen=True, slots=True)
class Spend:
    """Money of one run and one judge, in millionths: `settled` was charged; `reserved` is under way, or was when it died."""

    run: str
    judge: str
    reserved: int
    settled: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of questions for a provider.

    Attributes:
        client: our name for it.
        provider: theirs; None until they have taken it.
        state: what has become of it; the batch module's word.
        keys: of the answers it will bring.
        judge: who is asked.
        worst: millionths it can cost at most, reserved as long as it is open.
    """

    client: str
    provider: str | None
    state: str
    keys: tuple[bytes, ...]
    judge: str = ""
    worst: int = 0


class Store:
    """The answers of a workspace. Safe to use from several threads; one process at a time may write (see `Workspace.lock`).

    Args:
        path: the file; made if `write` and absent.
        write: whether anything may be changed.
        raw: a second file for judges' whole replies, or None to keep none.

    Raises:
        WorkspaceError: the file is absent, not ours, damaged, or written by a newer version.
    """

    def __init__(self, path: Path, *, write: bool = False, raw: Path | None = None) -> None:
        if not write and not path.is_file():
            raise WorkspaceError(f"{path} does not exist; expected a workspace's answers. Run `zelo judge` first.")
        self._path = path
        self._lock = threading.RLock()
        self._judges: dict[bytes, int] = {}
        self._texts: dict[bytes, int] = {}
        # Transactions are ours alone: sqlite3 would open one before a statement of its own choice.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            self._prepare(write=write)
            self._raw = _open_raw(raw) if raw is not None and write else None
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise WorkspaceError(
                f"{path} cannot be read ({error}); expected the answers of a workspace. Move it away to begin anew, or put"
                " back a copy of it with its -wal file."
            ) from error
        except WorkspaceError:
            self._connection.close()
            raise

    def _prepare(self, *, write: bool) -> None:
        """Recognise the file, and bring it to this version's schema."""
        run = self._connection.execute
        (version,) = run("PRAGMA user_version").fetchone()
        (owner,) = run("PRAGMA application_id").fetchone()
        empty = not run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if owner != APPLICATION_ID and not (empty and version == 0):
            raise WorkspaceError(f"{self._path} is another program's SQLite file; expected a workspace's. Use another folder.")
        if version > len(STEPS):
            raise WorkspaceError(
                f"{self._path} has schema {version}; this version of zelo_train knows up to {len(STEPS)}."
                " Update it: pip install --upgrade zerank-integrations"
            )
        if write:
            run("PRAGMA journal_mode=WAL")
            run("PRAGMA synchronous=NORMAL")
            for number, step in enumerate(STEPS[version:], start=version + 1):
                self._connection.executescript(
                    f"BEGIN IMMEDIATE; {step} PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={number}; COMMIT;"
                )
        elif version < len(STEPS):
            raise WorkspaceError(
                f"{self._path} has the older schema {version}, expected {len(STEPS)}. Any command that writes brings it up to"
                " date: `zelo judge`."
            )
        else:
            run("PRAGMA query_only=ON")

    def close(self) -> None:
        """Close the files. Nothing is pending: every answer was committed as it came."""
        with self._lock:
            self._connection.close()
            if self._raw is not None:
                self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """All or nothing of what is run inside, on disk when it ends."""
        with self._lock:
            run = self._connection.execute
            run("BEGIN IMMEDIATE")
            try:
                yield run
            except BaseException:
                run("ROLLBACK")
                # What they remember may have been part of what is undone.
                self._judges.clear()
                self._texts.clear()
                raise
            run("COMMIT")

    def _select(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    # Answers

    def put(
        self,
        judge: JudgeIdentity,
        judgment: Judgment,
        texts: Texts,
        *,
        run: str = "",
        raw: bytes | None = None,
    ) -> None:
        """Keep a judgment, in one commit.

        An answer is never overwritten. A failure gives way to whatever a later try brings, and its tokens, tries and cost are
        added to that.

        Args:
            judge: who answered.
            judgment: what came back.
            texts: the collection's texts.
            run: the run that asked.
            raw: the whole reply, kept if the store was opened with a file for it.

        Raises:
            ValueError: the judgment and the judge disagree on whether this is simulated.
        """
        if judgment.simulated != judge.simulated:
            raise ValueError(
                f"judge {judge.name!r} is {'' if judge.simulated else 'not '}simulated, its judgment says otherwise;"
                " expected the same, for the mark must stay with every answer: put `simulated` into the judge's parameters."
            )
        question = judgment.question
        key = texts.key(judge, question)
        if raw is not None and self._raw is not None:
            # First: a reply without its answer is harmless.
            with self._lock:
                self._raw.execute("INSERT OR REPLACE INTO raw VALUES (?, ?)", (key, zlib.compress(raw)))
        with self._transaction() as execute:
            queries = ",".join(str(self._text_id(texts.query(id))) for id in question.queries)
            documents = ",".join(str(self._text_id(texts.document(id))) for id in question.documents)
            execute(
                """
                INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (key) DO UPDATE SET
                    result = excluded.result, status = excluded.status, run = excluded.run, time = excluded.time,
                    tries = tries + excluded.tries, tokens_in = tokens_in + excluded.tokens_in,
                    tokens_cached = tokens_cached + excluded.tokens_cached, tokens_out = tokens_out + excluded.tokens_out,
                    cost = cost + excluded.cost
                WHERE status <> 'ok'
                """,
                (
                    key,
                    self._judge_id(judge),
                    question.kind.value,
                    queries,
                    documents,
                    _result(judgment),
                    judgment.status.value,
                    judgment.tries,
                    judgment.tokens_in,
                    judgment.tokens_cached,
                    judgment.tokens_out,
                    judgment.cost,
                    run,
                    time.time(),
                ),
            )

    def find(self, judge: JudgeIdentity, questions: Iterable[Question], texts: Texts) -> dict[Question, Judgment]:
        """What is known of these questions to this judge, failures included; questions never asked are absent."""
        keys = {question: texts.key(judge, question) for question in questions}
        wanted = list(set(keys.values()))
        rows = {}
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            marks = ",".join("?" * len(some))
            for row in self._select(
                "SELECT key, status, result, tries, tokens_in, tokens_cached, tokens_out, cost"
                f" FROM answer WHERE key IN ({marks})",
                some,
            ):
                rows[row[0]] = row[1:]
        return {
            question: _judgment(judge.name, question, rows[key], simulated=judge.simulated)
            for question, key in keys.items()
            if key in rows
        }

    def raw(self, key: bytes) -> bytes | None:
        """A judge's whole reply, if it was kept."""
        if self._raw is None:
            return None
        with self._lock:
            row = self._raw.execute("SELECT body FROM raw WHERE key = ?", (key,)).fetchone()
        return zlib.decompress(row[0]) if row else None

    def counts(self) -> dict[tuple[str, Kind, Status], int]:
        """How many answers there are, by judge, kind and status."""
        rows = self._select(
            "SELECT judge.name, kind, status, count(*) FROM answer JOIN judge ON judge.id = judge"
            " GROUP BY judge.name, kind, status ORDER BY judge.name, kind, status"
        )
        return {(name, Kind(kind), Status(status)): count for name, kind, status, count in rows}

    def judges(self) -> list[JudgeIdentity]:
        """Every judge that was ever asked, under every prompt and parameters it had."""
        rows = self._select("SELECT name, model, parameters, prompt_version, prompt_hash FROM judge ORDER BY id")
        return [JudgeIdentity(name, model, json.loads(parameters), *prompt) for name, model, parameters, *prompt in rows]

    # Plans

    def plan(self, query: str, round: int, inputs: str) -> tuple[Question, ...] | None:
        """The questions of a query's round as first planned, or None if none were, or were from other inputs.

        Args:
            query: its id.
            round: from 1; the pipeline gives the grades a round of their own.
            inputs: a fingerprint of what the plan depends on (candidates, seed, design).
        """
        rows = self._select("SELECT pairs FROM plan WHERE query = ? AND round = ?", (query, round))
        if not rows:
            return None
        stored = json.loads(rows[0][0])
        if stored["inputs"] != inputs:
            return None
        return tuple(Question(Kind(kind), tuple(queries), tuple(documents)) for kind, queries, documents in stored["questions"])

    def put_plans(self, round: int, plans: Mapping[str, Sequence[Question]], inputs: Mapping[str, str]) -> None:
        """Keep the plans of a round, by query, in one commit, before its first question is asked."""
        with self._transaction() as execute:
            for query, questions in plans.items():
                listed = [(q.kind.value, q.queries, q.documents) for q in questions]
                pairs = canonical({"inputs": inputs[query], "questions": listed})
                execute("INSERT OR REPLACE INTO plan VALUES (?, ?, ?)", (query, round, pairs))

    # Money: the ledger of `cost.Budget`

    def spent(self) -> list[Spend]:
        """Money by run and judge, in the order of runs."""
        return [Spend(*row) for row in self._select("SELECT run, judge, reserved, settled FROM spend ORDER BY rowid")]

    def outlay(self) -> int:
        """All that was ever reserved or settled, in millionths. What a dead run had reserved stays counted."""
        return int(self._select("SELECT coalesce(sum(reserved) + sum(settled), 0) FROM spend")[0][0])

    def move(self, run: str, judge: str, reserved: int, settled: int) -> None:
        """Add to what a run has reserved and settled with a judge (millionths; negative sets free), in one commit."""
        with self._transaction() as execute:
            execute(
                """
                INSERT INTO spend VALUES (?, ?, ?, ?)
                ON CONFLICT (run, judge)
                DO UPDATE SET reserved = reserved + excluded.reserved, settled = settled + excluded.settled
                """,
                (run, judge, reserved, settled),
            )

    # Batches

    def put_batch(self, batch: Batch) -> None:
        """Write a batch, or what has become of it."""
        with self._transaction() as execute:
            row = (batch.client, batch.provider, batch.state, b"".join(batch.keys), batch.judge, batch.worst)
            # Not REPLACE, which would move it to the end.
            execute(
                "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (client) DO UPDATE"
                " SET provider = excluded.provider, state = excluded.state, worst = excluded.worst",
                row,
            )

    def batches(self) -> list[Batch]:
        """Every batch, in the order first written."""
        return [
            Batch(client, provider, state, tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)), *rest)
            for client, provider, state, keys, *rest in self._select("SELECT * FROM batch ORDER BY rowid")
        ]

    # Small ids

    def _judge_id(self, judge: JudgeIdentity) -> int:
        if judge.hash not in self._judges:
            run = self._connection.execute
            run("INSERT OR IGNORE INTO judge VALUES (NULL, ?, ?, ?, ?, ?)", judge.row)
            where = "name = ? AND model = ? AND parameters = ? AND prompt_version = ? AND prompt_hash = ?"
            (self._judges[judge.hash],) = run(f"SELECT id FROM judge WHERE {where}", judge.row).fetchone()
        return self._judges[judge.hash]

    def _text_id(self, hash: bytes) -> int:
        if hash not in self._texts:
            run = self._connection.execute
            run("INSERT OR IGNORE INTO text VALUES (NULL, ?)", (hash,))
            (self._texts[hash],) = run("SELECT id FROM text WHERE hash = ?", (hash,)).fetchone()
        return self._texts[hash]

    # Export

    def export(self, path: Path, names: Mapping[bytes, str] | None = None) -> int:
        """Write all answers to a Parquet file, one row each.

        Args:
            path: the file; replaced.
            names: ids by text hash (`Texts.query`, `Texts.document`); a text without one gets its hash in hexadecimal.

        Returns:
            The number of rows.

        Raises:
            MissingPackage: pyarrow is not installed.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingPackage("pyarrow is not installed; it writes Parquet files: pip install pyarrow") from error
        names = names or {}
        known = {id: names.get(hash, hash.hex()) for id, hash in self._select("SELECT id, hash FROM text")}
        judges = {id: JudgeIdentity(name, model, json.loads(parameters), *prompt) for id, name, model, parameters, *prompt in
                  self._select("SELECT id, name, model, parameters, prompt_version, prompt_hash FROM judge")}  # fmt: skip
        columns: dict[str, Any] = {
            **dict.fromkeys(("judge", "model", "prompt_version", "kind", "status", "form", "run"), pa.string()),
            **dict.fromkeys(("queries", "documents"), pa.list_(pa.string())),
            **{"value": pa.float64(), "order": pa.list_(pa.int32()), "simulated": pa.bool_(), "time": pa.float64()},
            **dict.fromkeys(("tries", "tokens_in", "tokens_cached", "tokens_out", "cost"), pa.int64()),
        }
        schema = pa.schema(list(columns.items()))
        count = 0
        with self._lock, pq.ParquetWriter(path, schema) as writer:
            rows = self._connection.execute(
                "SELECT judge, kind, query, documents, result, status, tries, tokens_in, tokens_cached, tokens_out, cost, run,"
                " time FROM answer ORDER BY rowid"
            )
            while some := rows.fetchmany(50_000):
                table = []
                for judge, kind, query, documents, result, status, tries, inward, cached, outward, cost, run, when in some:
                    form, value, order = json.loads(result) if result else (None, None, ())
                    table.append(
                        {
                            "judge": judges[judge].name,
                            "model": judges[judge].model,
                            "prompt_version": judges[judge].prompt_version,
                            "kind": kind,
                            "queries": [known[int(id)] for id in query.split(",")],
                            "documents": [known[int(id)] for id in documents.split(",")],
                            "form": form,
                            "value": value,
                            "order": list(order),
                            "status": status,
                            "tries": tries,
                            "tokens_in": inward,
                            "tokens_cached": cached,
                            "tokens_out": outward,
                            "cost": cost,
                            "run": run,
                            "time": when,
                            "simulated": judges[judge].simulated,
                        }
                    )
                writer.write_table(pa.Table.from_pylist(table, schema=schema))
                count += len(some)
        return count


def _open_raw(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS raw (key BLOB NOT NULL PRIMARY KEY, body BLOB NOT NULL) STRICT")
    return connection


def _result(judgment: Judgment) -> str | None:
    """Form, value and order as JSON; None for a failure, which has no result whatever else it carries."""
    if not judgment.answered:
        return None
    return canonical((judgment.form, judgment.value, judgment.order))


def _judgment(judge: str, question: Question, row: Sequence[Any], *, simulated: bool) -> Judgment:
    status, result, tries, tokens_in, tokens_cached, tokens_out, cost = row
    form, value, order = json.loads(result) if result else (None, None, ())
    return Judgment(
        judge=judge,
        question=question,
        status=Status(status),
        form=Form(form) if form else None,
        value=value,
        order=tuple(order),
        tokens_in=tokens_in,
        tokens_cached=tokens_cached,
        tokens_out=tokens_out,
        cost=cost,
        tries=tries,
        simulated=simulated,
    )


# The folder


@dataclass(frozen=True, slots=True)
class Holder:
    """Who writes into a workspace."""

    pid: int
    host: str
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


@dataclass(frozen=True, slots=True)
class Stage:
    """What a finished stage was made from, and what it gave.

    Attributes:
        inputs: fingerprints and settings by name; the stage is stale when any of them differs now.
        figures: counts and the like, to be shown.
        finished: when, in UTC.
        simulated: whether any judge behind it was simulated.
    """

    inputs: Mapping[str, Any]
    figures: Mapping[str, Any]
    finished: str
    simulated: bool = False

    @property
    def fingerprint(self) -> str:
        """What a later stage names as its input."""
        return digest(canonical(self.inputs)).hex()

    def differences(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of inputs that are not what they were, with both values where they can be read."""
        return tuple(_differences(self.inputs, inputs))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*before, *now}):
        one, other = before.get(name), now.get(name)
        full = prefix + name
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{full}.")
        elif canonical(one) != canonical(other):
            hashes = any(isinstance(value, str) and len(value) == 2 * KEY_BYTES for value in (one, other))
            yield f"{full} changed" if hashes else f"{full} was {canonical(one)}, is {canonical(other)}"


class Workspace:
    """A folder with a zelo.yaml in it.

    Raises:
        WorkspaceError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not self.settings.is_file():
            raise WorkspaceError(f"{folder} holds no {SETTINGS}; expected a workspace. Make one: zelo init {folder}")

    @property
    def settings(self) -> Path:
        """Its zelo.yaml."""
        return self.folder / SETTINGS

    def stage_folder(self, stage: str) -> Path:
        """Where a stage's output lies."""
        return self.folder / stage

    def store(self, *, write: bool = False, raw: bool = False) -> Store:
        """Its answers. Writing needs the lock."""
        return Store(self.folder / ANSWERS, write=write, raw=self.folder / RAW if raw else None)

    @property
    def has_answers(self) -> bool:
        """Whether anything was ever asked here."""
        return (self.folder / ANSWERS).is_file()

    @contextmanager
    def lock(self, command: str = "") -> Iterator[Holder]:
        """Be the only one who writes here, for as long as the block lasts.

        The lock is the operating system's on `lock.db`, held by SQLite: it goes with its process, however that ends, and works
        across containers, where a process number says nothing. (As with SQLite's write-ahead log, the folder must not lie on a
        network file system.)

        Raises:
            WorkspaceError: another process writes; the message says which.
        """
        me = Holder(
            pid=os.getpid(),
            host=platform.node(),
            since=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
            command=command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )
        # A short wait: another process that only looks who holds it is through in milliseconds.
        connection = sqlite3.connect(self.folder / LOCK, isolation_level=None, timeout=0.25)
        try:
            try:
                connection.execute("CREATE TABLE IF NOT EXISTS holder (pid, host, since, command)")
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("DELETE FROM holder")
                connection.execute("INSERT INTO holder VALUES (?, ?, ?, ?)", (me.pid, me.host, me.since, me.command))
                connection.execute("COMMIT")
                # Others read the row above while this transaction, which never writes, keeps them from another.
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise WorkspaceError(
                    f"{self.folder} is being written by {self.holder() or f'another process ({error})'}."
                    " Expected no other writer: wait for it, or stop it; nothing it has answered is lost."
                ) from error
            yield me
        finally:
            # Closing ends the transaction and with it the lock.
            connection.close()

    def holder(self) -> Holder | None:
        """Who holds the lock or held it last; None if nobody ever did."""
        path = self.folder / LOCK
        if not path.is_file():
            return None
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=0.25)
        with suppress(sqlite3.OperationalError):
            row = connection.execute("SELECT pid, host, since, command FROM holder").fetchone()
            connection.close()
            return Holder(*row) if row else None
        connection.close()
        return None

    @property
    def locked(self) -> bool:
        """Whether somebody writes here at this moment."""
        path = self.folder / LOCK
        if not path.is_file():
            return False
        connection = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        finally:
            connection.close()
        return False

    # What stages were made from

    def stage(self, stage: str) -> Stage | None:
        """What a stage was made from, or None if it never finished.

        Raises:
            WorkspaceError: its note cannot be read.
        """
        path = self.stage_folder(stage) / STAGE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Stage(**content)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise WorkspaceError(
                f"{path} cannot be read ({error}); expected what `zelo {stage}` wrote. Run it again: zelo {stage} --again"
            ) from error

    def begin(self, stage: str) -> Path:
        """Take back a stage's note, for its output is about to change. Returns its folder, which exists."""
        folder = self.stage_folder(stage)
        folder.mkdir(exist_ok=True)
        (folder / STAGE).unlink(missing_ok=True)
        return folder

    def finish(self, stage: str, inputs: Mapping[str, Any], figures: Mapping[str, Any], *, simulated: bool = False) -> Stage:
        """Note what a stage was made from, all at once, after its output is complete."""
        finished = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        note = Stage(dict(inputs), dict(figures), finished, simulated)
        fields = {"inputs": note.inputs, "figures": note.figures, "finished": note.finished, "simulated": simulated}
        write_whole(self.stage_folder(stage) / STAGE, json.dumps(fields, indent=1, default=str) + "\n")
        return note


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8", newline="\n")
    beside.replace(path)


def fingerprint(path: Path) -> str:
    """16 bytes in hexadecimal that stand for a file's content, or for a folder's files and their contents.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return digest(*(part for file in files for part in (str(file.relative_to(path)), fingerprint(file)))).hex()
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).hexdigest()
