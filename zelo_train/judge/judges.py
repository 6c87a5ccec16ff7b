"""Who judges: endpoints of large models, local rerankers as teachers, recorded answers.

A judge is anything with the methods of `Judge`; the simulated one lives in `simulated`.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zelo_train.cost import Price
from zelo_train.errors import JudgeError, MissingPackage
from zelo_train.judge.prompt import LETTERS, Prompts, is_cut, shown
from zelo_train.llm import Chat, Client, Endpoint, Fault, Gate, Patience, Purse, Reply, likely_tokens, most_tokens
from zelo_train.records import Form, Judgment, Kind, Question, Status
from zelo_train.store import JudgeIdentity, digest

if TYPE_CHECKING:
    from zerank_integrations.reranker import Reranker

# Of the mass of all tokens, A and B must have this much: below it the model was about to say something else.
LEAST_MASS = 0.5
TOP_LOGPROBS = 20
# The answer may come after a token or two of white space or quotation marks.
ANSWER_WITHIN = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its texts, in the order shown."""

    question: Question
    queries: tuple[str, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A judgment and, where there is one, the whole reply it was read from."""

    judgment: Judgment
    raw: bytes | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Likely:
    """What one question will likely take."""

    tokens_in: int = 0
    tokens_out: int = 0
    bytes_out: int = 0


class Judge(Protocol):
    """Whoever answers questions."""

    @property
    def name(self) -> str:
        """As in zelo.yaml."""
        ...

    @property
    def in_flight(self) -> int:
        """How many questions it may be asked at once."""
        ...

    @property
    def host(self) -> str:
        """Where texts go; empty when they stay on this machine."""
        ...

    @property
    def price(self) -> Price:
        """Of its tokens."""
        ...

    def takes(self, question: Question) -> bool:
        """Whether it can answer such a question."""
        ...

    def identity(self, question: Question) -> JudgeIdentity:
        """All that makes its answers to such a question its own."""
        ...

    def likely(self, asked: Asked) -> Likely:
        """What the question will likely take."""
        ...

    async def answer(self, asked: Asked, purse: Purse) -> Answer:
        """Its final word. Raises JudgeError when it cannot be asked at all, CapReached when the money does not allow it."""
        ...

    async def aclose(self) -> None:
        """Let go of connections; it may be asked again later."""
        ...


# Reading replies

_Read = tuple[Form, float | None, tuple[int, ...]]

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_DECLINED = re.compile(
    r"\b(I['\u2019]m sorry|I am sorry|I cannot|I can['\u2019]t|unable to (?:help|assist)|as an AI)\b", re.IGNORECASE
)
_EDGES = " \t\n\r\"'`*_.,:;()[]{}<>"


def read_soft(reply: Reply) -> float:
    """P(A) from the mass of A and B at the first token that is one of them.

    Raises:
        Fault: no log-probabilities ("rejected": the endpoint cannot be a soft judge); less than half of the mass on A and B
            ("refused").
    """
    mass = _mass(reply, {"A", "B"})
    first, second = mass.get("A", 0.0), mass.get("B", 0.0)
    if first + second < LEAST_MASS:
        raise Fault("refused", f"only {first + second:.2f} of the mass on A and B; it began with {reply.text[:40]!r}")
    return first / (first + second)


def _mass(reply: Reply, words: set[str]) -> dict[str, float]:
    """The probability of each word at the token where they have most of it, among the first few."""
    _declined(reply, parsed=False)
    if not reply.top:
        msg = "the endpoint gives no log-probabilities; expected them for a soft answer: choose `answer: vote` for this judge"
        raise Fault("rejected", msg)
    best: dict[str, float] = {}
    for at in reply.top[:ANSWER_WITHIN]:
        mass: dict[str, float] = {}
        for token, logprob in at:
            word = token.strip(_EDGES)
            if word in words:
                mass[word] = mass.get(word, 0.0) + math.exp(min(0.0, logprob))
        if sum(mass.values()) > sum(best.values()):
            best = mass
        if sum(best.values()) >= LEAST_MASS:
            break
    return best


def read_vote(reply: Reply) -> float:
    """1 for A, 0 for B, .5 for a tie; from the text alone.

    Raises:
        Fault: "refused" or "unparsable".
    """
    word = _last_word(reply).upper()
    votes = {"A": 1.0, "B": 0.0, "TIE": 0.5}
    if word not in votes:
        _declined(reply, parsed=False)
        raise Fault("unparsable", f"expected A, B or TIE, found {reply.text[:60]!r}")
    return votes[word]


def read_grade(reply: Reply) -> float:
    """The expected grade where there are log-probabilities, else the grade that is written.

    A tokenizer may write 10 as two tokens, and then the token 1 begins 1 or 10. Where 1 was written, the next token tells;
    where it was only likely, it counts as whichever lies nearer to the other grades.

    Raises:
        Fault: "refused" or "unparsable".
    """
    word = _last_word(reply).removesuffix("/10").strip()
    if not re.fullmatch(r"10(\.0+)?|[0-9](\.[0-9]+)?", word):
        _declined(reply, parsed=False)
        raise Fault("unparsable", f"expected a number from 0 to 10, found {reply.text[:60]!r}")
    written = float(word)
    if not reply.top or written != int(written):
        return written
    digits = {str(grade) for grade in range(11)}
    mass = _mass(reply, digits)
    total = sum(mass.values())
    if total < LEAST_MASS:
        raise Fault("refused", f"only {total:.2f} of the mass on grades; it began with {reply.text[:40]!r}")
    if "10" not in mass and "1" in mass:
        one = mass.pop("1")
        share = _share_of_ten(reply, one, mass)
        mass["1"], mass["10"] = one * (1 - share), one * share
    return sum(int(grade) * p for grade, p in mass.items()) / total


def _share_of_ten(reply: Reply, one: float, others: Mapping[str, float]) -> float:
    """How much of the mass of the token 1 meant 10."""
    if reply.text.startswith("1"):
        following = next((i + 1 for i, at in enumerate(reply.top) if at and at[0][0].strip(_EDGES) == "1"), len(reply.top))
        if following < len(reply.top):
            ten = sum(math.exp(min(0.0, logprob)) for token, logprob in reply.top[following] if token.strip() == "0")
            return min(1.0, ten)
        return 0.0
    rest = sum(others.values())
    if not rest:
        return 0.0
    mean = sum(int(grade) * p for grade, p in others.items()) / rest
    return float(abs(mean - 10) < abs(mean - 1))


def read_order(reply: Reply, count: int) -> tuple[int, ...]:
    """Places from best to worst, from letters such as "B > A > C".

    Raises:
        Fault: "refused", or "unparsable" unless every letter occurs exactly once.
    """
    line = (_THOUGHT.sub("", reply.text).strip().splitlines() or [""])[-1]
    found = re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", line)
    if sorted(found) != list(LETTERS[:count]):
        _declined(reply, parsed=False)
        raise Fault("unparsable", f"expected the letters {LETTERS[:count]} once each, found {reply.text[:60]!r}")
    return tuple(LETTERS.index(letter) for letter in found)


def _last_word(reply: Reply) -> str:
    """What is left of a reply without its thoughts, when that is one short line, perhaps after "Answer:"."""
    _declined(reply, parsed=True)
    text = _THOUGHT.sub("", reply.text).strip()
    line = (text.splitlines() or [""])[-1].strip(_EDGES)
    return re.sub(r"^(?:answer|grade|document|pair)\W+", "", line, flags=re.IGNORECASE).strip(_EDGES)


def _declined(reply: Reply, *, parsed: bool) -> None:
    """Raise when the judge would not judge."""
    if reply.refusal or reply.finish == "content_filter":
        raise Fault("refused", (reply.refusal or "stopped by a content filter")[:120])
    if not parsed and _DECLINED.search(reply.text):
        raise Fault("refused", reply.text[:120])


# Endpoints


@dataclass
class ChatJudge:
    """A large model behind an OpenAI-compatible endpoint, or behind what stands in for one.

    Attributes:
        name: as in zelo.yaml.
        model: what the endpoint calls it.
        chat: who answers; its connections are closed by `aclose`.
        answer_form: SOFT reads log-probabilities, VOTE the text, GRADE makes it answer grades only.
        prompts: what it reads.
        parameters: passed on with every request and part of what makes an answer its own; one that is None is left out of it.
        document_tokens: of each document it reads, at four characters a token.
        max_tokens: a vote may have; reasoning models need thousands.
        price: of its tokens.
        concurrency: questions under way at once, at most.
        per_minute: requests a minute, at most.
        patience: with its endpoint.
    """

    name: str
    model: str
    chat: Chat
    answer_form: Form = Form.SOFT
    prompts: Prompts = field(default_factory=Prompts.read)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    document_tokens: int = 512
    max_tokens: int = 16
    price: Price = field(default_factory=Price)
    concurrency: int = 32
    per_minute: float | None = None
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        if self.answer_form is Form.ORDER:
            msg = (
                f"judge {self.name!r} answers 'order'; expected soft, vote or grade: lists are asked by showing more documents"
            )
            raise JudgeError(msg)
        self.client = Client(self.chat, self._gate(), self.price)
        self._identities: dict[tuple[Kind, int], JudgeIdentity] = {}

    def _gate(self) -> Gate:
        return Gate(self.name, self.concurrency, self.per_minute, self.patience)

    @property
    def in_flight(self) -> int:
        """How many questions it may be asked at once."""
        return self.concurrency

    @property
    def host(self) -> str:
        """Where texts go; empty when they stay on this machine."""
        return self.chat.host if isinstance(self.chat, Endpoint) and not self.chat.local else ""

    @property
    def soft(self) -> bool:
        """Whether log-probabilities are read."""
        return self.answer_form is Form.SOFT

    def takes(self, question: Question) -> bool:
        """Grades only, for a judge that answers in grades; at most 26 documents."""
        if self.answer_form is Form.GRADE:
            return question.kind is Kind.GRADE
        return len(question.documents) <= len(LETTERS)

    def identity(self, question: Question) -> JudgeIdentity:
        """Name, model, parameters and the prompt of this kind of question, filled with the criterion."""
        kind = (question.kind, min(3, len(question.documents)))
        if kind not in self._identities:
            prompt = self.prompts.of(question, vote=not self.soft)
            self._identities[kind] = JudgeIdentity(
                self.name,
                self.model,
                {
                    "answer": self.answer_form.value,
                    "document_tokens": self.document_tokens,
                    "max_tokens": self.max_tokens,
                    **self.parameters,
                },
                prompt.version,
                prompt.hash_with(self.prompts.criterion),
            )
        return self._identities[kind]

    def body(self, asked: Asked) -> dict[str, Any]:
        """The chat-completions request of a question."""
        question = asked.question
        prompt = self.prompts.of(question, vote=not self.soft)
        queries = [shown(text) for text in asked.queries]
        documents = [shown(text, self.document_tokens) for text in asked.documents]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": prompt.messages(question.kind, queries, documents, self.prompts.criterion),
            "temperature": 0,
            "max_tokens": self._most_out(question),
        }
        if self._reads_logprobs(question):
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        body |= self.parameters
        return {name: value for name, value in body.items() if value is not None}

    def _reads_logprobs(self, question: Question) -> bool:
        return self.soft and not (question.kind is Kind.COMPARE and len(question.documents) > 2)

    def _most_out(self, question: Question) -> int:
        if question.kind is Kind.COMPARE and len(question.documents) > 2:
            return max(self.max_tokens, 4 * len(question.documents) + 8)
        if not self.soft:
            return self.max_tokens
        # Two tokens for 10; one for everything else, and only its log-probabilities are read.
        return 2 if question.kind is Kind.GRADE else 1

    def likely(self, asked: Asked) -> Likely:
        """Four bytes a token in; out what the question asks for, or half of what it may take where that is much."""
        body = self.body(asked)
        most = _most_out(body)
        content = sum(len(message["content"].encode()) for message in body["messages"])
        return Likely(likely_tokens(body), most // 2 if most > 64 else min(most, 4 * len(asked.documents)), content)

    def read(self, question: Question, reply: Reply) -> _Read:
        """Form, value and order of a reply. Raises Fault "refused", "unparsable" or "rejected"."""
        if question.kind is Kind.GRADE:
            return Form.GRADE, read_grade(reply), ()
        if len(question.documents) > 2:
            return Form.ORDER, None, read_order(reply, len(question.documents))
        if self.soft:
            return Form.SOFT, read_soft(reply), ()
        return Form.VOTE, read_vote(reply), ()

    def worst(self, body: Mapping[str, Any]) -> int:
        """Millionths that one try can cost at most."""
        return self.price.of(most_tokens(body), 0, _most_out(body))

    def cuts(self, asked: Asked) -> int:
        """How many of the documents are longer than it reads."""
        return sum(is_cut(text, self.document_tokens) for text in asked.documents)

    async def answer(self, asked: Asked, purse: Purse) -> Answer:
        """Ask until it answers, within its patience and the purse."""
        question = asked.question
        body = self.body(asked)
        outcome = await self.client.complete(body, lambda reply: self.read(question, reply), purse, _most_out(body))
        form, value, order = outcome.answer if outcome.answer is not None else (None, None, ())
        judgment = Judgment(
            judge=self.name,
            question=question,
            status=outcome.status,
            form=form,
            value=value,
            order=order,
            tokens_in=outcome.tokens_in,
            tokens_cached=outcome.tokens_cached,
            tokens_out=outcome.tokens_out,
            cost=outcome.cost,
            tries=outcome.tries,
        )
        return Answer(judgment, outcome.reply.content if outcome.reply else None, outcome.reason)

    async def aclose(self) -> None:
        """Close the chat's connections; the next question finds a whole circuit."""
        self.client.gate = self._gate()
        await self.chat.aclose()


def _most_out(body: Mapping[str, Any]) -> int:
    """Tokens that a reply may have; what is not limited is taken for much."""
    return (body.get("max_completion_tokens") or body.get("max_tokens") or 16_384) * body.get("n", 1)


# Teachers


class TeacherJudge:
    """A local reranker as a judge: P(A) = sigmoid((logit A - logit B) / temperature).

    Args:
        name: as in zelo.yaml.
        reranker: any zerank reranker. It scores each (query, document) once, however many pairs that document is in.
        temperature: logits are divided by it; at 5 the logit's own scale, that of relevance, is kept.
    """

    in_flight = 64
    host = ""
    price = Price()

    def __init__(self, name: str, reranker: Reranker, temperature: float = 5.0) -> None:
        if not temperature > 0:
            msg = f"the temperature of judge {name!r} is {temperature}; expected more than 0"
            raise JudgeError(msg)
        self.name = name
        self.reranker = reranker
        self.temperature = temperature
        self._logits: dict[bytes, float] = {}
        self._asked: dict[bytes, tuple[str, str, asyncio.Future[float]]] = {}
        self._scoring: asyncio.Task[None] | None = None

    def takes(self, question: Question) -> bool:
        """Everything."""
        return True

    @cached_property
    def _identity(self) -> JudgeIdentity:
        options = self.reranker.options
        # What can change a logit; not where it runs.
        chosen = ("revision", "base", "dtype", "max_length", "max_passage_tokens", "control_tokens", "instruction")
        parameters = {name: options[name] for name in chosen if options.get(name) is not None}
        return JudgeIdentity(self.name, self.reranker.model, {**parameters, "temperature": self.temperature})

    def identity(self, question: Question) -> JudgeIdentity:
        """The reranker's model and those of its options that change a logit."""
        return self._identity

    def likely(self, asked: Asked) -> Likely:
        """Nothing that costs."""
        return Likely()

    async def answer(self, asked: Asked, purse: Purse) -> Answer:
        """From the logits: a grade is 10 · relevance, a list is in order of logits."""
        from zerank_integrations.relevance import relevance_of

        question = asked.question
        queries = asked.queries if question.kind is Kind.CROSS else asked.queries * len(asked.documents)
        logits = await asyncio.gather(*map(self._logit, queries, asked.documents))
        form: Form
        value: float | None
        order: tuple[int, ...] = ()
        if question.kind is Kind.GRADE:
            form, value = Form.GRADE, 10 * relevance_of(logits[0])
        elif len(logits) > 2:
            form, value = Form.ORDER, None
            order = tuple(sorted(range(len(logits)), key=lambda place: -logits[place]))
        else:
            form, value = Form.SOFT, relevance_of(5.0 / self.temperature * (logits[0] - logits[1]))
        return Answer(Judgment(self.name, question, Status.OK, form, value, order))

    async def _logit(self, query: str, document: str) -> float:
        key = digest(query, document)
        if key in self._logits:
            return self._logits[key]
        if key not in self._asked:
            self._asked[key] = (query, document, asyncio.get_running_loop().create_future())
            if self._scoring is None:
                self._scoring = asyncio.create_task(self._score())
        # Shielded: another question may wait for the same logit.
        return await asyncio.shield(self._asked[key][2])

    async def _score(self) -> None:
        """Score what is asked for in one call, as long as something is: the model's steps are then full."""
        try:
            while self._asked:
                await asyncio.sleep(0)
                batch = dict(self._asked)
                by_query: dict[str, list[bytes]] = {}
                for key, (query, _, _) in batch.items():
                    by_query.setdefault(query, []).append(key)
                try:
                    rankings = await self.reranker.arank_many(
                        (query, [batch[key][1] for key in keys]) for query, keys in by_query.items()
                    )
                except Exception as error:
                    failed = JudgeError(f"judge {self.name!r} cannot score: {type(error).__name__}: {error}")
                    for key, (_, _, future) in batch.items():
                        del self._asked[key]
                        if not future.done():
                            future.set_exception(failed)
                    continue
                if len(self._logits) > 1_000_000:
                    self._logits.clear()
                for keys, ranked in zip(by_query.values(), rankings, strict=True):
                    for document in ranked:
                        key = keys[document.index]
                        self._logits[key] = document.logit
                        future = self._asked.pop(key)[2]
                        if not future.done():
                            future.set_result(document.logit)
        finally:
            self._scoring = None

    async def aclose(self) -> None:
        """Let go of the model; it is loaded again when asked again."""
        await self.reranker.aclose()


# Recordings


def record(judgments: Iterable[Judgment], path: str | os.PathLike[str]) -> int:
    """Write judgments to a JSONL file that `ReplayJudge` reads. Returns how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for judgment in judgments:
            question = judgment.question
            row: dict[str, Any] = {
                "kind": question.kind.value,
                "queries": question.queries,
                "documents": question.documents,
                "status": judgment.status.value,
            }
            if judgment.answered:
                row |= {"form": judgment.form, "value": judgment.value, "order": judgment.order}
            if judgment.simulated:
                row["simulated"] = True
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


class ReplayJudge:
    """Recorded answers, found by the ids in the question.

    Args:
        name: as in zelo.yaml.
        path: JSONL, one answer a line as `record` writes it: kind, queries, documents; status, form, value, order. Or what
            `zelo answers` wrote (.parquet), of which the answers of the judge of this name are taken: the order in which a
            judge is shown documents depends on its name.

    Raises:
        JudgeError: the file cannot be read as that; the message names the line.
        MissingPackage: pyarrow is not installed.
    """

    in_flight = 64
    host = ""
    price = Price()

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        self.name = name
        self.path = Path(path)
        self._answers: dict[Question, tuple[Status, Form | None, float | None, tuple[int, ...]]] = {}
        self.simulated = False
        try:
            content = self.path.read_bytes()
        except OSError as error:
            msg = f"{self.path} cannot be read ({error.strerror}); expected the recorded answers of judge {name!r}"
            raise JudgeError(msg) from None
        exported = self.path.suffix == ".parquet"
        rows: Sequence[Any] = self._exported() if exported else content.decode(errors="replace").split("\n")
        for number, row in enumerate(rows, start=1):
            try:
                if exported or row.strip():
                    self._add(row if exported else json.loads(row))
            except (ValueError, KeyError, TypeError) as error:
                msg = (
                    f"{self.path}:{number} is no recorded answer ({type(error).__name__}: {error}); expected such as "
                    '{"kind": "compare", "queries": ["q1"], "documents": ["d1", "d2"], "form": "vote", "value": 1}'
                )
                raise JudgeError(msg) from None
        parameters: dict[str, Any] = {"recording": digest(content).hex()}
        if self.simulated:
            parameters["simulated"] = True
        self._identity = JudgeIdentity(name, "recorded", parameters)

    def _exported(self) -> list[dict[str, Any]]:
        """This judge's rows of what a workspace exported."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingPackage("pyarrow is not installed; it reads Parquet files: pip install pyarrow") from error
        try:
            rows = pq.read_table(self.path, filters=[("judge", "=", self.name)]).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise JudgeError(f"{self.path} cannot be read ({error}); expected what `zelo answers` wrote") from None
        if not rows:
            raise JudgeError(
                f"{self.path} has no answers of a judge called {self.name!r}; expected some: give this one its name"
            )
        return rows

    def _add(self, row: Mapping[str, Any]) -> None:
        question = Question(Kind(row["kind"]), tuple(row["queries"]), tuple(row["documents"]))
        status = Status(row.get("status", "ok"))
        form: Form | None = None
        value: float | None = None
        order: tuple[int, ...] = ()
        if status is Status.OK:
            form = Form(row.get("form") or ("grade" if question.kind is Kind.GRADE else "soft"))
            order = tuple(int(place) for place in row.get("order") or ())
            value = None if form is Form.ORDER else float(row["value"])
            if form is Form.ORDER and sorted(order) != list(range(len(question.documents))):
                raise ValueError(f"order is {order}")
            if value is not None and not 0 <= value <= (10 if form is Form.GRADE else 1):
                raise ValueError(f"value is {value}")
        self.simulated = self.simulated or bool(row.get("simulated"))
        self._answers[question] = (status, form, value, order)

    def takes(self, question: Question) -> bool:
        """Everything; what was not recorded is an error when it is asked."""
        return True

    def identity(self, question: Question) -> JudgeIdentity:
        """The recording's hash: another recording is another judge."""
        return self._identity

    def likely(self, asked: Asked) -> Likely:
        """Nothing that costs."""
        return Likely()

    async def answer(self, asked: Asked, purse: Purse) -> Answer:
        """As recorded."""
        try:
            status, form, value, order = self._answers[asked.question]
        except KeyError:
            question = asked.question
            msg = (
                f"{self.path} has no answer to {question.kind.value} {question.queries} {question.documents}; expected all "
                "answers of the run it was recorded from: record it with the same collection, pairs and seed"
            )
            raise JudgeError(msg) from None
        return Answer(Judgment(self.name, asked.question, status, form, value, order, simulated=self.simulated))

    async def aclose(self) -> None:
        """Nothing to let go of."""
