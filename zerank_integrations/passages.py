"""Long documents as overlapping passages: a relevant page in the middle of a book is found by its own passage.

The same passage that scores .68 alone was seen to score .22 in the middle of 31,000 tokens, so length dilutes.
"""

from __future__ import annotations

from collections.abc import Sequence

# Neighbouring passages share a quarter, so that a sentence cut by one is whole in the next.
OVERLAP = 0.25


def spans(text: str, tokens: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Split a text into passages of at most `size` tokens that overlap by a quarter and break at white space.

    Args:
        text: the document.
        tokens: (start, end) characters of each of its tokens.
        size: tokens of a passage at most.

    Returns:
        (start, end) characters of each passage, in order, together covering every token; one span for a short text.
    """
    if len(tokens) <= size:
        return [(0, len(text))]
    found: list[tuple[int, int]] = []
    first = 0
    while True:
        last = min(first + size, len(tokens))
        if last < len(tokens):
            last = _break_before(text, tokens, last, floor=first + size // 2)
        found.append((tokens[first][0], tokens[last - 1][1]))
        if last == len(tokens):
            return found
        overlap = int((last - first) * OVERLAP)
        first = _break_before(text, tokens, last - overlap, floor=first + 1)


def _break_before(text: str, tokens: Sequence[tuple[int, int]], index: int, floor: int) -> int:
    """The nearest token at or before `index`, above `floor`, that begins a word; `index` itself when none does."""
    for candidate in range(index, floor, -1):
        start = tokens[candidate][0]
        # Byte-level tokens carry the space before a word; others begin right after it.
        if text[start : start + 1].isspace() or text[start - 1 : start].isspace():
            return candidate
    return index
