"""Bytes of memory per judgment: `judge` and `rate` on the embedded collection, with one round of pairs and with three.

    python -m benchmarks.judgments

Each stage runs in a process of its own; what three rounds take more than one, divided by the judgments they have more, is what
each judgment of a larger run will take.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measure import MIB, peak, write

STAGES = ("judge", "rate")
# 10,000 queries, 300 pairs and 5 % audits, three judges.
LARGE = round(10_000 * 300 * 1.05 * 3)


def main(
    *,
    folder: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    stage: Annotated[str | None, typer.Argument(hidden=True)] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Measure the memory of a run, and write JSON."""
    if folder is not None and stage is not None:
        _one(folder, stage)
        return
    found: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in STAGES}
    with tempfile.TemporaryDirectory() as place:
        for rounds in (1, 3):
            workspace = Path(place) / str(rounds)
            _made(workspace, rounds)
            for name in STAGES:
                command = [sys.executable, "-m", "benchmarks.judgments", str(workspace), name]
                bytes, judgments = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
                found[name][rounds] = int(bytes), int(judgments)
                typer.echo(f"{name}, {rounds} rounds: {int(bytes) / MIB:.0f} MiB above the start, {int(judgments):,} judgments")
    each = {}
    for name, by_rounds in found.items():
        (few, fewer), (many, more) = by_rounds[1], by_rounds[3]
        each[name] = (many - few) / (more - fewer)
        typer.echo(f"{name}: {each[name]:.0f} bytes a judgment; {LARGE:,} would take {each[name] * LARGE / 1e9:.1f} GB")
    typer.echo(f"written: {write('judgments', {'bytes_per_judgment': each}, output)}")


def _made(folder: Path, rounds: int) -> None:
    from zelo_train import pipeline
    from zelo_train.config import read, template
    from zelo_train.store import Workspace

    folder.mkdir()
    judges = [{"name": f"simulated-{n}", "kind": "simulated", "accuracy": n} for n in (90, 80, 70)]
    (folder / "zelo.yaml").write_text(template({"judge.judges": judges, "judge.pairs.rounds": rounds}), encoding="utf-8")
    workspace = Workspace(folder)
    pipeline.collect(workspace, read(workspace.settings))
    # Answered here, so that what is measured is the same with judges that are slow.
    pipeline.judge(workspace, read(workspace.settings))


def _one(folder: Path, stage: str) -> None:
    """Print the most memory above the start that a stage held, and how many judgments there are."""
    from zelo_train import pipeline
    from zelo_train.config import read
    from zelo_train.store import Workspace

    workspace = Workspace(folder)
    config = read(workspace.settings)
    # What is loaded once, whatever a run's size.
    pipeline.state(workspace, config, "rate")
    before = peak(lambda: pipeline.collected(workspace))[1]
    _, most = peak(lambda: getattr(pipeline, stage)(workspace, config))
    with workspace.store() as store:
        typer.echo(f"{most - before} {sum(store.counts().values())}")


if __name__ == "__main__":
    typer.run(main)
