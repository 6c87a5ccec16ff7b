"""Ctrl-C while an event loop runs: a call inside that loop, and the exception only after the loop has ended.

Raised where Python happens to be, KeyboardInterrupt can meet an event loop half made or half closed, which then complains of
itself; and it cuts off what a provider has already been paid for.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T], stop: Callable[[], object] | None = None) -> T:
    """`asyncio.run`, but each Ctrl-C calls `stop` in the loop, and KeyboardInterrupt is raised when the coroutine has ended.

    Args:
        coroutine: what is run.
        stop: makes it end soon; without one it is cancelled.

    Raises:
        KeyboardInterrupt: in place of whatever else happened, if there was a Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        # Signals are another thread's affair, or ignored as in the background of a shell.
        return asyncio.run(coroutine)
    met = 0
    call: Callable[[], object] | None = None

    async def whole() -> T:
        nonlocal call
        task = asyncio.current_task()
        assert task is not None
        call = stop or task.cancel
        try:
            for _ in range(met):
                call()
            return await coroutine
        finally:
            call = None

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        nonlocal met
        met += 1
        if call is not None:
            # It also wakes the loop, which may wait for a server.
            runner.get_loop().call_soon_threadsafe(call)

    signal.signal(signal.SIGINT, interrupted)
    try:
        with asyncio.Runner() as runner:
            return runner.run(whole())
    finally:
        signal.signal(signal.SIGINT, before)
        if met:
            raise KeyboardInterrupt
