"""The workspace: answers by key, plans, locks, notes, and what survives a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from zelo_train.errors import WorkspaceError
from zelo_train.records import Comparison, Form, Judgment, Kind, Question, Status
from zelo_train.store import STEPS, Batch, JudgeIdentity, Store, Texts, Workspace, fingerprint

ROOT = Path(__file__).parents[2]

JUDGE = JudgeIdentity("a", "model-1", {"temperature": 0}, "1", "abc")
PAIR = Comparison("q1", "d1", "d2").question


def texts(**edited: str) -> Texts:
    return Texts(lambda id: edited.get(id, f"query {id}"), lambda id: edited.get(id, f"document {id}"))


def answered(question: Question = PAIR, value: float = 0.7, **more: object) -> Judgment:
    return replace(Judgment("a", question, Status.OK, Form.SOFT, value, tokens_in=90, tokens_out=1, cost=5), **more)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "answers.db", write=True, raw=tmp_path / "raw.db")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "zelo.yaml").write_text("")
    return Workspace(tmp_path)


# Keys


def test_every_part_of_a_question_is_in_its_key() -> None:
    key = texts().key(JUDGE, PAIR)
    others = [
        texts().key(replace(JUDGE, name="b"), PAIR),
        texts().key(replace(JUDGE, model="model-2"), PAIR),
        texts().key(replace(JUDGE, parameters={"temperature": 1}), PAIR),
        texts().key(replace(JUDGE, prompt_version="2"), PAIR),
        texts().key(replace(JUDGE, prompt_hash="abd"), PAIR),
        texts().key(JUDGE, Comparison("q1", "d2", "d1").question),
        texts().key(JUDGE, Comparison("q2", "d1", "d2").question),
        texts().key(JUDGE, Question(Kind.GRADE, ("q1",), ("d1",))),
        texts().key(JUDGE, Question(Kind.CROSS, ("q1", "q1"), ("d1", "d2"))),
        texts(d1="edited").key(JUDGE, PAIR),
        texts(q1="edited").key(JUDGE, PAIR),
    ]
    assert len({key, *others}) == 1 + len(others)
    # Not the ids but the texts count, and not the order in which parameters are written.
    assert texts(d7="document d1").key(JUDGE, Comparison("q1", "d7", "d2").question) == key
    two = replace(JUDGE, parameters={"a": 1, "b": 2})
    assert texts().key(two, PAIR) == texts().key(replace(JUDGE, parameters={"b": 2, "a": 1}), PAIR)


# Answers


def test_what_is_put_is_found(store: Store) -> None:
    grade = answered(Question(Kind.GRADE, ("q1",), ("d1",)), 6.5, form=Form.GRADE)
    listed = answered(Question(Kind.COMPARE, ("q1",), ("d1", "d2", "d3")), form=Form.ORDER, value=None, order=(2, 0, 1))
    cross = answered(Question(Kind.CROSS, ("q1", "q2"), ("d1", "d2")))
    refused = Judgment("a", PAIR.__class__(Kind.COMPARE, ("q9",), ("d1", "d2")), Status.REFUSED, tries=3)
    given = [answered(), grade, listed, cross, refused]
    for judgment in given:
        store.put(JUDGE, judgment, texts(), run="r")
    never = Comparison("q1", "d8", "d9").question
    found = store.find(JUDGE, [*(one.question for one in given), never], texts())
    assert found == {one.question: one for one in given}
    assert store.counts()["a", Kind.COMPARE, Status.REFUSED] == 1
    assert store.judges() == [JUDGE]
    assert store.find(replace(JUDGE, prompt_hash="other"), [PAIR], texts()) == {}
    assert store.find(JUDGE, [PAIR], texts(d1="edited")) == {}


def test_an_answer_is_never_overwritten_and_a_failure_is(store: Store) -> None:
    failed = Judgment("a", PAIR, Status.GAVE_UP, tries=6, tokens_in=10, cost=3)
    store.put(JUDGE, failed, texts())
    store.put(JUDGE, answered(tries=2), texts())
    store.put(JUDGE, answered(value=0.1), texts())
    store.put(JUDGE, failed, texts())
    (found,) = store.find(JUDGE, [PAIR], texts()).values()
    assert (found.status, found.value) == (Status.OK, 0.7)
    # What the failed tries cost is not forgotten.
    assert (found.tries, found.tokens_in, found.cost) == (8, 100, 8)


def test_a_failure_has_no_result(store: Store) -> None:
    store.put(JUDGE, Judgment("a", PAIR, Status.UNPARSABLE, Form.SOFT, 0.9), texts())
    (found,) = store.find(JUDGE, [PAIR], texts()).values()
    assert (found.form, found.value) == (None, None)


def test_simulated_stays_with_every_answer(store: Store) -> None:
    simulated = replace(JUDGE, parameters={"simulated": True})
    store.put(simulated, answered(simulated=True), texts())
    assert store.find(simulated, [PAIR], texts())[PAIR].simulated
    for judge, flag in ((simulated, False), (JUDGE, True)):
        with pytest.raises(ValueError, match="the mark must stay"):
            store.put(judge, answered(simulated=flag), texts())


def test_whole_replies_lie_in_a_file_of_their_own(store: Store, tmp_path: Path) -> None:
    store.put(JUDGE, answered(), texts(), raw=b"{}" * 1000)
    key = texts().key(JUDGE, PAIR)
    assert store.raw(key) == b"{}" * 1000
    assert store.raw(b"other") is None
    store.close()
    (tmp_path / "raw.db").unlink()
    with Store(tmp_path / "answers.db") as opened:
        assert PAIR in opened.find(JUDGE, [PAIR], texts())


def test_many_threads(store: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    questions = [Comparison("q1", f"d{n}", f"d{n + 1}").question for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda question: store.put(JUDGE, answered(question), texts()), questions))
    assert len(store.find(JUDGE, questions, texts())) == 200


def test_a_plan_is_found_while_its_inputs_are_the_same(store: Store) -> None:
    questions = (PAIR, Question(Kind.CROSS, ("q1", "q2"), ("d1", "d2")))
    store.put_plans(1, {"q1": questions, "q2": ()}, {"q1": "x", "q2": "x"})
    assert store.plan("q1", 1, "x") == questions
    assert store.plan("q2", 1, "x") == ()
    assert store.plan("q1", 2, "x") is None
    assert store.plan("q1", 1, "other inputs") is None


def test_batches(store: Store) -> None:
    first = Batch("client-1", None, "written", (b"k" * 16, b"l" * 16))
    store.put_batch(first)
    store.put_batch(Batch("client-2", None, "written", ()))
    store.put_batch(replace(first, provider="p-1", state="submitted"))
    assert {one.client: one for one in store.batches()}["client-1"] == replace(first, provider="p-1", state="submitted")
    assert len(store.batches()) == 2


def test_export(store: Store, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    known = texts()
    store.put(JUDGE, answered(), known, run="r")
    store.put(JUDGE, Judgment("a", Comparison("q2", "d1", "d3").question, Status.REFUSED), known)
    names = {known.query("q1"): "q1", known.document("d1"): "d1", known.document("d2"): "d2"}
    assert store.export(tmp_path / "answers.parquet", names) == 2
    first, second = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert first["queries"] == ["q1"]
    assert first["documents"] == ["d1", "d2"]
    assert (first["value"], first["form"], first["judge"], first["simulated"]) == (0.7, "soft", "a", False)
    assert second["value"] is None
    assert second["documents"][1] == known.document("d3").hex()


# Versions


def test_an_older_schema_is_migrated_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with Store(path, write=True) as store:
        store.put(JUDGE, answered(), texts())
    # As the first version left it.
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE batch")
        connection.execute("PRAGMA user_version=1")
    connection.close()
    with pytest.raises(WorkspaceError, match=f"older schema 1, expected {len(STEPS)}"):
        Store(path)
    with Store(path, write=True) as store:
        assert PAIR in store.find(JUDGE, [PAIR], texts())
        assert store.batches() == []
    Store(path).close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    Store(path, write=True).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={len(STEPS) + 1}")
    connection.close()
    for write in (False, True):
        with pytest.raises(WorkspaceError, match="Update it: pip install"):
            Store(path, write=write)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    with pytest.raises(WorkspaceError, match="does not exist"):
        Store(path)
    path.write_bytes(b"not a database, but long enough to look at " * 50)
    with pytest.raises(WorkspaceError, match="cannot be read"):
        Store(path, write=True)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(WorkspaceError, match="another program's"):
        Store(path, write=True)
    assert [row[0] for row in sqlite3.connect(path).execute("SELECT name FROM sqlite_master")] == ["theirs"]


# The lock

HOLD = """
import sys, time
from pathlib import Path
from zelo_train.store import Workspace
with Workspace(Path(sys.argv[1])).lock("zelo judge --fast"):
    print("held", flush=True)
    time.sleep(60)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_second_writer_is_told_who_holds_the_workspace_and_takes_it_over_from_the_dead(workspace: Workspace) -> None:
    with python(HOLD, workspace.folder) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(WorkspaceError) as error, workspace.lock():
            pass
        assert f"process {first.pid} on " in str(error.value)
        assert "zelo judge --fast" in str(error.value)
        assert workspace.locked
        first.kill()
    with workspace.lock("next"):
        holder = workspace.holder()
        assert holder is not None
        assert (holder.pid, holder.command) == (os.getpid(), "next")
        with pytest.raises(WorkspaceError, match="next"), workspace.lock("within the same process"):
            pass
    assert not workspace.locked


# Kills

WRITE = """
import sys
from pathlib import Path
from zelo_train.records import *
from zelo_train.store import *
folder, start = Path(sys.argv[1]), int(sys.argv[2])
texts = Texts(str, str)
judge = JudgeIdentity("a")
with Store(folder / "answers.db", write=True) as store:
    for n in range(start, start + 1_000_000):
        question = Comparison("q", f"d{n}", f"d{n + 1}").question
        store.put(judge, Judgment("a", question, Status.OK, Form.VOTE, float(n % 2)), texts)
        sys.stdout.write(f"{n}\\n")
        sys.stdout.flush()
        if n == start:
            begun()
"""


def test_forty_kills_lose_no_committed_answer(tmp_path: Path) -> None:
    """Children are made by fork, so that forty of them take seconds; each dies by SIGKILL in the midst of its writing."""
    known = Texts(str, str)
    judge = JudgeIdentity("a")
    committed: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path), WRITE],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        # A number reaches the pipe only after its commit.
        committed = [int(line) for line in parent.stdout.read().decode().splitlines()]
    assert parent.returncode == 0
    assert len({n // 1_000_000 for n in committed}) == 40
    questions = {n: Comparison("q", f"d{n}", f"d{n + 1}").question for n in committed}
    with Store(tmp_path / "answers.db", write=True) as store:
        found = store.find(judge, questions.values(), known)
        assert len(found) == len(committed)
        assert all(found[question].value == n % 2 for n, question in questions.items())
        # At most the one that was under way when each died was committed without being told.
        assert sum(store.counts().values()) <= len(committed) + 40
        assert store._select("PRAGMA integrity_check") == [("ok",)]


FORKS = """
import os, random, signal, sys, time
from zelo_train import records, store
write = sys.argv[2]
draw = random.Random(0)
for child in range(40):
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        sys.argv = ["write", sys.argv[1], str(child * 1_000_000)]
        exec(write, {"begun": lambda: os.write(theirs, b".")})
    # On a busy machine a time alone may pass before it has written anything.
    os.read(ours, 1)
    os.close(ours)
    os.close(theirs)
    time.sleep(draw.uniform(0, 0.08))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_killed_process_leaves_no_lock(workspace: Workspace) -> None:
    with python(HOLD, workspace.folder) as child:
        assert child.stdout is not None
        child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    before = time.perf_counter()
    with workspace.lock():
        assert time.perf_counter() - before < 1


# Notes


def test_a_stage_is_stale_when_an_input_differs(workspace: Workspace, tmp_path: Path) -> None:
    assert workspace.stage("collect") is None
    file = tmp_path / "corpus.jsonl"
    file.write_text("{}")
    inputs = {"collect.top": 100, "corpus": fingerprint(file), "collect.bm25": {"k1": 1.2}}
    workspace.begin("collect")
    note = workspace.finish("collect", inputs, {"documents": 3}, simulated=True)
    assert workspace.stage("collect") == note
    assert note.differences(inputs) == ()
    file.write_text("{ }")
    changed = {"collect.top": 50, "corpus": fingerprint(file), "collect.bm25": {"k1": 1.2}, "new": 1}
    assert note.differences(changed) == ("collect.top was 100, is 50", "corpus changed", "new was null, is 1")
    workspace.begin("collect")
    assert workspace.stage("collect") is None, "a stage that was begun again is not finished"


def test_a_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("one")
    first = fingerprint(folder)
    os.utime(folder / "sub" / "a.txt", (1, 1))
    assert fingerprint(folder) == first
    (folder / "sub" / "a.txt").rename(folder / "sub" / "b.txt")
    second = fingerprint(folder)
    (folder / "sub" / "b.txt").write_text("two")
    assert len({first, second, fingerprint(folder)}) == 3


def test_a_folder_without_settings_is_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="zelo init"):
        Workspace(tmp_path)


def test_a_broken_note_is_told(workspace: Workspace) -> None:
    (workspace.begin("rate") / "stage.json").write_text("{")
    with pytest.raises(WorkspaceError, match="cannot be read"):
        workspace.stage("rate")
