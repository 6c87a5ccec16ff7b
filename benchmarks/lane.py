"""Contenders as processes: each loads its model in a process of its own and then runs when it is told to."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Remote:
    """A contender in another process. Making one starts to load it; the first call waits for that."""

    def __init__(self, name: str, folder: Path, dtype: str, core: int | None) -> None:
        self.name = name
        self._ours, theirs = multiprocessing.Pipe()
        # Never forked: the child must not begin with what this process, or another contender, has in memory.
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(theirs, name, folder, dtype, core), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, query: str, documents: Sequence[str]) -> dict[str, Any]:
        """Score once.

        Returns:
            `logits`, `cpu_s`, `wall_s`, `tokens` computed, and `peak_bytes` of memory above the loaded model.
        """
        self._ours.send((query, list(documents)))
        answer: dict[str, Any] | str = self._ours.recv()
        if isinstance(answer, str):
            msg = f"{self.name} failed:\n{answer}"
            raise RuntimeError(msg)
        return answer

    def close(self) -> None:
        """End the process."""
        self._ours.send(None)
        self._process.join()


def _serve(connection: Connection, name: str, folder: Path, dtype: str, core: int | None) -> None:
    import traceback
    import warnings

    if core is not None:
        os.sched_setaffinity(0, {core})
    # The thread count of a run is one; tokenisers would bring a pool of their own.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    warnings.simplefilter("ignore")

    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.contenders import CONTENDERS, REFERENCE, OneAtATime, counting
    from benchmarks.measure import peak, resident, timed

    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        contender = OneAtATime(folder, dtype) if name == REFERENCE else CONTENDERS[name](folder, dtype)
        tokens = counting(contender.decoder)
        contender("warm", ["up"])
        model = resident()
        while (job := connection.recv()) is not None:
            query, documents = job
            tokens()
            (logits, cpu, wall), most = peak(partial(timed, partial(contender, query, documents)))
            figures = {"cpu_s": cpu, "wall_s": wall, "tokens": tokens(), "peak_bytes": most - model}
            connection.send(figures | {"logits": logits})
    except BaseException:
        connection.send(traceback.format_exc())
