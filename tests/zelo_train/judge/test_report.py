"""What a report and a pilot find in judges that do what they should not."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from zelo_train.errors import CollectionError
from zelo_train.judge import pilot
from zelo_train.judge.ask import Ensemble
from zelo_train.judge.judges import ChatJudge
from zelo_train.judge.report import Share, report
from zelo_train.judge.simulated import SimulatedJudge, truth
from zelo_train.llm import Body, Patience, Reply, Scripted
from zelo_train.records import Candidate, Comparison, Form, Judgment, Kind, Question, Status

DRAW = random.Random(5)
QUERIES = {f"q{q}": f"query {q}" for q in range(12)}
DOCUMENTS = {f"d{d}": f"document {d} " + "word " * DRAW.randrange(5, 60) for d in range(40)}
CANDIDATES = [
    Candidate(query, document, rank, 1 / rank) for query in QUERIES for rank, document in enumerate(DOCUMENTS, start=1)
]
QRELS = {query: {f"d{(11 * q + 7 * g) % 40}": g for g in (1, 2, 3)} for q, query in enumerate(QUERIES)}
TRUTH = truth(CANDIDATES, QRELS)


def ring() -> list[Question]:
    """Each document once first and once second, every query; a tenth of the pairs swapped, a few twice."""
    asked: list[Question] = []
    for query in QUERIES:
        order = sorted(DOCUMENTS, key=lambda document: hashlib.sha256((query + document).encode()).digest())
        pairs = [Comparison(query, a, b) for a, b in zip(order, [*order[1:], order[0]], strict=True)]
        asked += [pair.question for pair in pairs]
        asked += [pair.swapped.question for pair in pairs[::6]]
        asked += [pair.question for pair in pairs[::20]]
    return asked


def letters(choose: Callable[[str], str]) -> Callable[[Body], Reply | str]:
    """A model that answers by a rule about what it is shown."""
    return lambda body: choose(body["messages"][1]["content"])


def longer(shown: str) -> str:
    a, b = (part.split("\n")[1] for part in shown.split("[[DOCUMENT ")[1:])
    return "A" if len(a) > len(b) else "B"


def coin(shown: str) -> str:
    return "AB"[hashlib.sha256(shown.encode()).digest()[0] % 2]


def steady_coin(shown: str) -> str:
    """Random, but the same document in both orders."""
    a, b = (part.split("\n")[1] for part in shown.split("[[DOCUMENT ")[1:])
    first = hashlib.sha256("".join(sorted((a, b))).encode()).digest()[0] % 2
    return "AB"[first ^ (a < b)]


def scripted(name: str, choose: Callable[[str], str]) -> ChatJudge:
    return ChatJudge(name, "m", Scripted(letters(choose)), answer_form=Form.VOTE, patience=Patience(first_wait=0.001))


BAD: Mapping[str, tuple[Callable[[str], str], str]] = {
    "always first": (lambda _: "A", "prefers the first document always"),
    "always second": (lambda _: "B", "prefers the second document always"),
    "longer": (longer, "prefers the longer document always"),
    "coin": (coin, "answers at random"),
    "steady coin": (steady_coin, "answers at random"),
}


def ask(*judges: Any, questions: list[Question]) -> list[Judgment]:  # noqa: ANN401 - any judge
    return Ensemble(judges, QUERIES.__getitem__, DOCUMENTS.__getitem__).ask(questions)


def length(document: str) -> int:
    return len(DOCUMENTS[document])


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("alone", [True, False])
def test_a_judge_that_does_not_judge_is_found_and_named(name: str, alone: bool) -> None:
    choose, said = BAD[name]
    others = [] if alone else [SimulatedJudge("good", TRUTH, 80), SimulatedJudge("better", TRUTH, 90)]
    found = report(ask(scripted(name, choose), *others, questions=ring()), length)
    assert any(said in fault for fault in found[name].faults), found[name]
    assert f"! {name} {said}" in str(found)
    assert all(found[judge.name].faults == () for judge in others)


@pytest.mark.parametrize("accuracy", [70, 80, 90, 97])
def test_an_honest_judge_is_not(accuracy: float) -> None:
    for seed in range(5):
        alone = report(ask(SimulatedJudge("honest", TRUTH, accuracy, seed), questions=ring()), length)
        assert alone["honest"].faults == (), alone["honest"]
        assert alone["honest"].repeats.share == 0


def test_the_figures() -> None:
    def judgment(judge: str, first: str, second: str, p: float | None, status: Status = Status.OK) -> Judgment:
        form = None if p is None else Form.SOFT
        return Judgment(judge, Question(Kind.COMPARE, ("q",), (first, second)), status, form, p, tokens_in=10, cost=3)

    found = report(
        [
            judgment("one", "a", "b", 0.9),
            judgment("one", "b", "a", 0.8),  # follows the place
            judgment("one", "c", "a", 0.2),
            judgment("one", "a", "c", 0.7),  # follows the document
            judgment("one", "a", "c", 0.4),  # asked again, another answer
            judgment("one", "d", "a", None, Status.REFUSED),
            judgment("two", "a", "b", 0.6),
            judgment("two", "c", "a", 0.9),
        ],
        {"a": 1, "b": 2, "c": 3, "d": 4}.__getitem__,
        cut={"one": 2},
    )
    one = found["one"]
    assert one.statuses == {Status.OK: 5, Status.REFUSED: 1}
    assert (one.tokens_in, one.cost, one.cut) == (60, 18, 2)
    assert one.position == Share(3, 4)
    assert one.flips == Share(1, 2)
    assert one.repeats == Share(1, 1)
    # b over a once; a over b, and a over c twice, are the shorter.
    assert one.longer == Share(1, 4)
    assert one.refused == Share(1, 6)
    assert one.others.of == 4
    assert not found.simulated


def test_refusals_are_named() -> None:
    def choose(shown: str) -> str:
        return "I'm sorry, I can't help with that." if coin(shown) == "A" else longer(shown)

    found = report(ask(scripted("shy", choose), questions=ring()))
    assert any("no answer that can be read" in fault for fault in found["shy"].faults)
    assert found["shy"].statuses[Status.REFUSED] > 50


def test_simulated_is_the_first_line() -> None:
    found = report(ask(SimulatedJudge("sim", TRUTH), questions=ring()[:30]))
    assert found.lines()[0].startswith("SIMULATED")
    assert "SIMULATED" not in str(report(ask(scripted("real", longer), questions=ring()[:30])))


def test_an_order_of_many_says_something_about_places() -> None:
    question = Question(Kind.COMPARE, ("q0",), ("d0", "d1", "d2"))
    found = report([Judgment("list", question, Status.OK, Form.ORDER, None, (2, 0, 1))])
    # d0 before d1, d2 before d1.
    assert found["list"].position == Share(1, 2)


# The pilot


def known() -> list[pilot.Known]:
    return pilot.from_qrels({query: list(DOCUMENTS) for query in QUERIES}, QRELS, count=150)


def test_known_pairs_come_from_all_queries_and_are_the_same_again() -> None:
    pairs = known()
    assert len(set(pairs)) == 150
    assert {pair.query for pair in pairs} == set(QUERIES)
    assert all(QRELS[pair.query][pair.better] > QRELS[pair.query].get(pair.worse, 0) for pair in pairs)
    assert known() == pairs
    with pytest.raises(CollectionError, match="at least 100"):
        pilot.from_qrels({"q0": list(DOCUMENTS)}, {"q0": {"d0": 1}})


@pytest.mark.parametrize(
    ("name", "choose", "advice", "why"),
    [
        ("first", lambda _: "A", "stop", "first document always"),
        ("longer", longer, "stop", "longer document always"),
        ("coin", coin, "stop", "a coin gives .5"),
        ("steady", steady_coin, "stop", "a coin gives .5"),
    ],
)
def test_a_pilot_stops_what_does_not_judge(name: str, choose: Callable[[str], str], advice: str, why: str) -> None:
    pairs = known()
    found = pilot.pilot(pairs, ask(scripted(name, choose), questions=pilot.questions(pairs)), length)
    (verdict,) = found.verdicts
    assert (verdict.advice, found.advice) == (advice, advice)
    assert why in verdict.why
    assert abs(verdict.agreement.share - 0.5) < 0.2


def test_a_pilot_lets_a_good_judge_proceed() -> None:
    pairs = known()
    found = pilot.pilot(pairs, ask(SimulatedJudge("good", TRUTH, 90), questions=pilot.questions(pairs)), length)
    (verdict,) = found.verdicts
    assert verdict.advice == "proceed"
    assert verdict.agreement.of == 300
    low, high = verdict.agreement.interval
    assert low < verdict.agreement.share < high
    assert found.lines()[0].startswith("SIMULATED")
    assert found.lines()[-1] == "advice: proceed"


def test_a_pilot_wants_another_prompt_for_refusals_and_the_worst_judge_decides() -> None:
    pairs = known()
    better = {(pair.query, pair.better) for pair in pairs}

    def choose(shown: str) -> str:
        if hashlib.sha256(shown.encode()).digest()[1] < 60:
            return "Well, that depends."
        query = "q" + shown.split("[[QUERY ")[1].split("\n")[1].removeprefix("query ")
        a = "d" + shown.split("[[DOCUMENT A ")[1].split("\n")[1].split(" ")[1]
        return "A" if (query, a) in better else "B"

    judgments = ask(scripted("evasive", choose), SimulatedJudge("good", TRUTH, 90), questions=pilot.questions(pairs))
    found = pilot.pilot(pairs, judgments)
    assert [verdict.advice for verdict in found.verdicts] == ["change the prompt", "proceed"]
    assert found.advice == "change the prompt"


def test_a_person_s_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    pairs = [Comparison(pair.query, *sorted((pair.better, pair.worse))) for pair in known()]
    documents = {**DOCUMENTS, "d0": "=HYPERLINK('x')"}
    assert pilot.write_sheet(pairs, path, QUERIES.__getitem__, documents.__getitem__) == 150
    assert not path.read_text(encoding="utf-8-sig").count(",=")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with pytest.raises(CollectionError, match="there are 0 preferences"):
        pilot.from_sheet(path)
    better = {(pair.query, pair.better) for pair in known()}
    for row, answer in zip(rows, ["tie", "", *["x"] * 148], strict=True):
        left = (row["query"], row["left"]) in better and (row["query"], row["right"]) not in better
        row["preferred"] = answer if answer != "x" else "Left " if left else "b"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    read = pilot.from_sheet(path)
    assert len(read) == 148
    rows[3]["preferred"] = "dunno"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(CollectionError, match="expected left, right, tie"):
        pilot.from_sheet(path)
    path.write_text("query,better\n")
    with pytest.raises(CollectionError, match="no column left, preferred, right"):
        pilot.from_sheet(path)
