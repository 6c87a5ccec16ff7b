"""The asking loop: every question to every judge of an ensemble, once, whatever happens.

An answer is committed by itself the moment it is there, and what is committed is never asked again; so a run that was stopped,
by Ctrl-C, the cap, a power cut or `kill -9`, goes on where it was when the same command is run again.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tqdm.std import tqdm

from zelo_train.cost import Estimate, estimate, money
from zelo_train.errors import CapReached, JudgeError
from zelo_train.interrupt import run
from zelo_train.judge.judges import Asked, ChatJudge, Judge
from zelo_train.llm import Free, Purse
from zelo_train.records import Judgment, Question, Status
from zelo_train.store import JudgeIdentity, Texts

# Questions looked at to know how long they are.
SAMPLE = 500
# Seconds that answers under way get when a run is stopped.
GRACE = 10.0
# Tries for which money is taken out of the purse at once.
BLOCK = 32
# Answers after which a judge that never waits lets others run.
TURN = 32


class Place(Protocol):
    """Where answers are kept: the workspace's store."""

    def find(self, judge: JudgeIdentity, questions: Iterable[Question], texts: Texts) -> dict[Question, Judgment]:
        """What is known of these questions, failures included."""
        ...

    def put(self, judge: JudgeIdentity, judgment: Judgment, texts: Texts, *, run: str = "", raw: bytes | None = None) -> None:
        """Keep one judgment, in one commit."""
        ...


@dataclass
class Memory:
    """A place that lasts as long as the process; for tests and trials."""

    judgments: dict[bytes, Judgment] = field(default_factory=dict)

    def find(self, judge: JudgeIdentity, questions: Iterable[Question], texts: Texts) -> dict[Question, Judgment]:
        """What is known of these questions."""
        keys = {question: texts.key(judge, question) for question in questions}
        return {question: self.judgments[key] for question, key in keys.items() if key in self.judgments}

    def put(self, judge: JudgeIdentity, judgment: Judgment, texts: Texts, *, run: str = "", raw: bytes | None = None) -> None:
        """Keep one judgment."""
        self.judgments[texts.key(judge, judgment.question)] = judgment


class Pocket:
    """Takes money out of a purse for many tries at once: two commits for `BLOCK` tries, not for each.

    What is taken out counts as reserved until every try of the block is settled, so the cap holds as before; a process that
    dies leaves some more behind that stays counted.
    """

    def __init__(self, purse: Purse, block: int = BLOCK) -> None:
        self.purse = purse
        self.block = block
        self._tickets: dict[int, _Block] = {}
        self._current: dict[str, _Block] = {}
        self._last = 0

    def reserve(self, judge: str, millionths: int) -> int:
        """As the purse's own; a block that the cap does not allow is tried again as a single try."""
        if not millionths:
            return 0
        block = self._current.get(judge)
        if block is None or block.left < millionths:
            if block is not None:
                del self._current[judge]
                self._close(block)
            try:
                amount = self.block * millionths
                block = _Block(self.purse.reserve(judge, amount), amount)
                self._current[judge] = block
            except CapReached:
                block = _Block(self.purse.reserve(judge, millionths), millionths)
        block.left -= millionths
        block.open += 1
        self._last += 1
        self._tickets[self._last] = block
        return self._last

    def settle(self, ticket: int, millionths: int) -> None:
        """As the purse's own."""
        if ticket:
            block = self._tickets.pop(ticket)
            block.open -= 1
            block.spent += millionths
            if block not in self._current.values():
                self._close(block)

    def empty(self) -> None:
        """Put back what was not used."""
        for judge in list(self._current):
            self._close(self._current.pop(judge))

    def _close(self, block: _Block) -> None:
        if not block.open:
            self.purse.settle(block.ticket, block.spent)


@dataclass(slots=True, eq=False)
class _Block:
    ticket: int
    left: int
    open: int = 0
    spent: int = 0


@dataclass(frozen=True, slots=True)
class Departure:
    """Texts that would leave this machine, to be confirmed before the first does.

    Attributes:
        host: where they would go.
        judges: who would read them there.
        questions: how many.
        bytes: of prompts, about.
        cost: in millionths, about.
        capped: millionths that will not be passed; None without a cap.
    """

    host: str
    judges: tuple[str, ...]
    questions: int
    bytes: int
    cost: int
    capped: int | None = None

    def line(self, currency: str = "") -> str:
        """For people."""
        size = f"{self.bytes / 1e6:,.1f} MB" if self.bytes >= 1e5 else f"{self.bytes / 1e3:,.1f} kB"
        cap = "no cap" if self.capped is None else f"at most {money(self.capped, currency)}"
        return (
            f"{self.host}: {self.questions:,} questions of {', '.join(self.judges)}, {size} of your texts, "
            f"about {money(self.cost, currency)} ({cap})"
        )


# What is asked: the same of every judge, or each judge's own.
Questions = Sequence[Question] | Mapping[str, Sequence[Question]]


class Ensemble:
    """Judges, the texts they read, and where their answers go.

    Args:
        judges: any number; names differ.
        query_text: from a query's id to its text.
        document_text: from a document's id to the text that is judged.
        place: where answers are kept.
        purse: where money is counted; without one nothing is.
        run: the run's name, kept with each answer.
        keep_raw: hand whole replies to the place as well.
        again: failures that are asked once more; by default every failure is final.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        query_text: Callable[[str], str],
        document_text: Callable[[str], str],
        place: Place | None = None,
        purse: Purse | None = None,
        *,
        run: str = "",
        keep_raw: bool = False,
        again: Collection[Status] = (),
    ) -> None:
        names = [judge.name for judge in judges]
        if not names or len(set(names)) < len(names):
            msg = f"the judges are {names}; expected at least one, each with a name of its own"
            raise JudgeError(msg)
        self.judges = tuple(judges)
        self.place = place or Memory()
        self.purse = purse or Free()
        self.texts = Texts(query_text, document_text)
        self.run = run
        self.keep_raw = keep_raw
        self.again = frozenset(again)
        # Documents that were cut, by judge, and an example for each kind of failure: for the report.
        self.cut: Counter[str] = Counter()
        self.reasons: dict[str, dict[str, str]] = {judge.name: {} for judge in judges}
        self._query_text, self._document_text = query_text, document_text

    # Before

    def asked(self, question: Question) -> Asked:
        """A question with its texts."""
        return Asked(
            question, tuple(map(self._query_text, question.queries)), tuple(map(self._document_text, question.documents))
        )

    def identity(self, judge: Judge, question: Question, turn: int = 0) -> JudgeIdentity:
        """Whose answer it is; the second time a question is asked on purpose is an answer of its own."""
        identity = judge.identity(question)
        return replace(identity, parameters={**identity.parameters, "repeat": turn}) if turn else identity

    def _known(self, judge: Judge, questions: Questions) -> list[tuple[Question, JudgeIdentity, Judgment | None]]:
        """A judge's questions with its answers, in order. A question that is listed twice is asked twice."""
        of_judge = questions.get(judge.name, ()) if isinstance(questions, Mapping) else questions
        turns: Counter[Question] = Counter()
        identities: dict[tuple[int, int], JudgeIdentity] = {}
        listed: list[tuple[Question, JudgeIdentity]] = []
        for question in of_judge:
            if judge.takes(question):
                own = judge.identity(question)
                at = (id(own), turns[question])
                if at not in identities:
                    identities[at] = self.identity(judge, question, turns[question])
                listed.append((question, identities[at]))
                turns[question] += 1
        by_identity: dict[int, list[Question]] = {}
        for question, identity in listed:
            by_identity.setdefault(id(identity), []).append(question)
        found = {
            id(identity): self.place.find(identity, by_identity[id(identity)], self.texts)
            for identity in identities.values()
            if id(identity) in by_identity
        }
        return [(question, identity, found[id(identity)].get(question)) for question, identity in listed]

    def _open(self, judge: Judge, questions: Questions) -> list[tuple[Question, JudgeIdentity]]:
        return [
            (question, identity) for question, identity, judgment in self._known(judge, questions) if self._is_open(judgment)
        ]

    def unanswered(self, judge: Judge, questions: Sequence[Question]) -> list[Question]:
        """What a judge has not answered yet."""
        return [question for question, _ in self._open(judge, questions)]

    def _is_open(self, judgment: Judgment | None) -> bool:
        return judgment is None or judgment.status in self.again

    def known(self, questions: Questions) -> Iterator[Judgment]:
        """What judges have answered already, failures included, judge after judge in the order of the questions."""
        for judge in self.judges:
            for _, _, judgment in self._known(judge, questions):
                if judgment is not None:
                    yield judgment

    def estimates(self, questions: Questions, latency: float = 1.0) -> list[Estimate]:
        """Calls, tokens, money and time of what is not answered yet, by judge. `cost.table` writes them out."""
        return [self._estimate(judge, self._open(judge, questions), latency)[0] for judge in self.judges]

    def _estimate(
        self, judge: Judge, todo: Sequence[tuple[Question, JudgeIdentity]], latency: float = 1.0
    ) -> tuple[Estimate, int]:
        """And the bytes of its prompts."""
        some = todo[:: max(1, len(todo) // SAMPLE)]
        likely = [judge.likely(self.asked(question)) for question, _ in some]
        count = max(1, len(likely))
        tokens_in, tokens_out = sum(one.tokens_in for one in likely) / count, sum(one.tokens_out for one in likely) / count
        size = round(len(todo) * sum(one.bytes_out for one in likely) / count)
        return estimate(judge.name, len(todo), tokens_in, tokens_out, judge.price, judge.in_flight, latency), size

    def departures(self, questions: Questions, cap: int | None = None) -> list[Departure]:
        """What would leave this machine, by host; empty when nothing would. A loopback host is this machine.

        Args:
            questions: as for `ask`; what is answered already does not leave again.
            cap: millionths that may still be spent.
        """
        by_host: dict[str, Departure] = {}
        for judge in self.judges:
            todo = self._open(judge, questions) if judge.host else ()
            if todo:
                cost, size = self._estimate(judge, todo)
                so_far = by_host.get(judge.host, Departure(judge.host, (), 0, 0, 0, cap))
                by_host[judge.host] = replace(
                    so_far,
                    judges=(*so_far.judges, judge.name),
                    questions=so_far.questions + len(todo),
                    bytes=so_far.bytes + size,
                    cost=so_far.cost + cost.cost,
                )
        return list(by_host.values())

    # During

    def ask(self, questions: Questions, *, confirmed: Collection[str] = (), progress: bool = False) -> list[Judgment]:
        """Ask every judge what it has not answered yet.

        Ctrl-C lets the answers under way come in, for up to ten seconds; a second one does not. All that was answered is kept.

        Args:
            questions: the same for every judge, or by judge's name. A question listed twice is asked twice, as an audit.
            confirmed: hosts that texts may be sent to.
            progress: a bar on standard error, with money and the time that remains.

        Returns:
            Every judge's judgments in the order of its questions, the stored ones included. One Judgment may be a failure.

        Raises:
            JudgeError: a host was not confirmed; or a judge stopped (the others were asked to the end).
            CapReached: the next question could exceed the cap.
            KeyboardInterrupt: after Ctrl-C.
        """
        asking = self._asking(questions, confirmed, progress=progress)
        return run(asking.judgments(), asking.interrupt)

    async def aask(self, questions: Questions, *, confirmed: Collection[str] = (), progress: bool = False) -> list[Judgment]:
        """`ask` in a running event loop, whose owner sees to Ctrl-C."""
        return await self._asking(questions, confirmed, progress=progress).judgments()

    def _asking(self, questions: Questions, confirmed: Collection[str], *, progress: bool) -> _Asking:
        known = {judge.name: self._known(judge, questions) for judge in self.judges}
        todo = {
            name: [(question, identity) for question, identity, judgment in rows if self._is_open(judgment)]
            for name, rows in known.items()
        }
        unconfirmed = {judge.host for judge in self.judges if judge.host and todo[judge.name]} - set(confirmed)
        if unconfirmed:
            msg = (
                f"texts would go to {', '.join(sorted(unconfirmed))}, which was not confirmed; expected a yes to "
                "what `departures` names: confirm the host, or use --yes in scripts"
            )
            raise JudgeError(msg)
        return _Asking(self, known, todo, progress)


@dataclass
class _Asking:
    """One call of `ask`."""

    ensemble: Ensemble
    known: Mapping[str, Sequence[tuple[Question, JudgeIdentity, Judgment | None]]]
    todo: Mapping[str, Sequence[tuple[Question, JudgeIdentity]]]
    progress: bool

    def __post_init__(self) -> None:
        self.purse = Pocket(self.ensemble.purse)
        self.bar = tqdm(
            total=sum(map(len, self.todo.values())),
            unit="answer",
            disable=None if self.progress else True,
            file=sys.stderr,
            smoothing=0.05,
        )
        self.given: dict[str, list[Judgment]] = {judge.name: [] for judge in self.ensemble.judges}
        self.failed = 0
        self.spent = 0
        self.stopping = False
        self.interrupted = False
        self.workers: set[asyncio.Task[None]] = set()

    async def judgments(self) -> list[Judgment]:
        """Every judge's judgments in the order of its questions; fewer after an interrupt."""
        ensemble = self.ensemble
        try:
            with self.bar:
                stopped = await asyncio.gather(*(self.ask(judge, self.todo[judge.name]) for judge in ensemble.judges))
        finally:
            self.purse.empty()
            for judge in ensemble.judges:
                await judge.aclose()
        errors = [error for error in stopped if error is not None]
        if errors:
            capped = next((error for error in errors if isinstance(error, CapReached)), None)
            raise capped or (errors[0] if len(errors) == 1 else JudgeError("\n".join(map(str, errors))))
        answers = {name: iter(given) for name, given in self.given.items()}
        listed = [
            next(answers[name], None) if judgment is None or ensemble._is_open(judgment) else judgment
            for name, rows in self.known.items()
            for _, _, judgment in rows
        ]
        return [judgment for judgment in listed if judgment is not None]

    def interrupt(self) -> None:
        """Ctrl-C: the first lets what is under way come in, the second does not."""
        if self.interrupted:
            self.cancel()
        else:
            self.interrupted = self.stopping = True
            asyncio.get_running_loop().call_later(GRACE, self.cancel)

    def cancel(self) -> None:
        for worker in self.workers:
            worker.cancel()

    async def ask(self, judge: Judge, todo: Sequence[tuple[Question, JudgeIdentity]]) -> JudgeError | CapReached | None:
        """Ask one judge everything. Returns why it stopped early, if it did."""
        line = _Line(self, judge, todo)
        workers = {asyncio.create_task(line.work()) for _ in range(min(judge.in_flight, len(todo)))}
        self.workers |= workers
        try:
            while workers:
                limit = GRACE if line.stopped is not None else None
                done, workers = await asyncio.wait(workers, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    if not worker.cancelled():
                        worker.result()
                if line.stopped is not None and not done:
                    # What waits for its next try waits in vain.
                    break
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        line.close()
        self.given[judge.name] = [line.answers[place] for place in sorted(line.answers)]
        return line.stopped


class _Line:
    """One judge's questions, handed out one after another to its workers."""

    def __init__(self, asking: _Asking, judge: Judge, todo: Sequence[tuple[Question, JudgeIdentity]]) -> None:
        self.asking = asking
        self.judge = judge
        self.todo: Iterator[tuple[int, tuple[Question, JudgeIdentity]]] = iter(enumerate(todo))
        self.stopped: JudgeError | CapReached | None = None
        self.answers: dict[int, Judgment] = {}
        self.held: list[tuple[JudgeIdentity, Judgment]] = []

    async def work(self) -> None:
        ensemble, asking = self.asking.ensemble, self.asking
        for place, (question, identity) in self.todo:
            if asking.stopping or self.stopped is not None:
                return
            asked = ensemble.asked(question)
            try:
                answer = await self.judge.answer(asked, asking.purse)
            except CapReached as error:
                # There is one purse: nobody goes on.
                self.stopped = self.stopped or error
                asking.stopping = True
                return
            except JudgeError as error:
                self.stopped = self.stopped or error
                return
            judgment = answer.judgment
            self.answers[place] = judgment
            if not judgment.answered:
                ensemble.reasons[self.judge.name][judgment.status.value] = answer.reason
            if judgment.status is Status.GAVE_UP:
                # Whether the question or the endpoint is to blame shows with the next answer: if the circuit breaker opens
                # instead, this question was never really asked, and will be.
                self.held.append((identity, judgment))
            else:
                self.put(identity, judgment, answer.raw)
                self.release()
            if isinstance(self.judge, ChatJudge):
                ensemble.cut[self.judge.name] += self.judge.cuts(asked)
            if len(self.answers) % TURN == 0:
                await asyncio.sleep(0)

    def put(self, identity: JudgeIdentity, judgment: Judgment, raw: bytes | None) -> None:
        ensemble, asking = self.asking.ensemble, self.asking
        ensemble.place.put(identity, judgment, ensemble.texts, run=ensemble.run, raw=raw if ensemble.keep_raw else None)
        asking.spent += judgment.cost
        asking.failed += not judgment.answered
        if asking.progress:
            asking.bar.set_postfix_str(f"{money(asking.spent)} spent, {asking.failed} without answer", refresh=False)
        asking.bar.update()

    def release(self) -> None:
        """Keep the failures that were held back: the endpoint has answered since."""
        for identity, judgment in self.held:
            self.put(identity, judgment, None)
        self.held.clear()

    def close(self) -> None:
        if not isinstance(self.stopped, JudgeError):
            self.release()
