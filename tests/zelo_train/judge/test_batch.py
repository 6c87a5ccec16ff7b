"""Batch files: written, handed over once, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import openai_server
from zelo_train.cost import Price
from zelo_train.errors import JudgeError
from zelo_train.judge import batch
from zelo_train.judge.ask import Ensemble
from zelo_train.judge.judges import ChatJudge
from zelo_train.llm import Endpoint
from zelo_train.records import Kind, Question, Status
from zelo_train.store import Store

DOCUMENTS = {f"d{i}": f"document {i} is worth {i / 20:.4f}" for i in range(20)}
QUESTIONS = [Question(Kind.COMPARE, ("q",), (f"d{i}", f"d{(i + 7) % 20}")) for i in range(20)]


def ensemble(judge: ChatJudge, store: Store) -> Ensemble:
    return Ensemble([judge], {"q": "query"}.__getitem__, DOCUMENTS.__getitem__, store)


def judge(base_url: str = "http://127.0.0.1:9/v1") -> ChatJudge:
    return ChatJudge("judge", "test-model", Endpoint(base_url), price=Price(1_000_000, 2_000_000))


def answers(path: Path) -> list[str]:
    """What the provider would write: the test server's answer to each line."""
    server = openai_server.Server(openai_server.Settings())
    lines = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        body = server.completion(row["body"], *server.judge(row["body"]))
        response = {"status_code": 200, "request_id": "r", "body": body}
        lines.append(json.dumps({"id": "b", "custom_id": row["custom_id"], "response": response, "error": None}))
    return lines


def test_the_same_answers_as_one_by_one_at_half_the_price(tmp_path: Path) -> None:
    with Store(tmp_path / "batch.db", write=True) as store:
        of, asked = judge(), QUESTIONS
        (file,) = batch.write(ensemble(of, store), of, asked, tmp_path / "batches", store)
        assert file.questions == tuple(asked)
        assert [known.state for known in store.batches()] == ["written"]
        read = batch.read(ensemble(of, store), of, file.questions, reversed(answers(file.path)))
        batch.keep(ensemble(of, store), of, read)
        assert read.again == ()
        assert sum(judgment.cost for judgment in read.judgments) <= file.batch.worst
        by_batch = ensemble(of, store).ask(asked)  # nothing is left to ask: the endpoint does not exist
    with openai_server.running() as server, Store(tmp_path / "one.db", write=True) as store:
        one_by_one = ensemble(judge(server.base_url), store).ask(asked)
    assert [j.value for j in by_batch] == [j.value for j in one_by_one]
    assert sum(j.cost for j in by_batch) == pytest.approx(sum(j.cost for j in one_by_one) / 2, abs=20)


def test_files_are_cut_and_no_question_is_in_two(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db", write=True) as store:
        of = judge()
        first = batch.write(ensemble(of, store), of, QUESTIONS[:12], tmp_path / "b", store, most_lines=5)
        assert [len(file.questions) for file in first] == [5, 5, 2]
        second = batch.write(ensemble(of, store), of, QUESTIONS, tmp_path / "b", store, most_bytes=5_000)
        assert [question for file in second for question in file.questions] == QUESTIONS[12:]
        assert len(second) > 2
        assert all(file.path.stat().st_size <= 5_000 for file in second)
        assert batch.write(ensemble(of, store), of, QUESTIONS, tmp_path / "b", store) == []
        keys = [key for known in store.batches() for key in known.keys]
        assert len(keys) == len(set(keys)) == 20


def test_a_failure_is_no_answer_and_an_expired_line_is_neither(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db", write=True) as store:
        of = judge()
        (file,) = batch.write(ensemble(of, store), of, QUESTIONS[:6], tmp_path / "b", store)
        lines = [json.loads(line) for line in answers(file.path)]
        lines[0] |= {"response": None, "error": {"code": "batch_expired", "message": "not in time"}}
        lines[1]["response"]["body"]["choices"][0]["message"] |= {"content": "", "refusal": "no"}
        lines[2]["response"] = {"status_code": 400, "body": {"error": {"code": "context_length_exceeded"}}}
        lines[3]["response"] = {"status_code": 500, "body": {"error": {"message": "broke"}}}
        del lines[4]
        read = batch.read(ensemble(of, store), of, file.questions, [json.dumps(line) for line in lines])
    assert [judgment.status for judgment in read.judgments] == [Status.REFUSED, Status.TOO_LONG, Status.OK]
    assert read.again == (QUESTIONS[0], QUESTIONS[3], QUESTIONS[4])
    assert read.reasons["refused"] == "no"


@pytest.mark.parametrize(
    ("line", "said"), [("A", "no line of a batch"), ("[]", "no line of"), ('{"custom_id": "0"}', "not in this")]
)
def test_another_file_is_refused(line: str, said: str, tmp_path: Path) -> None:
    with Store(tmp_path / "a.db", write=True) as store, pytest.raises(JudgeError, match=said):
        batch.read(ensemble(judge(), store), judge(), QUESTIONS, [line])


async def test_handed_over_once_though_the_process_dies_in_between(tmp_path: Path) -> None:
    with openai_server.running() as server, Store(tmp_path / "a.db", write=True) as store:
        of = judge(server.base_url)
        (file,) = batch.write(ensemble(of, store), of, QUESTIONS, tmp_path / "b", store)

        class Dies:
            """The store of a process that dies when the provider's id is about to be noted."""

            batches = staticmethod(store.batches)

            @staticmethod
            def put_batch(note: batch.Batch) -> None:
                if note.provider is not None:
                    raise KeyboardInterrupt
                store.put_batch(note)

        with pytest.raises(KeyboardInterrupt):
            await batch.submit(of, file.path, file.batch, Dies())
        assert [(known.provider, known.state) for known in store.batches()] == [(None, "submitting")]
        noted = await batch.submit(of, file.path, store.batches()[0], store)
        assert await batch.submit(of, file.path, noted, store) == noted
        assert store.batches() == [noted]
        stats = server.stats()
        assert stats["batches"] == 1
        assert noted.provider == "batch-1"
        assert await batch.fetch(of, noted) is None, "under way"
        fetched = await batch.fetch(of, noted)
        assert fetched is not None
        read = batch.read(ensemble(of, store), of, file.questions, fetched.lines)
    assert len(read.judgments) == 20
    assert all(judgment.answered for judgment in read.judgments)
