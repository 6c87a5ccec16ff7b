"""Simulated judges, for tests, demos and studies: answers drawn from qrels by a stated noise model, and marked as such.

    s      = level(grade) + .5 · z(first-stage score) + N(0, .4²)          the truth about a document
    u      = s_A + t_A - s_B - t_B + b · o + N(0, n²)                      o = +1: A stands for the one shown first
    answer = u > 0, turned round with probability ε

t is the judge's taste for a document, n its noise at a pair, b its liking for what is shown first. They share one scale, which
is chosen so that the judge gets the asked-for share of pairs right. Everything is drawn by a hash of (seed, judge, query,
documents): the order of calls, a crash or a resumed run cannot change an answer.

They support claims about estimators under this noise, never about language models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist

from zelo_train import chance
from zelo_train.cost import Price
from zelo_train.errors import JudgeError
from zelo_train.judge.judges import Answer, Asked, Likely
from zelo_train.llm import Purse
from zelo_train.records import Candidate, Form, Judgment, Kind, Question, Status
from zelo_train.store import JudgeIdentity, canonical, digest

# The highest grade of a collection lies here on the scale of s, grade 0 at 0, the others evenly between.
TOP_LEVEL = 3.0
SCORE_SHARE = 0.5
TRUTH_NOISE = 0.4

# Of the variance of u around the truth: half is taste, half noise. The position effect is .3 of its standard deviation.
TASTE_SHARE = 0.5
POSITION = 0.3
# A logistic function at this slope is within .01 of the normal distribution function.
LOGISTIC = 1.702

_NORMAL = NormalDist()

Truth = Mapping[str, Mapping[str, float]]


def _uniform(*words: object) -> float:
    return ((chance.key(*words) >> 11) + 0.5) / 2.0**53


def _normal(*words: object) -> float:
    return _NORMAL.inv_cdf(_uniform(*words))


def truth(
    candidates: Iterable[Candidate], qrels: Mapping[str, Mapping[str, float]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """How relevant each candidate truly is to its query, on the scale of s.

    Args:
        candidates: of the queries to be judged.
        qrels: grades by query and document; what has no grade is not relevant.
        seed: of the truth's own noise.

    Returns:
        Query to document to s.
    """
    scores: dict[str, dict[str, float]] = {}
    for candidate in candidates:
        scores.setdefault(candidate.query, {})[candidate.document] = candidate.score
    highest = max((grade for grades in qrels.values() for grade in grades.values()), default=1) or 1
    return {
        query: {
            document: TOP_LEVEL * max(0.0, qrels.get(query, {}).get(document, 0)) / highest
            + SCORE_SHARE * z
            + TRUTH_NOISE * _normal(seed, "truth", query, document)
            for document, z in _standardised(by_document).items()
        }
        for query, by_document in scores.items()
    }


def _standardised(scores: Mapping[str, float]) -> dict[str, float]:
    mean = math.fsum(scores.values()) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores.values()) / len(scores))
    return {name: (score - mean) / deviation if deviation else 0.0 for name, score in scores.items()}


class SimulatedJudge:
    """A judge that knows the truth and errs as told.

    Args:
        name: as in zelo.yaml; another name has another taste.
        truth: query to document to s, from `truth`.
        accuracy: per cent of the candidates' pairs that it gets right, over both orders; between 50 and 100.
        seed: of everything it draws.
        form: SOFT, VOTE, or GRADE to answer grades only.
        flips: how often it says the opposite of what it thinks; by default a quarter of its errors, at most .05.
        position: its liking for what is shown first, in standard deviations of its error.
    """

    in_flight = 1
    host = ""
    price = Price()

    def __init__(
        self,
        name: str,
        truth: Truth,
        accuracy: float = 90,
        seed: int = 0,
        form: Form = Form.SOFT,
        flips: float | None = None,
        position: float = POSITION,
    ) -> None:
        if not 50 < accuracy < 100:
            msg = f"the accuracy of simulated judge {name!r} is {accuracy}; expected a percentage between 50 and 100"
            raise JudgeError(msg)
        self.name = name
        self.form = form
        self.seed = seed
        self.flips = min(0.05, (1 - accuracy / 100) / 4) if flips is None else flips
        self._truth = truth
        self.scale = _scale(truth, accuracy / 100, self.flips, position)
        self.position = position * self.scale
        self._taste_deviation = self.scale * math.sqrt(TASTE_SHARE / 2)
        self._noise_deviation = self.scale * math.sqrt(1 - TASTE_SHARE)
        self._tastes: dict[tuple[str, str], float] = {}
        self._identity = JudgeIdentity(
            name,
            "simulated from qrels",
            {
                "simulated": True,
                "answer": form.value,
                "accuracy": accuracy,
                "seed": seed,
                "flips": self.flips,
                "position": position,
                "truth": digest(canonical({query: dict(documents) for query, documents in truth.items()})).hex(),
            },
        )

    def takes(self, question: Question) -> bool:
        """Everything, but grades only in the form GRADE."""
        return self.form is not Form.GRADE or question.kind is Kind.GRADE

    def identity(self, question: Question) -> JudgeIdentity:
        """Marked simulated; another truth is another judge."""
        return self._identity

    def likely(self, asked: Asked) -> Likely:
        """Nothing that costs."""
        return Likely()

    def judge(self, question: Question) -> Judgment:
        """The answer to a question; needs no texts."""
        documents = question.documents
        queries = question.queries if question.kind is Kind.CROSS else question.queries * len(documents)
        s = [self._liking(query, document) for query, document in zip(queries, documents, strict=True)]
        words = (self.seed, self.name, question.kind, *question.queries, *documents)
        if question.kind is Kind.GRADE:
            seen = s[0] + self._noise_deviation * _normal(*words)
            grade = 10 / (1 + math.exp(-4 * (seen / TOP_LEVEL - 0.5)))
            value = grade if self.form is Form.SOFT else float(round(grade))
            return self._judgment(question, Form.GRADE, value)
        flipped = _uniform(*words, "flip") < self.flips
        if len(documents) > 2:
            # A pair's noise is shared by its two documents.
            noisy = [x + self._noise_deviation / math.sqrt(2) * _normal(*words, place) for place, x in enumerate(s)]
            order = tuple(sorted(range(len(noisy)), key=lambda place: noisy[place], reverse=not flipped))
            return self._judgment(question, Form.ORDER, None, order)
        u = s[0] - s[1] + self.position + self._noise_deviation * _normal(*words)
        x = min(700.0, max(-700.0, LOGISTIC * u / self.scale))
        p = 1 / (1 + math.exp(-x))
        p = 1 - p if flipped else p
        return self._judgment(question, self.form, p if self.form is Form.SOFT else float(p > 0.5))

    async def answer(self, asked: Asked, purse: Purse) -> Answer:
        """As `judge`."""
        return Answer(self.judge(asked.question))

    async def aclose(self) -> None:
        """Nothing to let go of."""

    def _judgment(self, question: Question, form: Form, value: float | None, order: tuple[int, ...] = ()) -> Judgment:
        return Judgment(self.name, question, Status.OK, form, value, order, simulated=True)

    def _liking(self, query: str, document: str) -> float:
        """Truth and taste."""
        try:
            s = self._truth[query][document]
        except KeyError:
            msg = (
                f"simulated judge {self.name!r} knows nothing of document {document!r} for query {query!r}; expected one of "
                "the candidates it was made from"
            )
            raise JudgeError(msg) from None
        taste = self._tastes.get((query, document))
        if taste is None:
            taste = self._taste_deviation * _normal(self.seed, self.name, "taste", query, document)
            self._tastes[query, document] = taste
        return s + taste


def _scale(truth: Truth, accuracy: float, flips: float, position: float) -> float:
    """The standard deviation of u around the truth at which so many of the candidates' pairs are answered rightly."""
    import numpy as np
    from scipy.special import ndtr

    draw = np.random.default_rng(0)
    gaps = []
    for documents in truth.values():
        s = np.fromiter(documents.values(), float)
        if len(s) > 1:
            # All pairs of few documents, as many drawn ones of many.
            pairs = np.triu_indices(len(s), 1) if len(s) <= 40 else draw.integers(0, len(s), (2, 800))
            gaps.append(np.abs(s[pairs[0]] - s[pairs[1]]))
    gap = np.concatenate(gaps) if gaps else np.ones(1)
    gap = gap[gap > 0]

    def right(scale: float) -> float:
        p = (ndtr(gap / scale + position) + ndtr(gap / scale - position)) / 2
        return float(np.mean(flips + (1 - 2 * flips) * p)) if len(gap) else 1.0

    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if right(middle) > accuracy else (low, middle)
    return math.sqrt(low * high)
