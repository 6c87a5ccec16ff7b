"""One model for many callers: threads, event loops, forks, interrupts, exits."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests import reference
from zerank_integrations import Ranked, Reranker

DOCUMENTS = [document for _, document in reference.random_pairs(400, seed=21)]


def options(folder: Path) -> dict[str, object]:
    return {"model": folder, "dtype": "float32", "device": "cpu"}


def alike(found: Ranked, expected: Ranked) -> bool:
    """Equal but for the last bits, which the companions of a step may move."""
    logits, others = ({document.index: document.logit for document in ranked} for ranked in (found, expected))
    return logits == pytest.approx(others, abs=1e-4)


def run(code: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run code with FOLDER set in an interpreter of its own."""
    program = f"FOLDER = {str(folder)!r}\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, **options
    )


def freed(decoder: weakref.ref) -> bool:
    """Whether a model is gone; a worker that was in a step lets go of it when the step ends."""
    deadline = time.monotonic() + 5
    while decoder() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return decoder() is None


def test_equal_options_share_one_model_and_the_last_close_frees_it(tiny_causal_lm: Path) -> None:
    first, second = Reranker(**options(tiny_causal_lm)), Reranker(**options(tiny_causal_lm), max_length=100)
    other = Reranker(**options(tiny_causal_lm) | {"dtype": "bfloat16"})
    assert first.engine() is second.engine()
    assert first.engine() is not other.engine()
    decoder = weakref.ref(first.engine().loaded.decoder)
    first.close()
    first.close()
    gc.collect()
    assert decoder() is not None
    assert not first.loaded
    assert second.loaded
    second.close()
    assert freed(decoder)
    assert len(first.rank("q", ["loads again"])) == 1
    assert first.loaded


def test_a_forgotten_reranker_frees_its_model(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm)).warm_up()
    decoder = weakref.ref(reranker.engine().loaded.decoder)
    del reranker
    assert freed(decoder)


def test_closing_during_a_call_lets_it_finish(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm), token_budget=256)
    expected = reranker.rank("q", DOCUMENTS)
    decoder = weakref.ref(reranker.engine().loaded.decoder)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(reranker.rank, "q", DOCUMENTS)
        time.sleep(0.05)
        reranker.close()
        assert running.result().indices == expected.indices
        # The call loaded nothing anew for itself alone: what it held is gone with it.
        del running
    reranker.close()
    assert freed(decoder)


@pytest.mark.parametrize("deterministic", [False, True])
def test_32_threads_equal_one(tiny_causal_lm: Path, deterministic: bool) -> None:
    reranker = Reranker(**options(tiny_causal_lm), deterministic=deterministic)
    requests = [(f"query {i}", DOCUMENTS[i : i + 8]) for i in range(32)]
    expected = [reranker.rank(*request) for request in requests]
    reranker.close()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda request: reranker.rank(*request), requests))
    assert found == expected if deterministic else all(map(alike, found, expected))
    assert reranker.loaded


@asynccontextmanager
async def longest_hold() -> AsyncIterator[Callable[[], float]]:
    """Watch the event loop; afterwards, the longest time in seconds for which it was held."""
    longest, done = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not done.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    # A pause of the collector, which holds every thread, would be charged to the scoring.
    gc.collect()
    gc.disable()
    try:
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.01)
        yield lambda: longest
        done.set()
        await watching
    finally:
        gc.enable()


async def test_200_tasks_equal_one_and_the_loop_is_never_held(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm)).warm_up()
    requests = [(f"query {i}", DOCUMENTS[i : i + 4]) for i in range(200)]
    expected = [reranker.rank(*request) for request in requests]
    async with longest_hold() as hold:
        found = await asyncio.gather(*(reranker.arank(*request) for request in requests))
    assert all(map(alike, found, expected))
    assert hold() < 0.050


async def test_asyncios_own_threads_are_left_alone(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm))
    loop = asyncio.get_running_loop()
    ran: list[str] = []

    class Watched(ThreadPoolExecutor):
        def submit(self, *arguments: object, **keywords: object) -> object:
            ran.append(repr(arguments))
            return super().submit(*arguments, **keywords)

    loop.set_default_executor(Watched(1))
    await asyncio.gather(*(reranker.arank("q", DOCUMENTS[:5]) for _ in range(20)))
    await reranker.aclose()
    assert ran == []


def test_two_event_loops(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm))
    expected = reranker.rank("q", DOCUMENTS[:20])

    async def several() -> list:
        return await asyncio.gather(*(reranker.arank("q", DOCUMENTS[:20]) for _ in range(10)))

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: asyncio.run(several()), range(2)))
    found = [*both[0], *both[1], *asyncio.run(several())]
    assert [alike(each, expected) for each in found] == [True] * 30


async def test_a_cancelled_task_leaves_the_rest_alone(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm), token_budget=128).warm_up()
    expected = reranker.rank("q", DOCUMENTS[:4])
    long = asyncio.create_task(reranker.arank("q", DOCUMENTS * 20))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(reranker.arank("q", DOCUMENTS[:4])) for _ in range(3)]
    await asyncio.sleep(0.3)
    long.cancel()
    waiting[0].cancel()
    before = time.perf_counter()
    assert alike(await waiting[1], expected)
    assert alike(await waiting[2], expected)
    # The long request, 8,000 documents, would have taken far longer.
    assert time.perf_counter() - before < 2
    with pytest.raises(asyncio.CancelledError):
        await long
    await reranker.aclose()


def test_an_error_in_a_step_fails_only_its_own_request(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm)).warm_up()
    engine = reranker.engine()
    from zerank_integrations.engine.worker import Request
    from zerank_integrations.prompt import Prompt

    unknown = Request([Prompt([10**9], [1], [1], truncated=False)], token_budget=100)
    engine.submit(unknown)
    with pytest.raises(IndexError):
        unknown.future.result()
    assert len(reranker.rank("q", DOCUMENTS[:3])) == 3


def test_a_failed_load_is_tried_again(tiny_causal_lm: Path, tmp_path: Path) -> None:
    reranker = Reranker(tmp_path / "later", dtype="float32", device="cpu")
    with pytest.raises(OSError, match="later"):
        reranker.rank("q", ["d"])
    os.symlink(tiny_causal_lm, tmp_path / "later")
    assert len(reranker.rank("q", ["d"])) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, so nothing is inherited through one")
def test_a_forked_child_scores_with_a_worker_of_its_own(tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent forks while its worker is busy and its locks are in use; the child must neither hang nor score wrongly."""
    # As some libraries set it: then the tokenizer does not notice by itself that its threads are gone.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    reranker = Reranker(**options(tiny_causal_lm), token_budget=512)
    expected = reranker.rank("q", DOCUMENTS[:10])
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            reranker.rank("busy", DOCUMENTS[:60])

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(5):
            assert _in_child(lambda: _child_ranks(reranker, expected)) == "equal"
    finally:
        stop.set()
        for thread in busy:
            thread.join()
    assert reranker.rank("q", DOCUMENTS[:10]) == expected


def _child_ranks(reranker: Reranker, expected: object) -> str:
    if reranker.rank("q", DOCUMENTS[:10]) != expected or asyncio.run(reranker.arank("q", DOCUMENTS[:10])) != expected:
        return "different"
    reranker.close()
    return "equal" if reranker.rank("q", DOCUMENTS[:10]) == expected else "different after close"


def _in_child(work: Callable[[], str]) -> str:
    """What `work` returned in a forked child; its traceback if it raised, or where it is after 50 seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # A child that hangs says where.
        faulthandler.dump_traceback_later(50, file=write)
        try:
            os.write(write, work().encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, so nothing is inherited through one")
def test_forking_while_another_thread_loads(tiny_causal_lm: Path) -> None:
    """The child gets neither half an import nor half a load: it loads by itself."""
    code = """
        import os, sys, threading, time
        from zerank_integrations import Reranker
        loading = threading.Thread(target=Reranker(FOLDER, dtype="float32", device="cpu").warm_up)
        loading.start()
        statuses = []
        while loading.is_alive() and len(statuses) < 4:
            time.sleep(0.15)
            child = os.fork()
            if child == 0:
                ranked = Reranker(FOLDER, dtype="float32", device="cpu").rank("q", ["a", "b"])
                os._exit(0 if len(ranked) == 2 else 1)
            statuses.append(os.waitpid(child, 0)[1])
        loading.join()
        print(set(statuses))
    """
    done = run(code, tiny_causal_lm)
    assert done.stdout.strip() == "{0}", done.stdout + done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tiny_causal_lm: Path, tmp_path: Path, method: str) -> None:
    """As gunicorn --preload and celery do: load in the parent, score in workers."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import json, multiprocessing
        from zerank_integrations import Reranker
        reranker = Reranker({str(tiny_causal_lm)!r}, dtype="float32", device="cpu")
        def score(text):
            return reranker.score("q", [text, "other"])
        if __name__ == "__main__":
            expected = [score(text) for text in "abcd"]
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                print(json.dumps([expected, pool.map(score, "abcd")]))
        """)
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected, found = json.loads(done.stdout)
    assert found == expected


# One step of these takes seconds, so that an interrupt always falls into one.
LONG_STEP = """
        import asyncio, os, signal, threading, time
        from zerank_integrations import Reranker
        TEXTS = [f"{i} the river and the paper " * 60 for i in range(1_500)]
        def reranker():
            return Reranker(FOLDER, dtype="float32", device="cpu", token_budget=1_000_000)
"""


def test_ctrl_c_leaves_a_running_rank_promptly_even_in_the_middle_of_a_step(tiny_causal_lm: Path) -> None:
    code = (
        LONG_STEP
        + """
        with reranker() as ranks:
            ranks.warm_up()
            sent = []
            def interrupt():
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(1.0, interrupt).start()
            try:
                ranks.rank("q", TEXTS)
                print("finished")
            except KeyboardInterrupt:
                print("interrupted", time.monotonic() - sent[0] < 2)
    """
    )
    done = run(code, tiny_causal_lm)
    assert done.stdout.split() == ["interrupted", "True"], done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_a_timed_out_step_is_no_abort_at_exit(tiny_causal_lm: Path) -> None:
    code = (
        LONG_STEP
        + """
        async def main():
            async with reranker() as ranks:
                await ranks.awarm_up()
                try:
                    await asyncio.wait_for(ranks.arank("q", TEXTS), 0.7)
                    print("finished")
                except TimeoutError:
                    print("timed out")
        asyncio.run(main())
    """
    )
    done = run(code, tiny_causal_lm)
    assert (done.stdout.strip(), done.returncode, done.stderr) == ("timed out", 0, "")


@pytest.mark.parametrize("ending", ["pass", "ranks.close()", "del ranks", "raise SystemExit(0)"])
def test_clean_interpreter_exit_in_the_middle_of_a_step(tiny_causal_lm: Path, ending: str) -> None:
    code = (
        LONG_STEP
        + f"""
        ranks = reranker()
        ranks.rank("q", ["a", "b"])
        threading.Thread(target=lambda r: r.rank_many([(str(i), TEXTS) for i in range(10)]), args=(ranks,), daemon=True).start()
        time.sleep(0.7)
        {ending}
    """
    )
    before = time.monotonic()
    done = run(code, tiny_causal_lm)
    assert (done.returncode, "Fatal" in done.stderr, "terminate" in done.stderr) == (0, False, False), done.stderr
    # What had not begun was not waited for.
    assert time.monotonic() - before < 60


def test_models_loaded_at_the_same_time_do_not_spoil_each_other(tiny_folder: Callable[[str], Path]) -> None:
    import torch

    default = torch.get_default_dtype()
    sources = [
        (tiny_folder(name), dtype) for name in ("causal_lm", "sequence_classification") for dtype in ("float32", "bfloat16")
    ]
    expected = [Reranker(folder, dtype=dtype, device="cpu").rank("q", DOCUMENTS[:5]) for folder, dtype in sources]
    gc.collect()
    for _ in range(5):
        rerankers = [Reranker(folder, dtype=dtype, device="cpu") for folder, dtype in sources]
        with ThreadPoolExecutor(len(sources)) as pool:
            assert list(pool.map(lambda reranker: reranker.rank("q", DOCUMENTS[:5]), rerankers)) == expected
        for reranker in rerankers:
            reranker.close()
    assert torch.get_default_dtype() == default


async def test_large_calls_do_not_hold_the_loop(tiny_causal_lm: Path) -> None:
    reranker = Reranker(**options(tiny_causal_lm)).warm_up()
    texts = [f"{i}" for i in range(10_000)]
    async with longest_hold() as hold:
        ranked = await reranker.arank("q", texts)
    assert len(ranked) == len(texts)
    # Reading and sorting so many on the loop itself takes 0.2 s.
    assert hold() < 0.1


def test_a_reranker_that_never_loaded_leaves_nothing_to_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from zerank_integrations import Reranker; Reranker('nowhere/at-all')"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
