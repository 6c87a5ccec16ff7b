"""What `zerank bench` measures: how quickly one's own model ranks one's own documents on this machine."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from zerank_integrations.reranker import Reranker


@dataclass(slots=True)
class Bench:
    """What was measured.

    Attributes:
        device: what it was computed on.
        dtype: what it was computed in.
        loading: seconds until the model was in memory.
        model_bytes: memory with the model loaded; None where the system does not tell.
        peak_bytes: the most memory during the runs, the model included; None where the system does not tell.
        seconds: wall time of each run.
        documents: documents ranked in each run.
        tokens: prompt tokens of each run: template, query and document of every pair, however often the engine computes them.
    """

    device: str
    dtype: str
    loading: float
    model_bytes: int | None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def documents_per_second(self) -> float:
        """Over all runs."""
        return sum(self.documents) / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Over all runs."""
        return sum(self.tokens) / sum(self.seconds)

    def percentile(self, percent: float) -> float:
        """The seconds within which `percent` of the runs were done, interpolated."""
        ordered = sorted(self.seconds)
        place = (len(ordered) - 1) * percent / 100
        below, above = int(place), min(int(place) + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    def record(self) -> dict[str, Any]:
        """The figures as `--json` prints them."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "loading_s": self.loading,
            "runs": len(self.seconds),
            "documents": sum(self.documents),
            "tokens": sum(self.tokens),
            "documents_per_s": self.documents_per_second,
            "tokens_per_s": self.tokens_per_second,
            "p50_s": self.percentile(50),
            "p95_s": self.percentile(95),
            "model_bytes": self.model_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }


def bench(
    reranker: Reranker,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    count: int,
    runs: int,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
) -> Bench:
    """Rank `count` documents at a time, as one request each, and measure.

    Queries and documents are taken in turn, so that requests differ as a user's do; once all were taken they come again. One
    request more, which is not counted, comes first: it brings what only a first call pays.

    Args:
        reranker: it is loaded here if need be.
        queries: at least one.
        documents: at least one.
        count: documents of a request.
        runs: requests at most.
        seconds: no request is begun after this time; one is made at least.
        advance: called once the model is loaded, after the uncounted request, and after each other.

    Returns:
        The figures.
    """
    # Importing them takes seconds of its own, which are not the checkpoint's.
    import torch  # noqa: F401
    import transformers  # noqa: F401

    before = time.perf_counter()
    loaded = reranker.engine().loaded
    loading = time.perf_counter() - before
    memory = _Memory(loaded.device)
    found = Bench(loaded.device.type, str(loaded.dtype).removeprefix("torch."), loading, memory.held())
    advance()

    asked, given = cycle(queries), cycle(documents)
    reranker.rank(next(asked), list(islice(given, count)))
    advance()
    memory.reset()
    end = time.perf_counter() + seconds
    for run in range(runs):
        if run and time.perf_counter() >= end:
            break
        query, batch = next(asked), list(islice(given, count))
        before = time.perf_counter()
        ranked = reranker.rank(query, batch)
        found.seconds.append(time.perf_counter() - before)
        found.documents.append(len(batch))
        found.tokens.append(ranked.tokens)
        advance()
    found.peak_bytes = memory.peak()
    return found


class _Memory:
    """What is held, and the most that was: the GPU's own count on CUDA, else the process's, where Linux tells it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held(self) -> int | None:
        gc.collect()
        if self._device.type == "cuda":
            import torch

            return torch.cuda.memory_allocated(self._device)
        return _status("VmRSS")

    def reset(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            with suppress(OSError):  # a container may forbid it: then loading counts too
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM")


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
