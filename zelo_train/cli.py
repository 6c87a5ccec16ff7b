"""The `zelo` command: one function per stage, and what looks at the workspace.

Only what `zelo --help` needs is imported here; numpy and the rest come with the command that computes.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zelo_train.errors import ZeloError
from zerank_integrations.errors import ZerankError
from zerank_integrations.shell import FAILURE, Mistake, Shell

if TYPE_CHECKING:
    from zelo_train.config import Config
    from zelo_train.judge.ask import Departure
    from zelo_train.store import Workspace

shell = Shell(
    "zelo",
    "From documents and queries to calibrated labels: collect, judge, rate.",
    failures=[ZeloError, ZerankError],
    interrupted="interrupted; what was done is kept: run the same command again to go on",
)
app = shell.app


def main() -> None:
    """Run the command of `sys.argv` and exit with its status."""
    # Small matrices by the hundred thousand: more threads make them many times slower. Before numpy is loaded.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    shell.main()


Folder = Annotated[Path, typer.Option("--workspace", "-w", help="The folder with zelo.yaml.", show_default="here")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Send texts to the judges' hosts without asking.")]

HERE = Path()


def _open(folder: Path) -> tuple[Workspace, Config]:
    """A workspace and its settings."""
    from zelo_train.config import read
    from zelo_train.store import Workspace

    workspace = Workspace(folder)
    return workspace, read(workspace.settings)


@contextmanager
def _writing(folder: Path) -> Iterator[tuple[Workspace, Config]]:
    """The same, with nobody else writing."""
    workspace, config = _open(folder)
    with workspace.lock():
        yield workspace, config


def _where(folder: Path) -> str:
    """What a further command needs to find the workspace."""
    return "" if folder == HERE else f" -w {shlex.quote(str(folder))}"


def _watched() -> bool:
    """Whether somebody sees bars."""
    return sys.stderr.isatty()


def _confirm(config: Config, *, yes: bool) -> Callable[[Sequence[Departure]], bool]:
    """Tells what would leave this machine, and asks."""

    def confirm(leaving: Sequence[Departure]) -> bool:
        for one in leaving:
            shell.say(f"texts go to {one.line(config.judge.currency)}")
        if yes:
            return True
        if not sys.stdin.isatty():
            raise Mistake("texts would leave this machine and nobody can be asked; expected a terminal, or --yes")
        return typer.confirm("zelo: send them?", default=False, err=True)

    return confirm


@shell.command
def init(
    *,
    folder: Annotated[Path, typer.Argument(help="Made if it does not exist.")] = HERE,
    source: Annotated[
        str | None, typer.Option("--source", "-s", help="A BEIR folder or a folder of texts.", show_default="embedded")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing zelo.yaml.")] = False,
) -> None:
    """Write a zelo.yaml with every setting.

    Each has its meaning and its default beside it. Without --source it uses the collection inside the package and simulated
    judges, so that all stages run offline.
    """
    from zelo_train.config import template
    from zelo_train.store import SETTINGS, write_whole

    path = folder / SETTINGS
    if path.exists() and not force:
        raise Mistake(f"{path} is there already; expected a new workspace. Replace it with --force")
    if source is None:
        # Three that differ, as an ensemble does.
        simulated = [{"name": f"simulated-{n}", "kind": "simulated", "accuracy": n} for n in (90, 80, 70)]
        values: dict[str, Any] = {"judge.judges": simulated}
        told = "the embedded collection with judges simulated from its qrels: for trying, not for training"
    else:
        found = Path(source).expanduser()
        if not found.is_dir():
            raise Mistake(f"{source} is no folder; expected a BEIR folder or a folder of texts")
        # Relative paths in zelo.yaml start from it, not from where this command runs.
        values = {"collect.source": str(found.resolve())}
        told = f"{source}; name your judges under judge.judges"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, template(values))
    except OSError as error:
        raise Mistake(f"{path} cannot be written: {error.strerror}") from None
    print(f"wrote {path}: {told}\nnext: zelo collect{_where(folder)}")


@shell.command
def collect(
    *,
    workspace: Folder = HERE,
    again: Annotated[bool, typer.Option("--again", help="Even if nothing has changed.")] = False,
    yes: Yes = False,
) -> None:
    """Read documents and queries, check them, find candidates."""
    from zelo_train import pipeline

    with _writing(workspace) as (opened, config):
        _, report = pipeline.collect(opened, config, again=again, progress=_watched(), confirm=_confirm(config, yes=yes))
    print(report, end="")


@shell.command
def judge(
    *,
    workspace: Folder = HERE,
    estimate: Annotated[bool, typer.Option("--estimate", help="Tell calls, tokens, money and time; ask nothing.")] = False,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="Print what judges read, and exit.")] = False,
    pilot: Annotated[bool, typer.Option("--pilot", help="Ask pairs of known order only, and tell whether to go on.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="With --pilot: a person's filled-in sheet.", show_default="the collection's grades")
    ] = None,
    write_sheet: Annotated[Path | None, typer.Option(help="Write a .csv sheet of pairs for a person, and exit.")] = None,
    batches: Annotated[
        bool,
        typer.Option("--batches", help="Take what a provider's batch API has done, hand it the next round, and exit."),
    ] = False,
    write_batches: Annotated[
        Path | None, typer.Option(help="Write the next round as files for a batch API into this folder, and exit.")
    ] = None,
    read_batches: Annotated[
        list[Path] | None, typer.Option(help="Keep the answers in a batch API's output file, and exit; repeatable.")
    ] = None,
    drop_batches: Annotated[bool, typer.Option("--drop-batches", help="Give up batches that were not read, and exit.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Ask again what a judge gave up on.")] = False,
    yes: Yes = False,
) -> None:
    """Ask the judges. A run that was stopped goes on where it was.

    Before the first text leaves this machine, host, volume and money are named and confirmed. judge.cap is never passed.
    """
    from zelo_train import pipeline

    modes = {
        "--estimate": estimate,
        "--show-prompt": show_prompt,
        "--pilot": pilot,
        "--write-sheet": write_sheet is not None,
        "--batches": batches,
        "--write-batches": write_batches is not None,
        "--read-batches": bool(read_batches),
        "--drop-batches": drop_batches,
    }
    chosen = [name for name, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise typer.BadParameter(f"it does not go with {chosen[1]}; expected one of them", param_hint=chosen[0])
    if show_prompt:
        from zelo_train.judge.prompt import Prompts

        _, config = _open(workspace)
        print(Prompts.read(config.judge.criterion).preview())
        return
    if sheet is not None and not pilot:
        raise typer.BadParameter("it goes with --pilot", param_hint="--sheet")
    if write_sheet is not None:
        from zelo_train.judge.pilot import LEAST

        opened, config = _open(workspace)
        count = pipeline.write_sheet(opened, config, write_sheet)
        print(f"wrote {count} pairs to {write_sheet}: fill in `preferred` with left, right or tie")
        if count < LEAST:
            shell.say(f"a pilot needs {LEAST} of them; there are no more: collect more queries")
        return
    with _writing(workspace) as (opened, config):
        if batches:
            confirm = _confirm(config, yes=yes)
            waiting = pipeline.batches(opened, config, confirm=confirm, say=shell.say, progress=_watched())
            if not waiting:
                print("every round is answered; next: zelo judge, which asks what little is left")
            return
        if write_batches is not None:
            what, files = pipeline.write_batches(opened, config, write_batches)
            for file in files:
                print(f"wrote {file.path}: {len(file.questions):,} questions of {what}")
            if not files:
                print(f"nothing to write: {what} is answered or under way; `zelo judge` asks what is left")
            return
        if drop_batches:
            dropped = pipeline.drop_batches(opened)
            print(f"gave up {dropped} batch{'' if dropped == 1 else 'es'}; what was reserved stays counted")
            return
        if read_batches:
            missing = [path for path in read_batches if not path.is_file()]
            if missing:
                raise Mistake(f"{missing[0]} does not exist; expected a batch's output file")
            print(pipeline.read_batches(opened, config, read_batches))
            return
        if pilot:
            confirm = _confirm(config, yes=yes)
            found = pipeline.pilot(opened, config, sheet=sheet, confirm=confirm, progress=_watched())
            print("\n".join(found.lines(config.judge.currency)))
            if found.advice != "proceed":
                raise typer.Exit(FAILURE)
            return
        if estimate:
            from zelo_train.cost import table

            estimates, leaving = pipeline.outlook(opened, config)
            for line in table(estimates, config.judge.currency):
                print(line)
            for one in leaving:
                print(f"leaves this machine: {one.line(config.judge.currency)}")
            return
        _, report = pipeline.judge(
            opened, config, confirm=_confirm(config, yes=yes), retry=retry, progress=_watched(), say=shell.say
        )
    print(report, end="")


@shell.command
def rate(*, workspace: Folder = HERE) -> None:
    """Turn answers into ratings and targets."""
    from zelo_train import pipeline

    with _writing(workspace) as (opened, config):
        _, report = pipeline.rate(opened, config)
    print(report, end="")


@shell.command
def simulate(
    *,
    table: Annotated[
        Literal["pairs", "orders", "soft", "lists", "judges", "coverage", "calibration", "weights", "all"],
        typer.Option(help="Which table to print."),
    ] = "all",
    queries: Annotated[int, typer.Option(min=2, help="Simulated queries of 100 documents.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    """Print the tables that the defaults rest on.

    Pair designs, judge terms, calibration and weights, under simulated judges.
    """
    from zelo_train import simulate

    simulate.show(table, queries, seed)


@shell.command
def status(
    *, workspace: Folder = HERE, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Show what is done, what is stale, who writes, and money spent."""
    from zelo_train import pipeline
    from zelo_train.cost import millionths, money
    from zelo_train.judge.batch import READ
    from zelo_train.store import Batch, Spend

    opened, config = _open(workspace)
    states = pipeline.status(opened, config)
    counts: dict[Any, int] = {}
    spent: list[Spend] = []
    batches: list[Batch] = []
    if opened.has_answers:
        with opened.store() as store:
            counts, spent = store.counts(), store.spent()
            batches = [one for one in store.batches() if one.state != READ]
    holder = opened.holder() if opened.locked else None
    settled, reserved = sum(one.settled for one in spent), sum(one.reserved for one in spent)
    cap = None if config.judge.cap is None else millionths(config.judge.cap)
    simulated = any(one.note is not None and one.note.simulated for one in states)
    if as_json:
        stages = {
            one.stage: {
                "state": one.state,
                "reasons": one.reasons,
                "finished": one.note.finished if one.note else None,
                "figures": one.note.figures if one.note else {},
            }
            for one in states
        }
        answers = [
            {"judge": name, "kind": kind.value, "status": status.value, "count": count}
            for (name, kind, status), count in counts.items()
        ]
        found = {
            "simulated": simulated,
            "stages": stages,
            "answers": answers,
            "spent": settled,
            "reserved": reserved,
            "cap": cap,
            "currency": config.judge.currency,
            "batches": [{"name": one.client, "judge": one.judge, "count": len(one.keys), "most": one.worst} for one in batches],
            "writer": str(holder) if holder else None,
        }
        print(json.dumps(found, indent=1))
        return
    if simulated:
        print(pipeline.SIMULATED)
    for one in states:
        figures = {**one.note.figures} if one.note else {}
        shown = ", ".join(f"{value:,} {name}" for name, value in figures.items() if isinstance(value, int) and "," not in name)
        print(f"{one.stage:8} {one.state:8} {one.note.finished if one.note else '':25} {shown}".rstrip())
        for reason in one.reasons:
            print(f"{'':8} {reason}")
    for (name, kind, status), count in counts.items():
        print(f"answers  {name}: {count:,} {kind.value}, {status.value}")
    limit = f" of {money(cap, config.judge.currency)}" if cap is not None else f" {config.judge.currency}, no cap"
    print(f"spent    {money(settled)}{limit}")
    for batch in batches:
        most = money(batch.worst, config.judge.currency)
        print(f"batch    {batch.client}: {len(batch.keys):,} questions to {batch.judge}, {batch.state}, at most {most}")
    lost = reserved - sum(one.worst for one in batches)
    if lost > 0 and holder is None:
        told = money(lost, config.judge.currency)
        print(f"         {told} more were under way when a run died or a batch was given up, and may have been charged")
    if holder is not None:
        print(f"writing  {holder}")
    left = next((one.stage for one in states if one.state != "done"), None)
    if left is not None and holder is None:
        print(f"next     zelo {left}{_where(workspace)}")


@shell.command
def answers(
    *,
    path: Annotated[Path, typer.Argument(help="A .parquet file; replaced.")],
    workspace: Folder = HERE,
) -> None:
    """Write all answers to a Parquet file, one row each."""
    from zelo_train import pipeline

    opened, _ = _open(workspace)
    with opened.store() as store:
        count = store.export(path, pipeline.names(opened))
    print(f"wrote {count:,} answers to {path}")
