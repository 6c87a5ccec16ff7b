"""One run at the true shape of zerank-1-small: random bfloat16 weights of 3.4 GB on disk, loaded and used as a user would.

Run it:

    python -m benchmarks.full_shape                # needs 4 GB of disk in the temporary folder and 6 GB of memory
    python -m benchmarks.full_shape --rivals       # sentence-transformers on the same weights as well; takes longer
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import MIB, write

# A fifth of 100 documents that make 75 kB.
CHARACTERS, DOCUMENTS, QUERY_TOKENS = 15_000, 20, 50


def main(
    *,
    shape: Annotated[str, typer.Option(help="zerank-1-small, zerank-2, stand-in or tiny.")] = "zerank-1-small",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a matrix product; by default all cores.")] = None,
    rivals: Annotated[bool, typer.Option("--rivals", help="Measure sentence-transformers too, batch 8 and 32.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoint is written; by default a temporary folder.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A trial: the tiny shape.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Build the checkpoint, then load and score in fresh processes."""
    from benchmarks.standin import SHAPES, write_shards

    chosen = SHAPES["tiny" if quick else shape]
    threads = threads or os.cpu_count() or 1
    names = ["ours", *(["ST batch 8", "ST batch 32"] if rivals else [])]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        typer.echo(f"writing {2 * (chosen.body + chosen.head) / 1e9:.1f} GB of random weights")
        written = write_shards(chosen, Path(temporary) / "checkpoint")
        found: dict[str, Any] = {}
        for name in names:
            typer.echo(f"{name}: loading and scoring {DOCUMENTS} documents")
            # A process of its own: its memory begins empty, and what it loads is its own.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(_measured, (name, written, threads))
    settings = {"documents": DOCUMENTS, "characters": CHARACTERS, "query_tokens": QUERY_TOKENS, "threads": threads}
    trial = quick or shape != "zerank-1-small"
    file = write("full-shape", {"settings": settings | {"dtype": "bfloat16"}, "contenders": found}, output, quick=trial)
    for name, one in found.items():
        typer.echo(
            f"{name:12} loaded in {one['load_s']:.1f} s, {one['loaded_bytes'] / MIB:.0f} MiB; scoring: "
            f"{one['wall_s']:.1f} s wall, {one['cpu_s']:.1f} CPU s, {DOCUMENTS / one['wall_s']:.2f} documents/s, "
            f"{one['tokens']} tokens, {one['peak_bytes'] / MIB:.0f} MiB above the model"
        )
    typer.echo(f"written: {file}" if file else "a trial: not written (use --output FILE)")


def _measured(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Load and score in this process."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

    import torch
    from transformers import AutoTokenizer

    from benchmarks import payload
    from benchmarks.contenders import CONTENDERS, counting
    from benchmarks.measure import peak, resident, timed

    torch.set_num_threads(threads)
    tokens = AutoTokenizer.from_pretrained(folder)
    query = payload.query(QUERY_TOKENS, 0, lambda text: len(tokens.encode(text, add_special_tokens=False)))
    documents = payload.documents(CHARACTERS, 0, DOCUMENTS)
    before = resident()
    contender, load_cpu, load_wall = timed(lambda: CONTENDERS[name](folder, "bfloat16"))
    loaded = resident()
    count = counting(contender.decoder)
    (logits, cpu, wall), most = peak(lambda: timed(lambda: contender(query, documents)))
    return {
        "load_s": load_wall,
        "load_cpu_s": load_cpu,
        "loaded_bytes": loaded - before,
        "peak_bytes": most - loaded,
        "cpu_s": cpu,
        "wall_s": wall,
        "tokens": count(),
        "logits": logits,
    }


if __name__ == "__main__":
    typer.run(main)
