"""Many clients at once: our worker, a lock around the same calls, and sentence-transformers behind a lock.

    python -m benchmarks.concurrency

Each client asks, waits for the answer and asks again. All contenders have the same one thread for matrix products.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.measure import percentile, write

CLIENTS, DOCUMENTS = (1, 8, 32), (1, 5, 100)
CHARACTERS, QUERY_TOKENS = 200, 20  # of one document; short ones, or 32 clients with 100 documents would take an hour

# At 8 clients with one document: no client waits much longer than another, and the queue costs no more than the turns in it.
P95_TO_P50, P50_TO_TURNS = 1.3, 1.2

Score = Callable[[str, Sequence[str]], object]


@dataclass(frozen=True, slots=True)
class Load:
    """What clients ask for: so many of them, each with so many documents a request."""

    clients: int
    documents: int
    beside: int = 0  # documents a request of one more client, whose times do not count

    @property
    def name(self) -> str:
        """As the table names it."""
        clients, documents = _number(self.clients, "client"), _number(self.documents, "document")
        return f"{clients}, {documents} each" + (f", beside one with {self.beside}" if self.beside else "")


def main(
    *,
    seconds: Annotated[float, typer.Option(min=0, help="Of each round of each load; no request begins later.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A trial: a tiny model, small loads.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; by default a new one in benchmarks/results/.")] = None,
) -> None:
    """Measure throughput and latency, check two bounds, and write JSON."""
    # Before torch is imported: the clients' threads, and the worker, take the number from here.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    from benchmarks.standin import STAND_IN, TINY, checkpoint

    loads = [Load(clients, documents) for clients in CLIENTS for documents in DOCUMENTS] + [Load(7, 1, beside=100)]
    if quick:
        loads, seconds, rounds = [Load(1, 1), Load(8, 1), Load(2, 1, beside=20)], min(seconds, 0.3), 1
    contenders = _contenders(checkpoint(TINY if quick else STAND_IN))
    found: dict[str, dict[str, dict[str, Any]]] = {
        load.name: {name: {"seconds": [], "wall_s": 0.0} for name in contenders} for load in loads
    }
    with tqdm(total=len(loads) * len(contenders) * rounds, unit="round", desc="concurrency") as bar:
        for load in loads:
            for turn in range(rounds):
                for name, score in contenders.items():
                    latencies, wall = _round(score, load, seconds, turn)
                    found[load.name][name]["seconds"] += latencies
                    found[load.name][name]["wall_s"] += wall
                    bar.update()
    for load in loads:
        for one in found[load.name].values():
            latencies = one.pop("seconds")
            one |= {"requests": len(latencies), "documents_per_s": len(latencies) * load.documents / one["wall_s"]}
            one |= {f"p{percent}_s": percentile(latencies, percent) for percent in (50, 95, 99)}
    checks = _checks(found)
    settings = {"seconds": seconds, "rounds": rounds, "threads": 1, "dtype": "bfloat16", "characters": CHARACTERS}
    file = write("concurrency", {"settings": settings, "checks": checks, "loads": found}, output, quick=quick)
    for name, contender in found.items():
        typer.echo(name)
        for who, one in contender.items():
            times = "  ".join(f"p{percent} {one[f'p{percent}_s'] * 1000:7.0f} ms" for percent in (50, 95, 99))
            typer.echo(f"  {who:10} {one['documents_per_s']:8.1f} documents/s  {times}  ({one['requests']} requests)")
    for check in checks:
        typer.echo(
            f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['found']:.2f}, expected at most {check['most']}"
        )
    typer.echo(f"written: {file}" if file else "a trial: not written (use --output FILE)")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _contenders(folder: Path) -> dict[str, Score]:
    import torch
    from sentence_transformers import CrossEncoder
    from transformers.utils.logging import disable_progress_bar

    from zerank_integrations import Reranker

    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    reranker = Reranker(folder, device="cpu", dtype="bfloat16").warm_up()
    encoder = CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.bfloat16})
    ours, theirs = threading.Lock(), threading.Lock()

    def locked(query: str, documents: Sequence[str]) -> object:
        with ours:
            return reranker.rank(query, documents)

    def sentence_transformers(query: str, documents: Sequence[str]) -> object:
        with theirs:
            return encoder.predict([(query, document) for document in documents], show_progress_bar=False)

    return {"worker": reranker.rank, "lock": locked, "ST + lock": sentence_transformers}


def _round(score: Score, load: Load, seconds: float, turn: int) -> tuple[list[float], float]:
    """Let the clients ask for some seconds, each once at least. Their latencies, and the wall time until the last answer."""
    latencies: list[list[float]] = [[] for _ in range(load.clients)]
    failures: list[BaseException] = []
    together = threading.Barrier(load.clients + bool(load.beside) + 1)
    over = threading.Event()

    def ask(client: int, documents: int, times: list[float]) -> None:
        try:
            requests = [_request(1000 * turn + 100 * number + client, documents) for number in range(4)]
            together.wait()
            end = time.perf_counter() + seconds
            while True:
                query, texts = requests[len(times) % len(requests)]
                # Numbered, so that no request repeats an earlier one.
                texts = [f"{len(times)} {text}" for text in texts]
                begun = time.perf_counter()
                score(query, texts)
                times.append(time.perf_counter() - begun)
                if time.perf_counter() >= end or over.is_set():
                    return
        except BaseException as error:
            failures.append(error)
            # Else the others would wait at it for ever.
            together.abort()

    clients = [threading.Thread(target=ask, args=(client, load.documents, times)) for client, times in enumerate(latencies)]
    companions = [threading.Thread(target=ask, args=(99, load.beside, []))] if load.beside else []
    for thread in (*clients, *companions):
        thread.start()
    with suppress(threading.BrokenBarrierError):
        together.wait()
    begun = time.perf_counter()
    for thread in clients:
        thread.join()
    wall = time.perf_counter() - begun
    over.set()
    for thread in companions:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    return [time for times in latencies for time in times], wall


def _request(seed: int, documents: int) -> tuple[str, list[str]]:
    from benchmarks import payload

    # Words for tokens: here their exact number does not matter.
    query = payload.query(QUERY_TOKENS, seed, lambda text: len(text.split()))
    return query, payload.documents(CHARACTERS * documents, seed, documents)


def _checks(found: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    alone, eight = (found[Load(clients, 1).name]["worker"] for clients in (1, 8))
    steadiness = eight["p95_s"] / eight["p50_s"]
    turns = eight["p50_s"] / (8 * alone["p50_s"])
    return [
        {
            "what": "worker, 8 clients, 1 document each: p95 / p50",
            "found": steadiness,
            "most": P95_TO_P50,
            "ok": steadiness <= P95_TO_P50,
        },
        {
            "what": "the same: p50 / 8 times the p50 of one client alone",
            "found": turns,
            "most": P50_TO_TURNS,
            "ok": turns <= P50_TO_TURNS,
        },
    ]


if __name__ == "__main__":
    typer.run(main)
