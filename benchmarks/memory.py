"""The peak of memory of every contender, each in a process that has scored nothing else.

Apart from the table of processor seconds: there a process goes through all cells, and what its libraries keep of an earlier
cell (kernels made for its shapes, heaps that are in pieces) would count as the memory of a later one.

Run it:

    python -m benchmarks.memory                             into benchmarks/results/
    python -m benchmarks.memory --quick --output trial.json does it run at all
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.contenders import CONTENDERS
from benchmarks.cpu import DOCUMENTS, KILOBYTES, Cell, Texts, chosen
from benchmarks.lane import Remote
from benchmarks.measure import MIB, write
from benchmarks.standin import STAND_IN, TINY, checkpoint

QUERY_TOKENS = 50


def main(
    *,
    contenders: Annotated[list[str] | None, typer.Option("--contender", help=f"Of {', '.join(CONTENDERS)}.")] = None,
    dtype: Annotated[str, typer.Option(help="What is computed in.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="A trial: a tiny model and one small cell.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Measure the peak above the loaded model, and write JSON."""
    names = chosen(contenders)
    shape = TINY if quick else STAND_IN
    cells = [Cell(4, QUERY_TOKENS, 12)] if quick else [Cell(kilobytes, QUERY_TOKENS, DOCUMENTS) for kilobytes in KILOBYTES]
    folder = checkpoint(shape)
    texts = Texts.of_checkpoint(folder)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cells) * len(names), unit="process", desc="memory") as bar:
        for cell in cells:
            query, documents = texts.of(cell, 0)
            peaks = {}
            for name in names:
                remote = Remote(name, folder, dtype, None)
                peaks[name] = remote.run(query, documents)["peak_bytes"]
                remote.close()
                bar.update()
            rows.append({"kilobytes": cell.kilobytes, "query_tokens": cell.query_tokens, "peak_bytes": peaks})
    settings = {"dtype": dtype, "threads": 1, "documents": cells[0].documents}
    file = write("memory", {"settings": settings, "cells": rows}, output, quick=quick or contenders is not None)
    for row in rows:
        typer.echo(f"{row['kilobytes']} kB, query of {row['query_tokens']} tokens")
        for name, peak in row["peak_bytes"].items():
            typer.echo(f"  {name:26} {peak / MIB:6.0f} MiB")
    typer.echo(f"written: {file}" if file else "a trial: not written (use --output FILE)")


if __name__ == "__main__":
    typer.run(main)
