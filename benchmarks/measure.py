"""How things are measured: processor seconds, peak memory, agreement of scores; and on what machine."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).with_name("results")
MIB = 2**20

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What `work` returns, its seconds of processor time over all threads, and of wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    answer = work()
    return answer, time.process_time() - cpu, time.perf_counter() - wall


def resident() -> int:
    """Bytes of memory this process holds now, after giving back what it can (Linux)."""
    gc.collect()
    # Else what an earlier run freed, and the allocator kept, would count as the model's.
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and the most bytes of memory the process held meanwhile (Linux)."""
    resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    answer = work()
    return answer, _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    msg = f"/proc/self/status has no {name}; expected Linux"
    raise OSError(msg)


def agreement(logits: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """How far logits are from the reference's: in its standard deviations, and by Spearman's rank correlation."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    spread = statistics.pstdev(reference)
    differences = [a - b for a, b in zip(logits, reference, strict=True)]
    return {
        "max_difference_std": max(map(abs, differences)) / spread,
        "rms_difference_std": math.sqrt(statistics.fmean(d * d for d in differences)) / spread,
        "rank_correlation": float(spearmanr(logits, reference).statistic),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def machine() -> dict[str, object]:
    """The machine, without its name."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = models[0] if models else processor
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Of what decides a figure."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("zerank-integrations", "torch", "transformers", "sentence-transformers", "tokenizers", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write(kind: str, figures: dict[str, Any], output: Path | None, *, quick: bool = False) -> Path | None:
    """Write figures with their date, machine and versions as JSON.

    Args:
        kind: which benchmark; the file's name begins with it.
        figures: what was measured.
        output: the file; by default one named by kind and time under results/.
        quick: a trial, which is no result: only written where `output` says.

    Returns:
        The file, or None when a trial was not to be kept.
    """
    now = datetime.datetime.now(datetime.UTC)
    if output is None:
        if quick:
            return None
        output = RESULTS / f"{kind}-{now:%Y%m%d-%H%M}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"kind": kind, "date": f"{now:%Y-%m-%d %H:%M} UTC", "quick": quick, "machine": machine(), "versions": versions()}
    output.write_text(json.dumps(record | figures, indent=1) + "\n", encoding="utf-8")
    return output


def newest(kind: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The latest figures of a kind under results/, by the time in their name."""
    files = sorted(folder.glob(f"{kind}-*.json"))
    if not files:
        return None
    found: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return found
