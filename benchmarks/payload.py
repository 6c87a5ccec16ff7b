"""What is scored: documents of log-normal length that make up a payload, and queries of a given number of tokens."""

from __future__ import annotations

import math
import random
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from zerank_integrations.embedded import load

if TYPE_CHECKING:
    from collections.abc import Callable

# Of the logarithm of a document's length: the longest of 100 is nearly five times the median.
SIGMA = 0.6


def lengths(characters: int, documents: int) -> list[int]:
    """Log-normal lengths that sum to `characters`: the distribution's quantiles, so that every payload has the same."""
    normal = NormalDist(0, SIGMA)
    weights = [math.e ** normal.inv_cdf((place + 0.5) / documents) for place in range(documents)]
    found = [max(1, round(characters * weight / sum(weights))) for weight in weights]
    found[-1] += characters - sum(found)
    return found


def documents(characters: int, seed: int, count: int = 100) -> list[str]:
    """Texts of the embedded collection that hold `characters` ASCII characters together, in random order.

    Each seed gives other texts of the same lengths, so that a run finds nothing of the run before it in any cache.
    """
    draw = random.Random(seed)
    sizes = lengths(characters, count)
    draw.shuffle(sizes)
    texts = []
    for size in sizes:
        text = ""
        while len(text) < size:
            text += draw.choice(_texts()) + "\n\n"
        # No white space at the ends: it would be stripped, and the payload be smaller than it says.
        text = text[:size].strip()
        texts.append(text + "." * (size - len(text)))
    return texts


def query(tokens: int, seed: int, count: Callable[[str], int]) -> str:
    """A query of exactly `tokens` tokens, made of the collection's queries; `count` counts a text's tokens."""
    draw = random.Random(seed)
    words = [word for query in draw.sample(_queries(), len(_queries())) for word in query.split()]
    text = words[0]
    for word in words[1:]:
        longer = f"{text} {word}"
        if count(longer) > tokens:
            continue
        text = longer
        if count(text) == tokens:
            return text
    msg = f"no query of {tokens} tokens can be made of the collection's; expected 3 to 1,000 tokens"
    raise ValueError(msg)


@cache
def _texts() -> list[str]:
    return [text for document in load().documents.values() if (text := document.text.encode("ascii", "ignore").decode())]


@cache
def _queries() -> list[str]:
    return [query.text for query in load().queries.values()]
