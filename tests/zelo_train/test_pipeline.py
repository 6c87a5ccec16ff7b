"""The stages over one workspace: what they leave, what is stale, what a kill or the cap leaves behind."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests import openai_server
from zelo_train import pipeline
from zelo_train.collect.collection import Collection
from zelo_train.config import Config, parse, template
from zelo_train.errors import CapReached, ConfigError, JudgeError, TooFewAnswers, WorkspaceError
from zelo_train.records import Document, Kind, Query, Status
from zelo_train.store import Workspace

ROOT = Path(__file__).parents[2]
SUBJECTS = ["whales", "violins", "tulips", "glaciers", "trains", "candles", "rivers", "bridges"]
SIMULATED = [{"name": "keen", "kind": "simulated", "accuracy": 97}, {"name": "dull", "kind": "simulated", "accuracy": 80}]


def collection(per_subject: int = 12) -> Collection:
    """Each subject has documents of known worth, and each query asks for one subject; the better half is graded."""
    draw = random.Random(0)
    documents, queries, qrels = {}, {}, {}
    for subject in SUBJECTS:
        grades = {}
        for n in range(per_subject):
            id, worth = f"{subject}-{n}", (n + 0.5) / per_subject
            words = " ".join(draw.choice(["old", "new", "large", "small", "grey"]) for _ in range(15))
            documents[id] = Document(id, f"About {subject}, worth {worth:.3f}: {words} {n} things to know of them")
            grades[id] = max(0, int(4 * worth) - 1)
        queries[subject] = Query(subject, f"all of {subject}?", "test")
        qrels[subject] = grades
    return Collection(documents, queries, qrels)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    collection().write(tmp_path / "beir")
    return tmp_path / "beir"


@pytest.fixture
def workspace(tmp_path: Path, beir: Path) -> Workspace:
    return made(tmp_path / "ws", **{"collect.source": str(beir), "judge.judges": SIMULATED, "collect.test_share": 0.0})


def made(folder: Path, **values: object) -> Workspace:
    folder.mkdir(exist_ok=True)
    (folder / "zelo.yaml").write_text(template(values), encoding="utf-8")
    return Workspace(folder)


def settings(workspace: Workspace) -> Config:
    return parse(workspace.settings.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]


def answers(workspace: Workspace) -> set[tuple[Any, ...]]:
    with workspace.store() as store:
        return set(store._select("SELECT hex(key), result, status FROM answer"))


def states(workspace: Workspace) -> dict[str, str]:
    return {one.stage: one.state for one in pipeline.status(workspace, settings(workspace))}


def test_the_stages_one_after_another(workspace: Workspace) -> None:
    config = settings(workspace)
    assert states(workspace) == {"collect": "not run", "judge": "not run", "rate": "not run"}
    pipeline.collect(workspace, config)
    assert states(workspace) == {"collect": "done", "judge": "not run", "rate": "not run"}
    told: list[str] = []
    judged, report = pipeline.judge(workspace, config, say=told.append)
    assert "simulated" in told[0].lower()
    assert report.startswith("SIMULATED")
    rated, report = pipeline.rate(workspace, config)
    assert report.startswith("Judges are simulated")
    assert judged.simulated
    assert rated.simulated
    assert states(workspace) == {"collect": "done", "judge": "done", "rate": "done"}

    targets = rows(workspace.folder / "rate" / "targets.tsv")
    assert "simulated" in (workspace.folder / "rate" / "targets.tsv").read_text().splitlines()[0]
    assert {row["simulated"] for row in targets} == {"1"}
    assert len(targets) == len(SUBJECTS) * 12
    for subject in SUBJECTS:
        own = {row["corpus-id"]: float(row["relevance"]) for row in targets if row["query-id"] == subject}
        best, worst = own[f"{subject}-11"], own[f"{subject}-0"]
        assert 0.01 <= worst < best <= 0.99
    ratings = rows(workspace.folder / "rate" / "ratings.tsv")
    assert sum(float(row["rating"]) for row in ratings) == pytest.approx(0, abs=0.01)


def test_nothing_is_asked_twice_and_another_judge_leaves_all_as_it_was(workspace: Workspace) -> None:
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.judge(workspace, config)
    before = answers(workspace)
    with workspace.store() as store:
        asked = {judge: sum(n for (name, *_), n in store.counts().items() if name == judge) for judge in ("keen", "dull")}
    # Three rounds of n pairs, and what is beyond them: audits, grades, questions across queries.
    assert all(3 * 96 < count < 3 * 96 + 80 for count in asked.values()), asked
    pipeline.judge(workspace, config)
    assert answers(workspace) == before
    third = made(workspace.folder, **{
        "collect.source": config.collect.source, "collect.test_share": 0.0,
        "judge.judges": [*SIMULATED, {"name": "third", "kind": "simulated"}],
    })  # fmt: skip
    assert states(third) == {"collect": "done", "judge": "stale", "rate": "not run"}
    pipeline.judge(third, settings(third))
    assert before < answers(third)
    with third.store() as store:
        assert sum(n for (name, *_), n in store.counts().items() if name != "third") == len(before)


def test_what_is_stale_says_why(workspace: Workspace) -> None:
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.judge(workspace, config)
    pipeline.rate(workspace, config)
    changed = config.model_copy(update={"rate": config.rate.model_copy(update={"prior": 0.5})})
    (one,) = [state for state in pipeline.status(workspace, changed) if state.state == "stale"]
    assert (one.stage, one.reasons) == ("rate", ("rate.prior was 0.3, is 0.5",))
    changed = config.model_copy(update={"collect": config.collect.model_copy(update={"top": 5})})
    found = {state.stage: state.reasons for state in pipeline.status(workspace, changed)}
    assert found["collect"] == ("collect.top was 100, is 5",)
    assert found["judge"] == ("collect is stale",)
    assert found["rate"] == ("collect is stale", "judge is stale")
    more = config.judge.model_copy(update={"pairs": config.judge.pairs.model_copy(update={"rounds": 4})})
    changed = config.model_copy(update={"judge": more})
    assert [state.reasons for state in pipeline.status(workspace, changed)] == [
        (), ("judge.pairs.rounds was 3, is 4",), ("judge is stale",),
    ]  # fmt: skip
    _, report = pipeline.rate(workspace, changed)
    assert "judge is stale (judge.pairs.rounds was 3, is 4): `zelo judge` asks what is missing" in report
    pipeline.rate(workspace, config)
    # What only money and speed depend on makes nothing stale.
    cheap = config.model_copy(update={"judge": config.judge.model_copy(update={"currency": "EUR"})})
    assert {state.state for state in pipeline.status(workspace, cheap)} == {"done"}


def test_an_edited_document_makes_its_query_be_asked_again_and_no_other(workspace: Workspace, beir: Path) -> None:
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.judge(workspace, config)
    before = answers(workspace)
    edited = collection()
    documents = dict(edited.documents)
    documents["whales-3"] = Document("whales-3", documents["whales-3"].text + " and more")
    Collection(documents, edited.queries, edited.qrels).write(beir)
    assert pipeline.status(workspace, config)[0].reasons == ("the content of collect.source changed",)
    pipeline.collect(workspace, config)
    with workspace.lock(), workspace.store(write=True) as store:
        judging = pipeline.Judging(workspace, config, store, pipeline.collected(workspace))
        planned = judging.stored(1)
    assert set(SUBJECTS) - set(planned) == {"whales"}
    assert before <= answers(workspace)


KILLED = """
import sys
from pathlib import Path
from zelo_train import pipeline
from zelo_train.config import read
from zelo_train.store import Workspace
workspace = Workspace(Path(sys.argv[1]))
with workspace.lock():
    print("begun", flush=True)
    pipeline.judge(workspace, read(workspace.settings))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(workspace: Workspace, tmp_path: Path, beir: Path) -> None:
    config = settings(workspace)
    pipeline.collect(workspace, config)
    other = made(tmp_path / "whole", **{
        "collect.source": str(beir), "judge.judges": SIMULATED, "collect.test_share": 0.0,
    })  # fmt: skip
    pipeline.collect(other, config)
    pipeline.judge(other, config)
    pipeline.rate(other, config)
    # In the midst of each round, as far as can be told from outside.
    for share in (0.1, 0.5, 0.9):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(workspace.folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and child.poll() is None:
            if workspace.has_answers:
                try:
                    if len(answers(workspace)) > share * len(answers(other)):
                        break
                except WorkspaceError:
                    pass  # not yet made
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert states(workspace)["judge"] == "begun"
    committed = answers(workspace)
    pipeline.judge(workspace, config)
    assert committed <= answers(workspace) == answers(other)
    pipeline.rate(workspace, config)
    for name in ("ratings.tsv", "targets.tsv"):
        assert (workspace.folder / "rate" / name).read_bytes() == (other.folder / "rate" / name).read_bytes()


@pytest.mark.parametrize(
    ("design", "documents", "calibration"),
    [("cycles", 2, "none"), ("information", 2, "cross"), ("neighbours", 4, "grades")],
)
def test_every_design_and_calibration(design: str, documents: int, calibration: str, tmp_path: Path, beir: Path) -> None:
    workspace = made(
        tmp_path / "ws",
        **{
            "collect.source": str(beir),
            "collect.test_share": 0.0,
            "judge.judges": SIMULATED[:1],
            "judge.pairs.design": design,
            "judge.pairs.documents": documents,
            "judge.pairs.degree": 6,
            "rate.calibration": calibration,
        },
    )
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.judge(workspace, config)
    pipeline.rate(workspace, config)
    with workspace.store() as store:
        kinds = {kind for _, kind, _ in store.counts()}
    assert (Kind.GRADE in kinds) == (calibration != "none")
    targets = rows(workspace.folder / "rate" / "targets.tsv")
    for subject in SUBJECTS:
        own = sorted((float(row["relevance"]), row["corpus-id"]) for row in targets if row["query-id"] == subject)
        assert int(own[-1][1].split("-")[1]) >= 6, own


# Where a stage begins


def test_a_run_file_and_grades_are_enough(tmp_path: Path, beir: Path) -> None:
    run = tmp_path / "run.txt"
    run.write_text("".join(f"whales Q0 whales-{n} {n} {-n}.0 x\n" for n in range(5)) + "whales Q0 gone 9 -9 x\n")
    workspace = made(tmp_path / "ws", **{"collect.source": str(beir), "collect.candidates": "file", "collect.run": str(run)})
    _, report = pipeline.collect(workspace, settings(workspace))
    assert "unknown candidates: 1" in report
    assert "queries without candidates: 7" in report
    assert [one.document for one in pipeline.collected(workspace).candidates["whales"]] == [f"whales-{n}" for n in range(5)]
    workspace = made(tmp_path / "ws", **{"collect.source": str(beir), "collect.candidates": "judged", "collect.top": 3})
    pipeline.collect(workspace, settings(workspace))
    assert all(len(found) == 12 for found in pipeline.collected(workspace).candidates.values())


def test_a_folder_of_texts_with_a_list_of_queries(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for subject in SUBJECTS:
        (texts / f"{subject}.md").write_text(
            f"# {subject}\n\nWhat is to be said of {subject}.\n\n## More\n\nAnd {subject} again."
        )
    (tmp_path / "asked.txt").write_text("".join(f"{subject}, please\n" for subject in SUBJECTS))
    workspace = made(
        tmp_path / "ws", **{"collect.source": "../texts", "collect.queries": "../asked.txt", "collect.domain": "x"}
    )
    pipeline.collect(workspace, settings(workspace))
    found = pipeline.collected(workspace)
    assert {one.document for one in found.candidates["asked-1"]} == {"whales.md#0", "whales.md#1"}
    assert found.collection.documents["whales.md#1"].title == "whales > More"
    assert {query.domain for query in found.collection.queries.values()} == {"x"}
    assert {query.split for query in found.collection.queries.values()} == {"train", "test"}
    (texts / "whales.md").write_text("Nothing.")
    assert states(workspace)["collect"] == "stale"


def test_files_by_name(tmp_path: Path, beir: Path) -> None:
    values = {
        "collect.documents": str(beir / "corpus.jsonl.gz"),
        "collect.queries": str(beir / "queries.jsonl.gz"),
        "collect.qrels": str(beir / "qrels"),
    }
    workspace = made(tmp_path / "ws", **values)
    pipeline.collect(workspace, settings(workspace))
    assert len(pipeline.collected(workspace).collection.qrels) == len(SUBJECTS)
    workspace = made(tmp_path / "ws", **{**values, "collect.qrels": "none.tsv"})
    with pytest.raises(ConfigError, match=r"collect\.qrels is 'none\.tsv'"):
        pipeline.collect(workspace, settings(workspace))


def test_test_queries_are_not_judged(tmp_path: Path, beir: Path) -> None:
    workspace = made(tmp_path / "ws", **{"collect.source": str(beir), "judge.judges": SIMULATED[:1], "collect.test_share": 0.5})
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.judge(workspace, config)
    pipeline.rate(workspace, config)
    split = {id: query.split for id, query in pipeline.collected(workspace).collection.queries.items()}
    assert set(split.values()) == {"train", "test"}
    rated = {row["query-id"] for row in rows(workspace.folder / "rate" / "targets.tsv")}
    assert rated == {id for id, found in split.items() if found == "train"}


# What is refused


def test_an_order_that_cannot_be_is_told(workspace: Workspace) -> None:
    config = settings(workspace)
    for stage in (pipeline.judge, pipeline.rate):
        with pytest.raises(WorkspaceError):
            stage(workspace, config)
    pipeline.collect(workspace, config)
    with pytest.raises(WorkspaceError, match="zelo judge"):
        pipeline.rate(workspace, config)


def test_ratings_without_grades_say_how_to_get_them(workspace: Workspace) -> None:
    config = settings(workspace)
    pipeline.collect(workspace, config)
    with workspace.store(write=True) as store:
        judging = pipeline.Judging(workspace, config, store, pipeline.collected(workspace))
        for number in (1, 2, 3):
            judging.plan(number)
            judging.ensemble.ask(judging.questions([number]))
    with pytest.raises(TooFewAnswers, match="expected a finished `zelo judge`"):
        pipeline.rate(workspace, config)
    without = config.model_copy(update={"rate": config.rate.model_copy(update={"calibration": "none"})})
    _, report = pipeline.rate(workspace, without)
    assert "judging is not finished" in report


def test_judges_that_cannot_be_are_told(workspace: Workspace, tmp_path: Path, beir: Path) -> None:
    pipeline.collect(workspace, settings(workspace))
    for judges, told in [
        ([], "names no judges"),
        ([{"name": "a"}], "judge 'a' has no model"),
        ([{"name": "a", "kind": "replay"}], "judge 'a' has no path"),
        ([{"name": "a", "kind": "simulated", "answer": "grade"}], "a: no judge compares documents"),
    ]:
        made(workspace.folder, **{"collect.source": str(beir), "collect.test_share": 0.0, "judge.judges": judges})
        with pytest.raises(ConfigError, match=told):
            pipeline.judge(workspace, settings(workspace))
    whole = collection()
    Collection(whole.documents, whole.queries).write(tmp_path / "bare")
    bare = made(tmp_path / "b", **{"collect.source": str(tmp_path / "bare"), "judge.judges": SIMULATED})
    pipeline.collect(bare, settings(bare))
    with pytest.raises(ConfigError, match="the collection has none"):
        pipeline.judge(bare, settings(bare))


def test_nothing_to_judge(tmp_path: Path, beir: Path) -> None:
    workspace = made(tmp_path / "ws", **{"collect.source": str(beir), "judge.judges": SIMULATED, "collect.top": 1})
    pipeline.collect(workspace, settings(workspace))
    with pytest.raises(TooFewAnswers, match="no query of train, dev has two candidates"):
        pipeline.judge(workspace, settings(workspace))


# Real judges


def endpoint(base_url: str, **more: object) -> list[dict[str, Any]]:
    return [{"name": "real", "model": "test-model", "base_url": base_url, "price": {"input": 1, "output": 2}, **more}]


def test_a_real_server_the_cap_and_a_second_run(tmp_path: Path) -> None:
    collection(per_subject=6).write(tmp_path / "beir")
    with openai_server.running() as server:
        # About 200 questions of some 300 tokens, at a millionth a token: the first cap ends in their midst.
        values = {
            "collect.source": str(tmp_path / "beir"),
            "collect.test_share": 0.0,
            "judge.judges": endpoint(server.base_url, concurrency=4),
            "judge.cap": 0.02,
            "judge.keep_replies": True,
        }
        workspace = made(tmp_path / "ws", **values)
        config = settings(workspace)
        pipeline.collect(workspace, config)
        estimates, leaving = pipeline.outlook(workspace, config)
        assert leaving == [], "a loopback server is this machine"
        with pytest.raises(CapReached, match=r"of 0\.02 USD"):
            pipeline.judge(workspace, config)
        first = answers(workspace)
        assert 10 < len(first) < estimates[0].calls
        with workspace.store() as store:
            assert store.outlay() <= 20_000
        assert states(workspace)["judge"] == "begun"

        made(tmp_path / "ws", **{**values, "judge.cap": 5})
        config = settings(workspace)
        _, report = pipeline.judge(workspace, config)
        assert first < answers(workspace)
        # Whatever was sent is kept, so nothing was paid for twice.
        assert server.stats()["requests"] == len(answers(workspace))
        with workspace.store() as store:
            counts = {status: sum(n for (*_, found), n in store.counts().items() if found is status) for status in Status}
            spent = sum(one.settled for one in store.spent())
            assert all(one.reserved == 0 for one in store.spent())
        assert counts[Status.OK] == len(answers(workspace))
        assert abs(counts[Status.OK] - estimates[0].calls) < 0.1 * counts[Status.OK]
        assert abs(spent - estimates[0].cost) < 0.4 * spent
        assert "answered" in report
        assert "SIMULATED" not in report
        pipeline.rate(workspace, config)
    targets = rows(workspace.folder / "rate" / "targets.tsv")
    assert {row["simulated"] for row in targets} == {"0"}
    best = max((row for row in targets if row["query-id"] == "whales"), key=lambda row: float(row["relevance"]))
    assert best["corpus-id"] == "whales-5"


def test_no_text_leaves_without_a_yes(tmp_path: Path, beir: Path) -> None:
    workspace = made(tmp_path / "ws", **{
        "collect.source": str(beir), "judge.judges": endpoint("http://judge.invalid/v1"), "judge.cap": 2,
    })  # fmt: skip
    config = settings(workspace)
    pipeline.collect(workspace, config)
    asked = []
    with pytest.raises(JudgeError, match=r"judge\.invalid, which was not confirmed"):
        pipeline.judge(workspace, config, confirm=lambda leaving: bool(asked.append(leaving)))
    ((one,),) = asked
    assert one.host == "judge.invalid"
    line = one.line("USD")
    # Host, volume and money, of all rounds together.
    assert "judge.invalid" in line
    assert "of your texts" in line
    assert "at most 2.00 USD" in line
    assert one.questions > 3 * 60
    assert answers(workspace) == set()


def test_queries_written_by_a_model(tmp_path: Path) -> None:
    collection(per_subject=6).write(tmp_path / "beir")
    with openai_server.running() as server:
        values = {
            "collect.source": str(tmp_path / "beir"),
            "collect.synthetic.queries": 5,
            "collect.synthetic.writer": "real",
            "collect.synthetic.round_trip": 0,
            "judge.judges": endpoint(server.base_url),
        }
        workspace = made(tmp_path / "ws", **values)
        _, report = pipeline.collect(workspace, settings(workspace))
        queries = pipeline.collected(workspace).collection.queries.values()
        made_up = [query for query in queries if query.synthetic]
        assert report.startswith("5 queries written by test-model, marked synthetic:")
        assert 1 <= len(made_up) <= 5
        assert f"queries, synthetic {len(made_up):>10}".split() == ["queries,", "synthetic", str(len(made_up))]
        requests = server.stats()["requests"]
        assert requests == 5
        pipeline.collect(workspace, settings(workspace), again=True)
        assert server.stats()["requests"] == requests, "what was paid for is not asked again"
        with workspace.store() as store:
            assert sum(one.settled for one in store.spent()) > 0
    made(tmp_path / "ws", **{**values, "collect.synthetic.writer": "nobody"})
    with pytest.raises(ConfigError, match="expected the name of a judge of kind openai \\(real\\)"):
        pipeline.collect(workspace, settings(workspace))


def test_answers_are_replayed_elsewhere(workspace: Workspace, tmp_path: Path, beir: Path) -> None:
    """What `zelo answers` wrote is enough to rate again, without the judge."""
    pytest.importorskip("pyarrow")
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.judge(workspace, config)
    pipeline.rate(workspace, config)
    with workspace.store() as store:
        store.export(tmp_path / "answers.parquet", pipeline.names(workspace))
    replayed = [{"name": judge["name"], "kind": "replay", "path": "../answers.parquet"} for judge in SIMULATED]
    other = made(tmp_path / "other", **{
        "collect.source": str(beir), "collect.test_share": 0.0, "judge.judges": replayed,
    })  # fmt: skip
    config = settings(other)
    pipeline.collect(other, config)
    noted, _ = pipeline.judge(other, config)
    assert noted.simulated, "the mark stays"
    pipeline.rate(other, config)
    for name in ("ratings.tsv", "targets.tsv"):
        assert (other.folder / "rate" / name).read_bytes() == (workspace.folder / "rate" / name).read_bytes()
    stranger = [{"name": "nobody", "kind": "replay", "path": "../answers.parquet"}]
    made(other.folder, **{"collect.source": str(beir), "collect.test_share": 0.0, "judge.judges": stranger})
    with pytest.raises(JudgeError, match="no answers of a judge called 'nobody'"):
        pipeline.judge(other, settings(other))


def test_batches_round_after_round(tmp_path: Path) -> None:
    """Files are written, answered by the server line by line as a provider would, and read back."""
    collection(per_subject=6).write(tmp_path / "beir")
    with openai_server.running() as server:
        workspace = made(tmp_path / "ws", **{
            "collect.source": str(tmp_path / "beir"), "collect.test_share": 0.0, "judge.cap": 5,
            "judge.judges": [*endpoint(server.base_url), *SIMULATED[:1]],
        })  # fmt: skip
        config = settings(workspace)
        pipeline.collect(workspace, config)

        def provider(files: list[Any]) -> Path:
            output = tmp_path / "output.jsonl"
            with output.open("w") as lines:
                for line in (line for file in files for line in file.path.read_text().splitlines()):
                    asked = json.loads(line)
                    body = json.dumps(asked["body"]).encode()
                    request = urllib.request.Request(
                        f"{server.base_url}/chat/completions", body, {"content-type": "application/json"}
                    )
                    with urllib.request.urlopen(request) as reply:
                        response = {"status_code": 200, "body": json.load(reply)}
                    lines.write(json.dumps({"custom_id": asked["custom_id"], "response": response, "error": None}) + "\n")
            return output

        rounds = []
        while True:
            what, files = pipeline.write_batches(workspace, config, tmp_path / "batches")
            if not files:
                break
            assert pipeline.write_batches(workspace, config, tmp_path / "batches")[1] == [], "they are under way"
            with pytest.raises(WorkspaceError, match="would be paid for twice"):
                pipeline.judge(workspace, config)
            with workspace.store() as store:
                assert store.spent()[-1].reserved >= files[0].batch.worst > 0
            rounds.append(what)
            output = provider(files)
            # Only a part of the lines: those are kept, and the batch stays open.
            part = tmp_path / "part.jsonl"
            part.write_text("".join(output.read_text().splitlines(keepends=True)[:3]))
            asked = sum(len(file.questions) for file in files)
            assert pipeline.read_batches(workspace, config, [part]) == pipeline.Reading(3, 0, 0, asked - 3)
            assert "--drop-batches" in str(pipeline.Reading(3, 0, 0, asked - 3))
            assert pipeline.read_batches(workspace, config, [output]) == pipeline.Reading(asked, 0, 0)
            with pytest.raises(JudgeError, match="answer nothing that is under way"):
                pipeline.read_batches(workspace, config, [output])
        assert rounds == ["round 1 of 3", "round 2 of 3", "round 3 of 3", "grades"]
        with workspace.store() as store:
            assert sum(one.reserved for one in store.spent()) == 0
            spent = store.outlay()
        before, requests = answers(workspace), server.stats()["requests"]
        pipeline.judge(workspace, config)
        assert before <= answers(workspace)
        # Only what batches do not ask: repeated questions, and those across queries.
        assert 16 <= server.stats()["requests"] - requests < 30
        with workspace.store() as store:
            assert store.outlay() > spent > 0
        pipeline.rate(workspace, config)


def batched(tmp_path: Path, base_url: str) -> Workspace:
    collection(per_subject=6).write(tmp_path / "beir")
    return made(tmp_path / "ws", **{
        "collect.source": str(tmp_path / "beir"), "collect.test_share": 0.0, "judge.cap": 5,
        "judge.judges": [*endpoint(base_url), *SIMULATED[:1]],
    })  # fmt: skip


def test_batches_through_the_provider(tmp_path: Path) -> None:
    """One call again and again: it hands a round over, finds it under way, takes it, and hands over the next."""
    with openai_server.running() as server:
        workspace = batched(tmp_path, server.base_url)
        config = settings(workspace)
        pipeline.collect(workspace, config)
        told: list[str] = []
        waiting = [pipeline.batches(workspace, config, say=told.append)]
        files = list((workspace.folder / "judge" / "batches").iterdir())
        assert len(files) == 1
        with pytest.raises(WorkspaceError, match="zelo judge --batches"):
            pipeline.judge(workspace, config)
        while waiting[-1]:
            waiting.append(pipeline.batches(workspace, config, say=told.append))
        assert list((workspace.folder / "judge" / "batches").iterdir()) == [], "what is read need not lie there"
        handed = [line.partition(" questions of ")[2] for line in told if "handed over" in line]
        assert handed == [f"round {n} of 3 are handed over" for n in (1, 2, 3)] + ["grades are handed over"]
        assert sum("under way" in line for line in told) == 4
        stats = server.stats()
        assert (stats["batches"], stats["requests"]) == (4, 0)
        with workspace.store() as store:
            assert {one.state for one in store.batches()} == {"read"}
            assert sum(one.reserved for one in store.spent()) == 0
            counts = {status for (judge, _, status), _ in store.counts().items() if judge == "real"}
            assert counts == {Status.OK}
            # Half of what the server counted, at a millionth a token in and two out, each rounded up.
            billed = stats["billed_in"] + 2 * stats["billed_out"]
            assert store.outlay() == pytest.approx(billed / 2, rel=0.02)
        pipeline.judge(workspace, config)
        assert server.stats()["requests"] < 30, "only what batches do not ask"


def test_a_batch_that_a_dead_process_left_is_handed_over_and_paid_once(tmp_path: Path) -> None:
    with openai_server.running() as server:
        workspace = batched(tmp_path, server.base_url)
        config = settings(workspace)
        pipeline.collect(workspace, config)
        # It died between writing the file and handing it over: as `batches` writes it.
        pipeline.write_batches(workspace, config, workspace.folder / "judge" / "batches")
        told: list[str] = []
        while pipeline.batches(workspace, config, say=told.append):
            pass
        assert server.stats()["batches"] == 4
        with workspace.store() as store:
            assert sum(one.reserved for one in store.spent()) == 0


def test_a_failed_batch_costs_nothing_and_says_why(tmp_path: Path) -> None:
    with openai_server.running(fail_batches=True) as server:
        workspace = batched(tmp_path, server.base_url)
        config = settings(workspace)
        pipeline.collect(workspace, config)
        assert pipeline.batches(workspace, config) == pipeline.batches(workspace, config) > 0
        with pytest.raises(JudgeError, match=r"took nothing of batch .*: the queue is full"):
            pipeline.batches(workspace, config)
        with workspace.store() as store:
            assert store.outlay() == 0
            assert {one.state for one in store.batches()} == {"read"}


def test_an_answer_to_a_text_that_changed_meanwhile_is_told(tmp_path: Path) -> None:
    with openai_server.running() as server:
        workspace = batched(tmp_path, server.base_url)
        config = settings(workspace)
        pipeline.collect(workspace, config)
        asked = pipeline.batches(workspace, config)
        whole = collection(per_subject=6)
        documents = {**whole.documents, "whales-3": Document("whales-3", whole.documents["whales-3"].text + " and more")}
        Collection(documents, whole.queries, whole.qrels).write(tmp_path / "beir")
        pipeline.collect(workspace, config)
        told: list[str] = []
        pipeline.batches(workspace, config, say=told.append)
        pipeline.batches(workspace, config, say=told.append)
        assert "of no use" in told[1]
        kept = int(told[1].partition("kept ")[2].partition(" ")[0])
        # The plan of that query is another one now; all others are as they were.
        assert kept == asked - asked // len(SUBJECTS)


def test_batches_need_a_yes_and_say_who_refuses(tmp_path: Path) -> None:
    workspace = batched(tmp_path, "http://judge.invalid/v1")
    config = settings(workspace)
    pipeline.collect(workspace, config)
    leaving = []
    with pytest.raises(JudgeError, match=r"judge\.invalid, which was not confirmed"):
        pipeline.batches(workspace, config, confirm=lambda listed: bool(leaving.append(listed)))
    assert leaving[0][0].host == "judge.invalid"
    with workspace.store() as store:
        assert (store.batches(), store.outlay()) == ([], 0)
    with openai_server.running() as server:
        workspace = batched(tmp_path, f"{server.base_url}/elsewhere")
        config = settings(workspace)
        with pytest.raises(JudgeError, match="expected an endpoint with a batch API"):
            pipeline.batches(workspace, config)
        # A batch whose judge has gone.
        made(workspace.folder, **{
            "collect.source": str(tmp_path / "beir"), "collect.test_share": 0.0, "judge.judges": SIMULATED,
        })  # fmt: skip
        with pytest.raises(JudgeError, match=r"'real', which zelo\.yaml no longer names"):
            pipeline.batches(workspace, settings(workspace))
        assert pipeline.drop_batches(workspace) == 1
        assert pipeline.batches(workspace, settings(workspace)) == 0


def test_files_for_a_person_and_batches_from_here_do_not_mix(tmp_path: Path) -> None:
    workspace = batched(tmp_path, "http://judge.invalid/v1")
    config = settings(workspace)
    pipeline.collect(workspace, config)
    pipeline.write_batches(workspace, config, tmp_path / "mine")
    with pytest.raises(WorkspaceError, match="for a person to hand over"):
        pipeline.batches(workspace, config)


def test_a_pilot_and_a_sheet(tmp_path: Path, beir: Path) -> None:
    workspace = made(tmp_path / "ws", **{"collect.source": str(beir), "judge.judges": SIMULATED, "collect.test_share": 0.0})
    config = settings(workspace)
    pipeline.collect(workspace, config)
    found = pipeline.pilot(workspace, config)
    assert [verdict.judge.judge for verdict in found.verdicts] == ["keen", "dull"]
    assert found.lines()[0].startswith("SIMULATED")
    assert found.verdicts[0].agreement.share > 0.9
    sheet = tmp_path / "sheet.csv"
    count = pipeline.write_sheet(workspace, config, sheet)
    # Of few queries more pairs each, so that there are enough for a pilot.
    assert count == pipeline.PILOT
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        listed = [(row["query"], *sorted((row["left"], row["right"]))) for row in csv.DictReader(file)]
    assert len(set(listed)) == count
    assert {query for query, *_ in listed[: len(SUBJECTS)]} == set(SUBJECTS)
    assert pipeline.write_sheet(workspace, config, sheet, count=10) == 10
    assert "About whales" in sheet.read_text(encoding="utf-8-sig")
