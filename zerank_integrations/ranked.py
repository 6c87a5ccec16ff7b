"""What `rank` returns: the documents in order of relevance, and the answers one asks for next."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import overload


def checked_top_k(top_k: object) -> int | None:
    """A number of documents, or None for all.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is negative.
    """
    if top_k is None:
        return None
    if isinstance(top_k, bool) or not hasattr(top_k, "__index__"):
        msg = f"top_k is {top_k!r}; expected a whole number of documents, or None for all"
        raise TypeError(msg)
    number = operator.index(top_k)
    if number < 0:
        msg = f"top_k is {number}; expected a number of documents, 0 or more, or None for all"
        raise ValueError(msg)
    return number


def checked_threshold(threshold: object) -> float | None:
    """A relevance, or None for no threshold.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside [0, 1].
    """
    if threshold is None:
        return None
    if not isinstance(threshold, Real):
        msg = f"threshold is {threshold!r}; expected a relevance in [0, 1], or None for all"
        raise TypeError(msg)
    relevance = float(threshold)
    if not 0.0 <= relevance <= 1.0:
        msg = f"threshold is {relevance!r}; expected a relevance in [0, 1] (logits are in `.logit`)"
        raise ValueError(msg)
    return relevance


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: its place in the list that was passed in.
        text: the text as it was passed in.
        logit: what the model answered, unbounded.
        relevance: sigmoid(logit / 5), in [0, 1].
        tokens: prompt tokens the model read for it: template, query and document, over all its passages.
        truncated: whether its end was cut to fit the prompt.
        replaced: lone surrogates in it that were read as U+FFFD.
        span: (start, end) in `text` of the passage that counted, when documents are read as passages.
    """

    index: int
    text: str
    logit: float
    relevance: float
    tokens: int
    truncated: bool = False
    replaced: int = 0
    span: tuple[int, int] | None = None

    @property
    def passage(self) -> str:
        """The part of the text that counted: the best passage, or the whole document."""
        return self.text if self.span is None else self.text[slice(*self.span)]


@dataclass(frozen=True, slots=True)
class Ranked(Sequence[RankedDocument]):
    """Documents from the most to the least relevant; equal logits keep the order they came in."""

    query: str
    documents: tuple[RankedDocument, ...]

    @classmethod
    def of(
        cls,
        query: str,
        documents: Iterable[RankedDocument],
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> Ranked:
        """Sort documents given in input order; keep those at or above the threshold, at most `top_k` of them."""
        # By logit: relevances close to 0 and 1 round to equal numbers long before logits do.
        ranked = cls(query, tuple(sorted(documents, key=lambda document: -document.logit)))
        return ranked.above(threshold).top(top_k)

    @overload
    def __getitem__(self, index: int) -> RankedDocument: ...
    @overload
    def __getitem__(self, index: slice) -> Ranked: ...
    def __getitem__(self, index: int | slice) -> RankedDocument | Ranked:
        """One document, or a ranking of those in the slice."""
        return Ranked(self.query, self.documents[index]) if isinstance(index, slice) else self.documents[index]

    def __len__(self) -> int:
        """How many documents are ranked."""
        return len(self.documents)

    def top(self, k: int | None) -> Ranked:
        """The k most relevant (all for None).

        Raises:
            TypeError, ValueError: k is no number of documents.
        """
        k = checked_top_k(k)
        return self if k is None else self[:k]

    def above(self, threshold: float | None) -> Ranked:
        """Those whose relevance is at least the threshold (all for None).

        Raises:
            TypeError, ValueError: the threshold is no relevance.
        """
        threshold = checked_threshold(threshold)
        if threshold is None:
            return self
        return Ranked(self.query, tuple(d for d in self.documents if d.relevance >= threshold))

    @property
    def indices(self) -> list[int]:
        """Places in the input, best first: `[documents[i] for i in ranked.indices]` reorders anything alike."""
        return [document.index for document in self.documents]

    @property
    def relevances(self) -> list[float]:
        """Relevances, best first."""
        return [document.relevance for document in self.documents]

    @property
    def truncated(self) -> list[RankedDocument]:
        """The documents whose end was cut."""
        return [document for document in self.documents if document.truncated]

    @property
    def tokens(self) -> int:
        """Prompt tokens the model read for the documents listed here."""
        return sum(document.tokens for document in self.documents)
