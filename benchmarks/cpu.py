"""The table: processor seconds and tokens of every contender, on one thread in bfloat16, in interleaved runs.

Run it:

    python -m benchmarks.cpu                               the whole table, into benchmarks/results/
    python -m benchmarks.cpu --only 75x50 --runs 1         a quick look at one cell
    python -m benchmarks.cpu --quick --output trial.json   does it run at all
"""

from __future__ import annotations

import os
import queue
import random
import statistics
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks import payload
from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.lane import Remote
from benchmarks.measure import agreement, versions, write
from benchmarks.standin import STAND_IN, TINY, checkpoint

KILOBYTES, QUERY_TOKENS, DOCUMENTS = (4, 12, 75, 150), (10, 50, 300), 100

# Where scores are held against a float32 reference, one prompt a pass, which is slow.
REFERENCED = 50

# A contender that takes more CPU seconds than this in a cell runs there three times only: the whole table is to take minutes.
PATIENCE, ENOUGH = 20, 3

FIGURES = ("cpu_s", "wall_s", "tokens")


@dataclass(frozen=True, slots=True)
class Cell:
    """One payload with one length of query, and what each contender took for it."""

    kilobytes: int
    query_tokens: int
    documents: int
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As `--only` names it."""
        return f"{self.kilobytes}x{self.query_tokens}"


@dataclass(frozen=True, slots=True)
class Texts:
    """Makes the texts of a run."""

    count: Callable[[str], int]

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Texts:
        """Measured in the tokens of a checkpoint."""
        tokens = AutoTokenizer.from_pretrained(folder)
        return cls(lambda text: len(tokens.encode(text, add_special_tokens=False)))

    def of(self, cell: Cell, run: int) -> tuple[str, list[str]]:
        """Query and documents; each run has its own, the same for all contenders."""
        query = payload.query(cell.query_tokens, run, self.count)
        return query, payload.documents(cell.kilobytes * 1000, run, cell.documents)


def main(
    *,
    runs: Annotated[int, typer.Option(min=1, help="Interleaved runs per cell; medians are reported.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Cells, as 75x50: kilobytes and tokens of the query.")] = None,
    contenders: Annotated[list[str] | None, typer.Option("--contender", help=f"Of {', '.join(CONTENDERS)}.")] = None,
    lanes: Annotated[int | None, typer.Option(min=1, help="Cells measured at once, each on a core of its own.")] = None,
    dtype: Annotated[str, typer.Option(help="What is computed in.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="A trial: a tiny model, one small cell, two runs at most.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Measure every contender on every cell, and write JSON."""
    names = chosen(contenders)
    shape, cells = (TINY, [Cell(4, 50, 12)]) if quick else (STAND_IN, _cells(only))
    if quick:
        runs, lanes = min(runs, 2), 1
    # Where the operating system's other work runs on a core as well, fewer lanes than cores are steadier.
    lanes = min(lanes or min(2, os.cpu_count() or 1), len(cells))
    folder = checkpoint(shape)
    texts = Texts.of_checkpoint(folder)
    _measure(cells, names, folder, texts, runs, lanes, dtype)
    figures = {
        "settings": {"runs": runs, "lanes": lanes, "threads": 1, "dtype": dtype, "documents": cells[0].documents}
        | {"patience_s": PATIENCE, "enough": ENOUGH},
        "model": asdict(shape) | {"parameters": shape.body + shape.head, "head_share": shape.head / shape.body},
        "skipped": {"vLLM": vllm()},
        "cells": [asdict(cell) for cell in sorted(cells, key=lambda cell: (cell.kilobytes, cell.query_tokens))],
    }
    whole = not (quick or only or contenders or runs < 5)
    file = write("cpu", figures, output, quick=not whole)
    for cell in cells:
        typer.echo(f"{cell.kilobytes} kB, query of {cell.query_tokens} tokens")
        for name, found in cell.contenders.items():
            seconds, tokens = statistics.median(found["cpu_s"]), statistics.median(found["tokens"])
            typer.echo(f"  {name:26} {seconds:8.3f} CPU s  {tokens:8.0f} tokens")
    typer.echo(f"vLLM: {vllm()}")
    typer.echo(f"written: {file}" if file else "a trial: not written (use --output FILE)")


def chosen(names: list[str] | None) -> list[str]:
    """The contenders that were named; all when none were."""
    if unknown := [name for name in names or () if name not in CONTENDERS]:
        raise typer.BadParameter(f"there is no {unknown}; expected some of {list(CONTENDERS)}", param_hint="--contender")
    return names or list(CONTENDERS)


def vllm() -> str:
    """Why vLLM is not among the contenders."""
    found = versions()["vllm"]
    return f"skipped: {f'{found} is here, but not measured' if found else 'not installed'}; its CPU build is served apart"


def _cells(only: list[str] | None) -> list[Cell]:
    # The longest first, so that the lanes end together.
    cells = [Cell(kilobytes, tokens, DOCUMENTS) for kilobytes in reversed(KILOBYTES) for tokens in reversed(QUERY_TOKENS)]
    if only is None:
        return cells
    names = [cell.name for cell in cells]
    if unknown := [name for name in only if name not in names]:
        raise typer.BadParameter(f"there is no cell {unknown}; expected some of {names}", param_hint="--only")
    return [cell for cell in cells if cell.name in only]


def _measure(cells: list[Cell], names: list[str], folder: Path, texts: Texts, runs: int, lanes: int, dtype: str) -> None:
    """Fill the cells. Each lane has all contenders as processes on one core, of which one runs at a time."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    failures: list[BaseException] = []
    cores = sorted(os.sched_getaffinity(0))

    def work(core: int | None) -> None:
        remotes = [Remote(name, folder, dtype, core) for name in names]
        reference = Remote(REFERENCE, folder, "float32", core)
        try:
            while not failures:
                _fill(waiting.get_nowait(), remotes, reference, texts, runs, bar)
        except queue.Empty:
            for remote in (*remotes, reference):
                remote.close()
        except BaseException as error:
            failures.append(error)

    with tqdm(total=len(cells) * len(names) * runs, unit="run", desc="cpu") as bar:
        lanes_at_work = [
            threading.Thread(target=work, args=(cores[lane] if lanes > 1 else None,), daemon=True) for lane in range(lanes)
        ]
        for lane in lanes_at_work:
            lane.start()
        for lane in lanes_at_work:
            lane.join()
    if failures:
        raise failures[0]


def _fill(cell: Cell, remotes: list[Remote], reference: Remote, texts: Texts, runs: int, bar: tqdm) -> None:
    """One cell: all contenders in turn, `runs` times."""
    cell.contenders.update({remote.name: {figure: [] for figure in FIGURES} | {"agreement": None} for remote in remotes})
    order = list(remotes)
    for run in range(runs):
        query, documents = texts.of(cell, run)
        exact = reference.run(query, documents)["logits"] if run == 0 and cell.query_tokens == REFERENCED else None
        # In another order each time: what one run leaves in the processor's caches must not always meet the same successor.
        random.Random(run).shuffle(order)
        for remote in order:
            kept = cell.contenders[remote.name]
            if run >= ENOUGH and kept["cpu_s"][0] > PATIENCE:
                bar.update()
                continue
            found = remote.run(query, documents)
            for figure in FIGURES:
                kept[figure].append(found[figure])
            if exact is not None:
                kept["agreement"] = agreement(found["logits"], exact)
            bar.update()


if __name__ == "__main__":
    typer.run(main)
