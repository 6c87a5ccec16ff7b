"""`zerank bench`: what it measures, prints and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging
from typer.testing import CliRunner, Result

from zerank_integrations import Reranker
from zerank_integrations.bench import Bench, bench
from zerank_integrations.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
TEXTS = ["a file path", "bread and butter", "the moon and a planet"]


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def run(model: Path, *arguments: object, stdin: str | None = None) -> Result:
    options = ("--device", "cpu", "--dtype", "float32", "--runs", "3", "--documents", "2")
    result = CliRunner().invoke(app, ["bench", str(model), *options, *map(str, arguments)], input=stdin, prog_name="zerank")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def figures(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.txt"
    file.write_text("\n".join(TEXTS))
    return file


def test_figures_add_up(tiny_causal_lm: Path, notes: Path) -> None:
    found = figures(run(tiny_causal_lm, notes, "-q", "what is read", "--json"))
    assert (found["runs"], found["documents"], len(found["seconds"])) == (3, 6, 3)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["documents_per_s"] == pytest.approx(6 / sum(found["seconds"]))
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / sum(found["seconds"]))
    assert min(found["seconds"]) <= found["p50_s"] <= found["p95_s"] <= max(found["seconds"])
    # Three texts in requests of two, the uncounted one first: in six of them each text comes twice.
    with Reranker(tiny_causal_lm, device="cpu", dtype="float32") as reranker:
        assert found["tokens"] == 2 * reranker.rank("what is read", TEXTS).tokens
    if sys.platform == "linux":
        assert found["peak_bytes"] >= found["model_bytes"] > 10 * 2**20


def test_what_is_printed(tiny_causal_lm: Path, notes: Path) -> None:
    found = run(tiny_causal_lm, notes)
    assert found.exit_code == 0
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["device", "requests", "documents", "tokens", "latency"]
    assert lines[0].startswith("device      cpu, float32, loaded in ")
    assert lines[1].startswith("requests    3 of 2 documents, ")


def test_the_embedded_collection_by_default(tiny_causal_lm: Path) -> None:
    assert figures(run(tiny_causal_lm, "--json"))["documents"] == 6


def test_standard_input_and_a_field(tiny_causal_lm: Path) -> None:
    records = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    assert figures(run(tiny_causal_lm, "-", "--field", "body", "--json", stdin=records))["documents"] == 6


def test_no_request_begins_after_the_time(tiny_causal_lm: Path, notes: Path) -> None:
    assert figures(run(tiny_causal_lm, notes, "--seconds", 0, "--json"))["runs"] == 1


def test_each_step_is_told(tiny_causal_lm: Path) -> None:
    steps = []
    with Reranker(tiny_causal_lm, device="cpu", dtype="float32") as reranker:
        found = bench(reranker, ["q"], TEXTS, count=1, runs=4, seconds=60, advance=lambda: steps.append(1))
    assert len(steps) == 1 + 1 + 4  # loaded, the uncounted request, the runs
    assert found.documents == [1, 1, 1, 1]


def test_percentiles() -> None:
    found = Bench("cpu", "float32", 0.0, None, seconds=[0.4, 0.1, 0.2, 0.3, 0.5])
    assert [found.percentile(percent) for percent in (0, 50, 100)] == [0.1, 0.3, 0.5]
    assert found.percentile(95) == pytest.approx(0.48)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.txt"], 1, "nowhere.txt cannot be read"),
        (["-"], 1, "there is no document in -"),
        (["--device", "abacus"], 1, "device is 'abacus'"),
        (["--query", " "], 2, "expected what is looked for"),
        (["--field", "body"], 2, "expected a FILE"),
        (["--documents", "0"], 2, "--documents"),
    ],
)
def test_mistakes(tiny_causal_lm: Path, arguments: list[str], status: int, message: str) -> None:
    found = run(tiny_causal_lm, *arguments, stdin="")
    assert (found.exit_code, found.stdout) == (status, "")
    assert message in found.stderr


def test_the_page_names_every_figure(tiny_causal_lm: Path, notes: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    own = figures(run(tiny_causal_lm, notes, "--json"))
    assert [name for name in own if name not in ("model", "documents_per_run") and f"`{name}`" not in page] == []


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_a_bar_where_someone_watches(tiny_causal_lm: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "zerank_integrations", "bench", str(tiny_causal_lm), "-", "--runs", "3", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        printed, _ = process.communicate(b"bread\n", timeout=120)
        said = b""
        while True:
            try:
                some = os.read(ours, 65536)
            except OSError:
                break
            if not some:
                break
            said += some
    os.close(ours)
    assert process.returncode == 0
    assert json.loads(printed)["runs"] == 3
    assert b"measuring" in said
    assert b"4/4" in said
