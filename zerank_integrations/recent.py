"""What was computed for a text, kept while it is asked for often enough."""

from __future__ import annotations

from collections.abc import Sized
from typing import Generic, TypeVar

V = TypeVar("V", bound=Sized)


class Recent(Generic[V]):
    """A bounded cache of two generations: what is not asked for while a generation fills is forgotten.

    It holds no lock, so that it may be used from any thread and lives through a fork: a lost race only means that a text is
    encoded again.

    Args:
        size: the sum of the lengths of what a generation holds; twice that is held at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.forget()

    def forget(self) -> None:
        """Empty it."""
        self._young: dict[str, V] = {}
        self._old: dict[str, V] = {}
        self._held = 0

    def get(self, text: str) -> V | None:
        """What was put for the text, if it is still here."""
        found = self._young.get(text)
        if found is None and (found := self._old.get(text)) is not None:
            self.put(text, found)
        return found

    def put(self, text: str, value: V) -> V:
        """Remember the value and return it. What would fill a whole generation alone is not kept."""
        # At least 1, so that empty values cannot pile up.
        weight = max(1, len(value))
        if weight > self._size:
            return value
        if self._held + weight > self._size:
            self._old, self._young, self._held = self._young, {}, 0
        self._young[text] = value
        self._held += weight
        return value
