"""Reading replies, and the judges that need no endpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import openai_server
from zelo_train.errors import JudgeError
from zelo_train.judge.ask import Ensemble
from zelo_train.judge.judges import (
    ChatJudge,
    Judge,
    ReplayJudge,
    TeacherJudge,
    read_grade,
    read_order,
    read_soft,
    read_vote,
    record,
)
from zelo_train.judge.prompt import Prompts
from zelo_train.judge.simulated import SimulatedJudge, truth
from zelo_train.llm import Endpoint, Fault, Reply, Scripted
from zelo_train.records import Candidate, Form, Judgment, Kind, Question, Status
from zerank_integrations.relevance import logit_of
from zerank_integrations.reranker import Reranker

PAIR = Question(Kind.COMPARE, ("q",), ("a", "b"))
SWAPPED = Question(Kind.COMPARE, ("q",), ("b", "a"))
GRADE = Question(Kind.GRADE, ("q",), ("a",))
LIST = Question(Kind.COMPARE, ("q",), ("a", "b", "c"))
CROSS = Question(Kind.CROSS, ("q", "r"), ("a", "b"))
TEXTS = {"a": "worth 0.90", "b": "worth 0.30", "c": "worth 0.60"}


def reply(*tops: dict[str, float], text: str = "", **fields: object) -> Reply:
    """A reply from the probabilities at each of its tokens."""
    top = tuple(tuple((token, math.log(p)) for token, p in sorted(at.items(), key=lambda item: -item[1])) for at in tops)
    return Reply(text or "".join(at[0][0] for at in top), top=top, **fields)


def test_soft_is_the_share_of_the_mass_of_a_and_b() -> None:
    assert read_soft(reply({"A": 0.6, "B": 0.2, "The": 0.2})) == pytest.approx(0.75)
    assert read_soft(reply({"A": 0.3, " A": 0.2, '"A': 0.1, "B": 0.2, "a": 0.1})) == pytest.approx(0.75)
    # After a token of white space or a quotation mark.
    assert read_soft(reply({"\n": 0.99}, {"B": 0.9, "A": 0.1})) == pytest.approx(0.1)
    # B is not among the likeliest tokens at all.
    assert read_soft(reply({"A": 0.99})) == 1.0


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (reply({"A": 0.3, "B": 0.19, "I": 0.5}), "refused"),
        (reply({"The": 0.9}), "refused"),
        (reply({"A": 1.0}, refusal="I can't"), "refused"),
        (reply({"A": 1.0}, finish="content_filter"), "refused"),
        (Reply("A"), "rejected"),
    ],
)
def test_soft_refuses_what_is_not_mostly_a_or_b(given: Reply, kind: str) -> None:
    with pytest.raises(Fault) as caught:
        read_soft(given)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("A", 1.0),
        ("B.", 0.0),
        (" tie ", 0.5),
        ("**A**", 1.0),
        ("Answer: B", 0.0),
        ("Document A", 1.0),
        ("<think>B looks good, but</think>\n\nA", 1.0),
        ("Both are good.\nAnswer: A", 1.0),
    ],
)
def test_votes(text: str, vote: float) -> None:
    assert read_vote(Reply(text)) == vote


@pytest.mark.parametrize(
    "text", ["", "C", "A or B", "AB", "A is better, but B", "Neither", "Both documents discuss A.", "<think>A"]
)
def test_what_is_no_vote(text: str) -> None:
    with pytest.raises(Fault) as caught:
        read_vote(Reply(text))
    assert caught.value.kind == "unparsable"


def test_a_polite_refusal_is_one() -> None:
    for text in ("I'm sorry, but I can't help with that.", "I cannot judge this."):
        with pytest.raises(Fault) as caught:
            read_vote(Reply(text))
        assert caught.value.kind == "refused"


def test_grades() -> None:
    assert read_grade(Reply("7")) == 7
    assert read_grade(Reply("10/10")) == 10
    assert read_grade(Reply("Grade: 6.5")) == 6.5
    assert read_grade(reply({"7": 0.5, "8": 0.25, "x": 0.25})) == pytest.approx((7 * 0.5 + 8 * 0.25) / 0.75)
    # 10 as one token.
    assert read_grade(reply({"10": 0.5, "9": 0.25, "1": 0.25})) == pytest.approx(10 * 0.5 + 9 * 0.25 + 0.25)
    # 10 as two tokens, written: the second tells how often 1 went on to 10.
    assert read_grade(reply({"1": 0.8, "9": 0.2}, {"0": 0.75, "<end>": 0.25})) == pytest.approx(0.8 * 7.75 + 0.2 * 9)
    # Not written: 1 lies near 0, and 10 near 9.
    assert read_grade(reply({"0": 0.75, "1": 0.25})) == pytest.approx(0.25)
    assert read_grade(reply({"9": 0.75, "1": 0.25})) == pytest.approx(9.25)
    for text in ("eleven", "11", "-1", "7 or 8", ""):
        with pytest.raises(Fault):
            read_grade(Reply(text))


def test_orders() -> None:
    assert read_order(Reply("C > A > B"), 3) == (2, 0, 1)
    assert read_order(Reply("Order:\nB, C, A"), 3) == (1, 2, 0)
    for text in ("A > B", "A > B > B", "A > B > C > D", "A is best", "ABC"):
        with pytest.raises(Fault):
            read_order(Reply(text), 3)


def ensemble(*judges: Judge) -> Ensemble:
    return Ensemble(judges, {"q": "query", "r": "other"}.__getitem__, TEXTS.__getitem__)


def test_all_kinds_of_questions_to_a_real_server() -> None:
    with openai_server.running() as server:
        judge = ChatJudge("judge", server.model, Endpoint(server.base_url))
        pair, swapped, grade, order, cross = ensemble(judge).ask([PAIR, SWAPPED, GRADE, LIST, CROSS])
        body = server.stats()["last"]
    p = openai_server.p_first(0.9, 0.3)
    assert (pair.form, pair.value) == (Form.SOFT, pytest.approx(p))
    assert swapped.value == pytest.approx(1 - p)
    # 9 and 10 at one half each; 10 is written as 1 and 0.
    assert (grade.form, grade.value) == (Form.GRADE, pytest.approx(9.0))
    assert (order.form, order.value, order.order) == (Form.ORDER, None, (0, 2, 1))
    assert cross.value == pytest.approx(p)
    assert body["temperature"] == 0
    assert body["stream"] is False


def test_votes_and_grades_without_log_probabilities() -> None:
    with openai_server.running(logprobs=False) as server:
        vote = ChatJudge("vote", server.model, Endpoint(server.base_url), answer_form=Form.VOTE)
        grade = ChatJudge("grade", server.model, Endpoint(server.base_url), answer_form=Form.GRADE)
        judgments = ensemble(vote, grade).ask([PAIR, GRADE])
        assert "logprobs" not in server.stats()["last"]
    assert [(judgment.judge, judgment.form, judgment.value) for judgment in judgments] == [
        ("vote", Form.VOTE, 1.0),
        ("vote", Form.GRADE, 9.0),
        ("grade", Form.GRADE, 9.0),
    ]


def test_a_soft_judge_without_log_probabilities_is_told_what_to_do() -> None:
    with openai_server.running(logprobs=False) as server:
        of = ensemble(ChatJudge("judge", server.model, Endpoint(server.base_url)))
        (judgment,) = of.ask([PAIR])
    assert judgment.status is Status.GAVE_UP
    assert "answer: vote" in of.reasons["judge"]["gave up"]


def test_parameters_reach_the_endpoint_and_none_leaves_one_out() -> None:
    seen: list[Any] = []
    script = Scripted(lambda body: seen.append(body) or Reply("A", top=((("A", -0.01),),)))  # type: ignore[func-returns-value]
    parameters = {"temperature": None, "seed": 7, "max_tokens": None, "max_completion_tokens": 50}
    judge = ChatJudge("judge", "m", script, parameters=parameters)
    ensemble(judge).ask([PAIR])
    assert seen[0]["seed"] == 7
    assert seen[0]["max_completion_tokens"] == 50
    assert not {"temperature", "max_tokens"} & set(seen[0])


def test_what_makes_an_answer_its_own() -> None:
    def judge(**options: object) -> ChatJudge:
        return ChatJudge(**{"name": "judge", "model": "m", "chat": Scripted(lambda _: "A"), **options})

    base = judge().identity(PAIR)
    assert judge().identity(SWAPPED) == base
    others = [
        judge(name="another"),
        judge(model="n"),
        judge(parameters={"temperature": 1}),
        judge(document_tokens=100),
        judge(answer_form=Form.VOTE),
        judge(prompts=Prompts.read("another criterion")),
    ]
    assert all(other.identity(PAIR) != base for other in others)
    assert judge().identity(GRADE).prompt_hash != base.prompt_hash
    # Where and how fast it is asked changes no answer.
    assert judge(concurrency=1, chat=Endpoint("http://127.0.0.1:1/v1")).identity(PAIR) == base


def test_a_teacher_prefers_by_its_logits(tiny_folder: Callable[[str], Path]) -> None:
    with Reranker(tiny_folder("causal_lm")) as reranker:
        logit = {id: document.logit for id, document in zip(TEXTS, _in_order(reranker, "query"), strict=True)}
        other = {id: document.logit for id, document in zip(TEXTS, _in_order(reranker, "other"), strict=True)}
        judge = TeacherJudge("teacher", reranker)
        pair, swapped, grade, order, cross = ensemble(judge).ask([PAIR, SWAPPED, GRADE, LIST, CROSS])
        assert logit_of(pair.value) == pytest.approx(logit["a"] - logit["b"], abs=1e-3)
        assert pair.value == pytest.approx(1 - swapped.value)
        assert logit_of(grade.value / 10) == pytest.approx(logit["a"], abs=1e-3)
        assert [list(TEXTS)[place] for place in order.order] == sorted(TEXTS, key=lambda id: -logit[id])
        assert logit_of(cross.value) == pytest.approx(logit["a"] - other["b"], abs=1e-3)
        sharper = TeacherJudge("teacher", reranker, temperature=1.0)
        assert sharper.identity(PAIR) != judge.identity(PAIR)
        (sharp,) = ensemble(sharper).ask([PAIR])
        assert logit_of(sharp.value) == pytest.approx(5 * (logit["a"] - logit["b"]), abs=5e-3)


def _in_order(reranker: Reranker, query: str) -> list[Any]:
    return sorted(reranker.rank(query, list(TEXTS.values())), key=lambda document: document.index)


def world(queries: int = 20, documents: int = 60) -> dict[str, dict[str, float]]:
    candidates = [Candidate(f"q{q}", f"d{d}", d + 1, 1 / (d + 1)) for q in range(queries) for d in range(documents)]
    qrels = {f"q{q}": {f"d{(7 * q + 5 * g) % documents}": g for g in (1, 2, 3)} for q in range(queries)}
    return truth(candidates, qrels)


@pytest.mark.parametrize("accuracy", [70, 80, 90, 97])
def test_a_simulated_judge_errs_as_often_as_told(accuracy: float) -> None:
    s = world()
    judge = SimulatedJudge("sim", s, accuracy)
    right = total = first = 0
    for query, documents in s.items():
        names = list(documents)
        for i, one in enumerate(names):
            for j, other in enumerate(names[:i]):
                a, b = (one, other) if (i + j) % 2 else (other, one)
                judgment = judge.judge(Question(Kind.COMPARE, (query,), (a, b)))
                right += (judgment.value > 0.5) == (documents[a] > documents[b])
                first += judgment.value > 0.5
                total += 1
    assert right / total == pytest.approx(accuracy / 100, abs=0.015)
    assert 0.5 < first / total < 0.62, "it likes what is shown first, a little"


def test_simulated_answers_depend_on_nothing_but_what_is_asked() -> None:
    s = world(5, 20)
    asked = [Question(Kind.COMPARE, ("q1",), (f"d{i}", f"d{j}")) for i in range(20) for j in range(20) if i != j]
    forward = [SimulatedJudge("sim", s, seed=3).judge(question) for question in asked]
    backward = [SimulatedJudge("sim", s, seed=3).judge(question) for question in reversed(asked)]
    assert forward == backward[::-1]
    assert forward != [SimulatedJudge("sim", s, seed=4).judge(question) for question in asked]
    values = [SimulatedJudge("other", s, seed=3).judge(question).value for question in asked]
    assert [judgment.value for judgment in forward] != values


def test_simulated_is_marked_everywhere() -> None:
    s = world(2, 20)
    for form, question in (
        (Form.SOFT, Question(Kind.COMPARE, ("q0",), ("d1", "d2"))),
        (Form.VOTE, Question(Kind.COMPARE, ("q0",), ("d1", "d2"))),
        (Form.SOFT, Question(Kind.COMPARE, ("q0",), ("d1", "d2", "d3"))),
        (Form.SOFT, Question(Kind.CROSS, ("q0", "q1"), ("d1", "d2"))),
        (Form.GRADE, Question(Kind.GRADE, ("q0",), ("d1",))),
    ):
        judge = SimulatedJudge("sim", s, form=form)
        assert judge.judge(question).simulated
        assert judge.identity(question).simulated
    with pytest.raises(JudgeError, match="knows nothing of document"):
        SimulatedJudge("sim", s).judge(Question(Kind.GRADE, ("q0",), ("d99",)))
    with pytest.raises(JudgeError, match="between 50 and 100"):
        SimulatedJudge("sim", s, accuracy=100)


def test_better_documents_get_better_simulated_grades() -> None:
    s = world()
    judge = SimulatedJudge("sim", s, accuracy=97)
    pairs = [(value, judge.judge(Question(Kind.GRADE, (q,), (d,))).value) for q, docs in s.items() for d, value in docs.items()]
    assert all(0 <= grade <= 10 for _, grade in pairs)
    low = [grade for value, grade in pairs if value < 0.5]
    high = [grade for value, grade in pairs if value > 2.5]
    assert sum(high) / len(high) > sum(low) / len(low) + 4


def test_a_recording_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    judgments = [
        Judgment("x", PAIR, Status.OK, Form.SOFT, 0.8),
        Judgment("x", SWAPPED, Status.REFUSED),
        Judgment("x", LIST, Status.OK, Form.ORDER, None, (2, 0, 1)),
        Judgment("x", GRADE, Status.OK, Form.GRADE, 7.5),
    ]
    assert record(judgments, path) == 4
    replayed = ensemble(ReplayJudge("replay", path)).ask([judgment.question for judgment in judgments])
    assert [(j.status, j.form, j.value, j.order) for j in replayed] == [(j.status, j.form, j.value, j.order) for j in judgments]
    assert not any(judgment.simulated for judgment in replayed)
    with pytest.raises(JudgeError, match="has no answer to cross"):
        ensemble(ReplayJudge("replay", path)).ask([CROSS])
    before = ReplayJudge("replay", path).identity(PAIR)
    record([Judgment("x", PAIR, Status.OK, Form.SOFT, 0.1, simulated=True)], path)
    again = ReplayJudge("replay", path)
    assert again.identity(PAIR) != before
    assert again.identity(PAIR).simulated
    assert ensemble(again).ask([PAIR])[0].simulated


@pytest.mark.parametrize(
    "line",
    [
        "A",
        "[]",
        "{}",
        '{"kind": "compare", "queries": ["q"], "documents": ["a", "b"], "value": 3}',
        '{"kind": "compare", "queries": ["q"], "documents": ["a", "b"]}',
        '{"kind": "compare", "queries": ["q"], "documents": ["a", "b"], "form": "order", "order": [0, 0]}',
    ],
)
def test_a_file_that_is_no_recording(line: str, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(JudgeError, match=r"answers\.jsonl:2 is no recorded answer"):
        ReplayJudge("replay", tmp_path / "answers.jsonl")
