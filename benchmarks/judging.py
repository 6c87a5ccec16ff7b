"""How many questions one process asks: real HTTP to a server in another process that takes 50 ms for each answer.

    python -m benchmarks.judging

What is measured is the whole of asking: prompts with their fences, HTTP, reading log-probabilities, the budget, and a commit to
SQLite for each answer.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from tqdm import tqdm

from benchmarks.measure import timed, write
from tests import openai_server
from zelo_train.cost import Budget, Price
from zelo_train.judge.ask import Ensemble
from zelo_train.judge.judges import ChatJudge
from zelo_train.llm import Endpoint
from zelo_train.records import Kind, Question
from zelo_train.store import Store

# Questions a second by the clock.
LEAST = 700

WORDS = ("amber", "birch", "coral", "dune", "ember", "fjord", "grove", "harbour", "island", "juniper")


def main(
    *,
    questions: Annotated[int, typer.Option(min=1, help="Of each round.")] = 5000,
    rounds: Annotated[int, typer.Option(min=1, help="The median counts.")] = 3,
    delay: Annotated[float, typer.Option(min=0, help="Seconds the server takes for an answer.")] = 0.05,
    in_flight: Annotated[int, typer.Option(min=1, help="Questions under way at once.")] = 100,
    words: Annotated[int, typer.Option(min=1, help="Of each of the two documents of a question.")] = 150,
    quick: Annotated[bool, typer.Option("--quick", help="A trial: one short round.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Measure questions per second, by the clock and per second of this process's CPU, and write JSON."""
    if quick:
        questions, rounds = min(questions, 500), 1
    draw = random.Random(0)
    documents = {
        f"d{n}": f"It is worth {draw.random():.4f}. " + " ".join(draw.choice(WORDS) for _ in range(words)) for n in range(500)
    }
    by_wall, by_cpu = [], []
    with openai_server.running(delay=delay) as server, tqdm(total=rounds, unit="round", desc="judging") as bar:
        for turn in range(rounds):
            wall, cpu = _round(server.base_url, documents, questions, in_flight, turn)
            by_wall.append(questions / wall)
            by_cpu.append(questions / cpu)
            bar.update()
    found = {"per_second": median(by_wall), "per_cpu_second": median(by_cpu), "rounds": by_wall}
    settings = {"questions": questions, "delay_s": delay, "in_flight": in_flight, "words": words}
    file = write("judging", {"settings": settings, **found}, output, quick=quick)
    typer.echo(
        f"{found['per_second']:.0f} questions per second by the clock"
        f" ({', '.join(f'{one:.0f}' for one in by_wall)}; a server of {delay * 1000:g} ms and {in_flight} in flight allow"
        f" {in_flight / delay if delay else float('inf'):.0f})"
    )
    typer.echo(f"{1000 / found['per_cpu_second']:.2f} ms of CPU per question")
    typer.echo(f"{'ok  ' if found['per_second'] >= LEAST else 'MISS'} expected at least {LEAST} per second by the clock")
    typer.echo(f"written: {file}" if file else "a trial: not written (use --output FILE)")


def _round(base_url: str, documents: dict[str, str], count: int, in_flight: int, turn: int) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU, for so many questions that nobody asked before."""
    draw = random.Random(turn)
    asked = [Question(Kind.COMPARE, ("q",), tuple(draw.sample(sorted(documents), 2))) for _ in range(count + 100)]
    judge = ChatJudge(
        "judge", "test-model", Endpoint(base_url, in_flight=in_flight), price=Price(150_000, 600_000), concurrency=in_flight
    )
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "answers.db", write=True) as store:
        ensemble = Ensemble(
            [judge], {"q": "what is it worth?"}.__getitem__, documents.__getitem__, store, Budget(store, "run", 10**12)
        )
        # What is imported and connected at first is no question's cost.
        ensemble.ask(asked[:100])
        judgments, cpu, wall = timed(lambda: ensemble.ask(asked[100:]))
    missing = sum(not judgment.answered for judgment in judgments)
    if missing:
        raise RuntimeError(f"{missing} of {count} questions have no answer; expected all: the server is at fault")
    return wall, cpu


if __name__ == "__main__":
    typer.run(main)
