"""No fork in the middle of a step.

Linear algebra libraries hold locks of their own while they compute. A child forked at that moment inherits them locked by a
thread that it does not have, and hangs in its first matrix product. So a fork waits for the steps under way, and steps wait
for the fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Steps pass it in any number; a fork passes it alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps = 0
        self._forking = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, this process is not forked."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._steps += 1
        try:
            yield
        finally:
            with self._changed:
                self._steps -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Before a fork: hold new steps back and wait for those under way."""
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: self._steps == 0)

    def open(self) -> None:
        """After a fork, in the parent."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()


gate = Gate()


def _reopen_in_child() -> None:
    # The parent's condition may be held by a thread that does not exist here.
    gate.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: gate.close(), after_in_parent=lambda: gate.open(), after_in_child=_reopen_in_child)
