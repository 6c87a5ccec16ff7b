"""What the stages hand on to each other: frozen records that name queries and documents by their ids.

    Query, Document → Candidate → Question → Judgment → Preference, Grade → Rating → Target → Example

A stage takes records and gives records; only the pipeline knows where they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for.

    Attributes:
        id: unique in its collection.
        text: as a person typed it.
        domain: one word ("health", "legal"); figures are reported per domain.
        split: which part of the collection it belongs to, when there are any.
        synthetic: written by a model from a document, not by a person.
    """

    id: str
    text: str
    domain: str = ""
    split: Split | None = None
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """What is found.

    Attributes:
        id: unique in its collection.
        text: what is read.
        title: read in front of the text, when there is one.
        source: the file it was cut from, for collections made of files.
        span: (start, end) characters of it in that file.
    """

    id: str
    text: str
    title: str = ""
    source: str = ""
    span: tuple[int, int] | None = None

    @property
    def full_text(self) -> str:
        """Title and text, as retrievers, judges and rerankers read them."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that a first stage found for a query: its rank, from 1, and the score it had there."""

    query: str
    document: str
    rank: int
    score: float


class Kind(StrEnum):
    """What a judge is asked."""

    COMPARE = "compare"
    GRADE = "grade"
    CROSS = "cross"


@dataclass(frozen=True, slots=True)
class Question:
    """One question to one judge.

    Attributes:
        kind: COMPARE asks which of several documents is more relevant to one query, GRADE how relevant one document is from 0
            to 10, CROSS which of two (query, document) pairs fits better.
        queries: the query's id, or for CROSS the two pairs' queries.
        documents: the documents' ids in the order they are shown; two for a pair, k for a list, one for a grade.
    """

    kind: Kind
    queries: tuple[str, ...]
    documents: tuple[str, ...]

    @property
    def query(self) -> str:
        """The query of a question about one query."""
        (query,) = self.queries
        return query


@dataclass(frozen=True, slots=True)
class Comparison:
    """A pair of one query's documents whose order is asked; `left` is shown first."""

    query: str
    left: str
    right: str

    @property
    def swapped(self) -> Comparison:
        """The same pair shown in the other order: another question."""
        return Comparison(self.query, self.right, self.left)

    @property
    def question(self) -> Question:
        """As a question to a judge."""
        return Question(Kind.COMPARE, (self.query,), (self.left, self.right))


class Status(StrEnum):
    """How a question ended. Only OK is an answer; a failure never looks like one."""

    OK = "ok"
    REFUSED = "refused"
    UNPARSABLE = "unparsable"
    GAVE_UP = "gave up"
    TOO_LONG = "too long"


class Form(StrEnum):
    """What an answer consists of."""

    SOFT = "soft"
    VOTE = "vote"
    GRADE = "grade"
    ORDER = "order"


@dataclass(frozen=True, slots=True)
class Judgment:
    """One judge's final word on one question.

    Attributes:
        judge: its name.
        question: what was asked, in the order shown.
        status: whether there is an answer.
        form: SOFT is a probability from the mass of the answer tokens, VOTE 1, 0 or .5 for a tie, GRADE a (possibly expected)
            grade from 0 to 10, ORDER the shown places from best to worst.
        value: P(first shown more relevant) for SOFT and VOTE, the grade for GRADE; None without an answer, and for ORDER.
        order: for ORDER, places (from 0) in `question.documents`, best first.
        tokens_in, tokens_cached, tokens_out: what was spent, over all tries.
        cost: in millionths of the currency.
        tries: how often it was sent.
        simulated: drawn from qrels, not given by a judge. It travels to targets, cards and reports.
    """

    judge: str
    question: Question
    status: Status
    form: Form | None = None
    value: float | None = None
    order: tuple[int, ...] = ()
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: int = 0
    tries: int = 1
    simulated: bool = False

    @property
    def answered(self) -> bool:
        """Whether it says anything about relevance."""
        return self.status is Status.OK


@dataclass(frozen=True, slots=True)
class Preference:
    """One judge's P(left more relevant) for a pair; `left` was shown first. Lists of k become pairs of weight 2/k."""

    judge: str
    query: str
    left: str
    right: str
    p: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Grade:
    """One judge's grade of a document for a query, from 0 to 10."""

    judge: str
    query: str
    document: str
    grade: float


@dataclass(frozen=True, slots=True)
class Rating:
    """How much more relevant a document is than its query's others, in logit units; ratings of one query sum to zero."""

    query: str
    document: str
    rating: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Target:
    """What a student should answer: the expected ensemble grade / 10, in [.01, .99], comparable across queries.

    Attributes:
        anchored: whether grades or qrels fixed the scale; thresholds on unanchored targets are refused.
        simulated: whether any judgment behind it was simulated.
    """

    query: str
    document: str
    relevance: float
    weight: float = 1.0
    anchored: bool = True
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One row of training: texts instead of ids."""

    query: str
    document: str
    relevance: float
    weight: float = 1.0
