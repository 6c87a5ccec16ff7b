"""`rate`: from preferences to ratings with standard errors."""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF001

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zelo_train.errors import TooFewAnswers
from zelo_train.rate.answers import Answers, Floats, answers_of
from zelo_train.rate.connectivity import Connectivity, connectivity
from zelo_train.rate.fit import PRIOR, JudgeTerms, fit
from zelo_train.rate.judges import cross_fit
from zelo_train.rate.link import Link
from zelo_train.records import Preference, Rating


@dataclass(frozen=True, eq=False)
class Ratings:
    """How much more relevant each document is than its query's others.

    Iterating gives `Rating` records, query after query, best first.

    Attributes:
        answers: the preferences that were used, as arrays; `answers.documents` names what `values` rate.
        values: (D) ratings in logit units, each query's sum to zero.
        standard_errors: (D) in the same units, from the inverse Fisher information.
        judges: name → discrimination, position effect and flip rate.
        queries: per query what its answers tie together, also for queries that are not rated.
        link: F.
        prior: λ.
        approximate: some answers ordered more than two documents, whose derived pairs are not independent: the standard errors
            are approximate.
    """

    answers: Answers
    values: Floats
    standard_errors: Floats
    judges: Mapping[str, JudgeTerms]
    queries: tuple[Connectivity, ...]
    link: Link
    prior: float
    approximate: bool

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Rating]:
        for index in range(len(self.answers.queries)):
            yield from self._of(index)

    def __contains__(self, query: object) -> bool:
        return query in self._index

    def of(self, query: str) -> tuple[Rating, ...]:
        """The ratings of one query, best first.

        Raises:
            KeyError: the query is not rated; the message says why.
        """
        index = self._index.get(query)
        if index is None:
            why = next((report.reason for report in self.queries if report.query == query), "nothing was asked about it")
            raise KeyError(f"query {query!r} is not rated: {why}")
        return self._of(index)

    def doubtful(self, n: int = 10) -> tuple[Rating, ...]:
        """The n ratings with the largest standard errors, largest first: where further answers would tell most."""
        worst = np.argsort(-self.standard_errors, kind="stable")[: max(n, 0)]
        owner = self.answers.owner
        return tuple(self._rating(int(owner[place]), int(place)) for place in worst)

    @property
    def left_out(self) -> tuple[Connectivity, ...]:
        """The queries that are not rated, each with the reason."""
        return tuple(report for report in self.queries if not report.rated)

    def report(self) -> str:
        """What was rated, what was left out and why, and how the judges answer, in lines of text."""
        partly = [report for report in self.queries if report.rated and report.left_out]
        lines = [f"{len(self.answers.queries)} of {len(self.queries)} queries rated, {len(self)} documents"]
        lines += [str(report) for report in (*self.left_out, *partly)]
        for name, terms in self.judges.items():
            lines.append(
                f"judge {name}: discrimination {terms.discrimination:.2f}, position {terms.position:+.2f}, "
                f"flips {terms.flip:.1%} of answers" + (f" ({terms.note})" if terms.note else "")
            )
        if self.approximate:
            lines.append("standard errors are approximate: some answers ordered more than two documents")
        return "\n".join(lines)

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {query: index for index, query in enumerate(self.answers.queries)}

    def _of(self, index: int) -> tuple[Rating, ...]:
        first, last = int(self.answers.start[index]), int(self.answers.start[index + 1])
        order = first + np.argsort(-self.values[first:last], kind="stable")
        return tuple(self._rating(index, int(place)) for place in order)

    def _rating(self, query: int, place: int) -> Rating:
        return Rating(
            self.answers.queries[query],
            self.answers.documents[place],
            float(self.values[place]),
            float(self.standard_errors[place]),
        )


def rate(
    preferences: Iterable[Preference],
    *,
    candidates: Mapping[str, Sequence[str]] | None = None,
    judges: Mapping[str, JudgeTerms] | None = None,
    link: Link | str = Link.LOGISTIC,
    prior: float = PRIOR,
    seed: int = 0,
) -> Ratings:
    """Ratings of each query's documents from pairwise preferences.

    Args:
        preferences: see `zelo_train.rate.preferences` for how judgments become preferences.
        candidates: query → the documents that were to be compared, so that those nobody answered about are missed and
            reported; without it they are the documents that the preferences name.
        judges: name → its terms; None estimates them from the preferences by cross-fitting. For a = 1, b = ε = 0 give
            `{name: JudgeTerms()}`; judges not named have these too.
        link: "logistic" (Bradley-Terry) or "erf" (Thurstone).
        prior: λ, the precision of a rating before any answer.
        seed: of the folds of cross-fitting.

    Raises:
        TooFewAnswers: no query can be rated.
        ValueError: a preference that cannot be, see `answers_of`, or a prior that is not positive.

    Source: Bradley and Terry 1952; zELO, arXiv 2509.12541.
    """
    if not prior > 0:
        raise ValueError(
            f"prior = {prior}: a positive precision was expected; without one an undefeated document has no rating"
        )
    link = Link(link)
    answers = answers_of(preferences, candidates)
    reports, rated = connectivity(answers)
    answers = answers.of_documents(rated)
    if not answers.queries:
        reasons = Counter(report.reason for report in reports).most_common(3)
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "there are no preferences"
        raise TooFewAnswers(
            f"none of {len(reports)} queries can be rated: {listed}. Judge more pairs, or see which calls failed"
        )
    if judges is None:
        terms = cross_fit(answers, link=link, prior=prior, seed=seed)
    else:
        terms = tuple(judges.get(name, JudgeTerms()) for name in answers.judges)
    found = fit(answers, terms, link=link, prior=prior)
    return Ratings(
        answers,
        found.e,
        np.sqrt(found.variance),
        dict(zip(answers.judges, terms, strict=True)),
        tuple(reports),
        link,
        prior,
        bool(np.any(answers.weight != 1)),
    )
