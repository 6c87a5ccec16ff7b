"""Ctrl-C while an event loop runs, is made, or is closed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zelo_train.interrupt import run

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_without_a_signal_it_is_asyncio_run() -> None:
    before = signal.getsignal(signal.SIGINT)

    async def three() -> int:
        await asyncio.sleep(0)
        return 3

    assert run(three()) == 3
    with pytest.raises(TimeoutError):
        run(asyncio.wait_for(asyncio.sleep(1), 0.01))
    assert signal.getsignal(signal.SIGINT) is before


def test_the_coroutine_is_cancelled_and_may_tidy_up() -> None:
    tidy: list[bool] = []

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            tidy.append(True)

    before = signal.getsignal(signal.SIGINT)
    interrupt_after(0.2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(long())
    assert tidy
    assert time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGINT) is before


def test_stop_is_called_in_the_loop_each_time() -> None:
    calls: list[asyncio.AbstractEventLoop] = []

    async def until_two() -> None:
        interrupt_after(0.1)
        interrupt_after(0.3)
        while len(calls) < 2:
            await asyncio.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run(until_two(), lambda: calls.append(asyncio.get_running_loop()))
    assert len(calls) == 2


def test_another_thread_runs_without_signals() -> None:
    found: list[int] = []

    async def seven() -> int:
        return 7

    thread = threading.Thread(target=lambda: found.append(run(seven())))
    thread.start()
    thread.join()
    assert found == [7]


STORM = """
import asyncio, signal, sys, time
from zelo_train.interrupt import run
# Outside of `run` a signal does nothing, inside it must be met, wherever it falls.
signal.signal(signal.SIGINT, lambda *_: None)
print("begun", flush=True)
met, end = 0, time.monotonic() + 2
while time.monotonic() < end:
    try:
        run(asyncio.sleep(0.001))
    except KeyboardInterrupt:
        met += 1
print(met)
"""


def test_no_moment_is_wrong() -> None:
    """Signals at any moment of making, running and closing loops: each ends its run, and no loop complains."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", STORM], stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        draw, end = random.Random(0), time.monotonic() + 1.2
        # Before the child ends: a signal to a Python that is on its way out is nobody's to meet.
        while time.monotonic() < end:
            time.sleep(draw.uniform(0.0005, 0.003))
            child.send_signal(signal.SIGINT)
        printed, said = child.communicate(timeout=30)
    assert child.returncode == 0, said
    assert said == ""
    assert int(printed) > 20
