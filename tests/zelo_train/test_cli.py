"""The `zelo` command: what it prints, the shell's habits, and its pages."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests import openai_server
from zelo_train.cli import app
from zelo_train.collect.collection import Collection
from zelo_train.config import Config
from zelo_train.records import Document, Query
from zelo_train.store import Workspace

ROOT = Path(__file__).parents[2]
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
WORDS = ["amber", "birch", "coral", "dune"]


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="zelo")
    # Anything but an exit is a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def zelo(*arguments: object, patience: float = 60, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "zelo_train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=patience, **more)  # type: ignore[call-overload]


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    documents = {
        f"{word}{n}": Document(f"{word}{n}", f"{word} " * (n + 1) + f"and {n} other words to read, worth {n / 8:.3f}")
        for word in WORDS
        for n in range(8)
    }
    queries = {word: Query(word, word, split="train") for word in WORDS}
    qrels = {word: {f"{word}{n}": n // 3 for n in range(8)} for word in WORDS}
    Collection(documents, queries, qrels).write(tmp_path / "beir")
    return tmp_path / "beir"


@pytest.fixture
def folder(tmp_path: Path, beir: Path) -> Path:
    """A workspace with simulated judges over a small collection."""
    found = tmp_path / "ws"
    assert run("init", found, "--source", beir).exit_code == 0
    text = (found / "zelo.yaml").read_text()
    judges = "  judges:\n    - {name: one, kind: simulated}\n    - {name: two, kind: simulated, accuracy: 80}\n"
    (found / "zelo.yaml").write_text(re.sub(r"^  judges: .*\n", judges, text, flags=re.MULTILINE))
    return found


def test_three_commands(folder: Path) -> None:
    result = run("collect", "-w", folder)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^documents +32$", result.stdout, re.MULTILINE)
    assert "checks: 0 problems" in result.stdout
    assert run("collect", "-w", folder).stdout == result.stdout, "nothing has changed"
    result = run("judge", "-w", folder, "--estimate")
    assert re.search(r"^together +\d+ calls", result.stdout, re.MULTILINE), result.stdout
    result = run("judge", "-w", folder)
    assert result.exit_code == 0, result.stderr
    assert "simulated" in result.stderr.splitlines()[0]
    assert "SIMULATED" in result.stdout.splitlines()[0]
    result = run("rate", "-w", folder)
    assert result.exit_code == 0, result.stderr
    assert "simulated" in result.stdout.splitlines()[0]
    assert "4 of 4 queries rated, 32 documents" in result.stdout

    result = run("status", "-w", folder)
    assert "simulated" in result.stdout.splitlines()[0]
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:4]] == [[s, "done"] for s in ("collect", "judge", "rate")]
    assert "spent    0.00 USD, no cap" in result.stdout
    found = json.loads(run("status", "-w", folder, "--json").stdout)
    assert found["simulated"]
    assert found["stages"]["rate"]["state"] == "done"
    assert {row["judge"] for row in found["answers"]} == {"one", "two"}
    assert found["writer"] is None

    pytest.importorskip("pyarrow")
    result = run("answers", folder / "answers.parquet", "-w", folder)
    assert f"wrote {sum(row['count'] for row in found['answers'])} answers" in result.stdout.replace(",", "")


def test_status_tells_what_is_stale(folder: Path) -> None:
    run("collect", "-w", folder)
    path = folder / "zelo.yaml"
    path.write_text(path.read_text().replace("  top: 100", "  top: 7"))
    result = run("status", "-w", folder)
    assert "collect  stale" in result.stdout
    assert "collect.top was 100, is 7" in result.stdout
    assert "judge    not run" in result.stdout
    assert result.stdout.splitlines()[-1] == f"next     zelo collect -w {folder}"


def test_a_collection_without_queries_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("Ropes hold.")
    run("init", tmp_path / "ws", "--source", tmp_path / "texts")
    result = run("collect", "-w", tmp_path / "ws")
    assert result.exit_code == 0
    assert "!! no queries\n     There is nothing to judge. Name a file of them: collect.queries" in result.stdout
    assert "checks: 1 problem" in result.stdout


def test_init(tmp_path: Path, beir: Path) -> None:
    result = run("init", tmp_path / "new")
    assert "next: zelo collect -w" in result.stdout
    assert "for trying, not for training" in result.stdout
    config = run("init", tmp_path / "new")
    assert config.exit_code == 1
    assert "is there already" in config.stderr
    assert run("init", tmp_path / "new", "--force", "--source", beir).exit_code == 0
    from zelo_train.config import read

    assert read(tmp_path / "new" / "zelo.yaml").collect.source == str(beir.resolve())
    assert "is no folder" in run("init", tmp_path / "x", "--source", tmp_path / "none").stderr
    (tmp_path / "file").write_text("")
    result = run("init", tmp_path / "file" / "ws")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("status",), "holds no zelo.yaml; expected a workspace. Make one: zelo init"),
        (("collect",), "holds no zelo.yaml"),
        (("judge", "--yes"), "holds no zelo.yaml"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    result = run(*arguments, "-w", tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("zelo: ")


def test_wrong_usage_is_2() -> None:
    assert run("collect", "--nonsense").exit_code == 2
    assert run("judge", "--sheet", "x.csv").exit_code == 2
    assert run("nonsense").exit_code == 2


def test_a_wrong_setting_is_told_with_its_line(folder: Path) -> None:
    path = folder / "zelo.yaml"
    path.write_text(path.read_text().replace("  top: 100", "  topp: 7"))
    line = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if "topp" in line)
    result = run("collect", "-w", folder)
    assert result.exit_code == 1
    assert f"{path}:{line}: 'topp' is not a setting of collect; did you mean top?" in result.stderr


def test_broken_input_is_told(folder: Path, beir: Path) -> None:
    (beir / "queries.jsonl.gz").unlink()
    (beir / "queries.jsonl").write_text('{"_id": "a"\n')
    result = run("collect", "-w", folder)
    assert result.exit_code == 1
    assert "queries.jsonl:1: no JSON" in result.stderr
    assert not (folder / "collect" / "stage.json").exists()


def test_no_text_leaves_without_a_yes(folder: Path) -> None:
    path = folder / "zelo.yaml"
    remote = "{name: one, model: m, base_url: 'http://judge.invalid/v1'}"
    path.write_text(path.read_text().replace("{name: one, kind: simulated}", remote))
    run("collect", "-w", folder)
    result = run("judge", "-w", folder, "--estimate")
    assert "leaves this machine: judge.invalid" in result.stdout
    result = run("judge", "-w", folder)
    assert result.exit_code == 1
    assert "texts go to judge.invalid: " in result.stderr
    assert "nobody can be asked; expected a terminal, or --yes" in result.stderr


def test_batches_from_the_command(folder: Path) -> None:
    path = folder / "zelo.yaml"
    with openai_server.running() as server:
        judge = f"{{name: one, model: test-model, base_url: '{server.base_url}', concurrency: 4}}"
        path.write_text(path.read_text().replace("{name: one, kind: simulated}", judge))
        run("collect", "-w", folder)
        result = run("judge", "-w", folder, "--batches")
        assert (result.exit_code, result.stdout) == (0, "")
        assert re.search(r"zelo: one, zelo-\w+: \d+ questions of round 1 of 3 are handed over", result.stderr)
        result = run("judge", "-w", folder)
        assert result.exit_code == 1
        assert "Go on with them (zelo judge --batches" in result.stderr
        (batch,) = json.loads(run("status", "-w", folder, "--json").stdout)["batches"]
        shown = run("status", "-w", folder).stdout
        assert f"batch    {batch['name']}: {batch['count']} questions to one, submitted, at most 0.00 USD" in shown
        assert "may have been charged" not in shown
        result = run("judge", "-w", folder, "--drop-batches")
        assert result.stdout == "gave up 1 batch; what was reserved stays counted\n"
        for _ in range(20):
            result = run("judge", "-w", folder, "--batches")
            assert result.exit_code == 0, result.stderr
            if result.stdout:
                break
        assert result.stdout.startswith("every round is answered; next: zelo judge")
        assert run("judge", "-w", folder).exit_code == 0


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_a_bar_with_money_and_the_time_that_remains(folder: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    path = folder / "zelo.yaml"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    with openai_server.running(delay=0.1) as server:
        price = "price: {input: 100, output: 100}"
        judge = f"{{name: one, model: test-model, base_url: '{server.base_url}', concurrency: 2, {price}}}"
        path.write_text(path.read_text().replace("{name: one, kind: simulated}", judge))
        run("collect", "-w", folder)
        command = [sys.executable, "-m", "zelo_train", "judge", "-w", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
            os.close(theirs)
            said = b""
            # Where the other end is closed, Linux says so with an error.
            with suppress(OSError):
                while some := os.read(ours, 65536):
                    said += some
            assert process.stdout is not None
            report = process.stdout.read()
        os.close(ours)
    assert process.returncode == 0, said
    assert b"questions answered" in report
    assert re.search(rb"\d+/\d+ \[\d\d:\d\d<\d\d:\d\d, .*answer/s, [\d.]+ spent, 0 without answer\]", said), said[-2000:]


def test_two_ways_of_judging_at_once_are_wrong_usage(folder: Path) -> None:
    result = run("judge", "-w", folder, "--pilot", "--batches")
    assert result.exit_code == 2
    assert "--pilot: it does not go with --batches" in result.stderr


def test_a_second_writer_is_told(folder: Path) -> None:
    with Workspace(folder).lock("zelo judge -w elsewhere"):
        result = run("collect", "-w", folder)
        assert result.exit_code == 1
        assert f"process {os.getpid()}" in result.stderr
        assert "zelo judge -w elsewhere" in result.stderr
        assert "writing  process" in run("status", "-w", folder).stdout
    assert run("collect", "-w", folder).exit_code == 0
    assert "writing" not in run("status", "-w", folder).stdout


def test_prompts_are_shown(folder: Path) -> None:
    path = folder / "zelo.yaml"
    path.write_text(path.read_text().replace("  criterion: ''", "  criterion: what a sailor needs"))
    result = run("judge", "-w", folder, "--show-prompt")
    assert result.exit_code == 0, result.stderr
    assert "what a sailor needs" in result.stdout


def test_the_tool_itself(tmp_path: Path) -> None:
    """As a process: help without anything heavy, versions, a reader that goes away."""
    code = """
import sys
sys.argv = ["zelo", "--help"]
from zelo_train.cli import main
try:
    main()
finally:
    heavy = ("torch", "numpy", "transformers", "openai", "bm25s", "pydantic")
    print("loaded:", *[name for name in heavy if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"
    for command in ("init", "collect", "judge", "rate", "status", "answers"):
        assert command in result.stdout
    assert zelo("--version").stdout.startswith("zerank-integrations ")
    result = zelo("status", "-w", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("status <&-", 0, ""),
        ("status >&-", 0, ""),
        ("status 2>&-", 0, ""),
        ("judge --yes <&- >&- 2>&-", 1, ""),
        pytest.param("status > /dev/full", 1, "zelo: the output cannot be written: No space left", marks=FULL),
        pytest.param("--help > /dev/full", 1, "zelo: the output cannot be written: No space left", marks=FULL),
        pytest.param("judge --yes 2> /dev/full", 1, "", marks=FULL),
    ],
)
def test_closed_and_full_streams_are_no_traceback(folder: Path, arguments: str, status: int, said: str) -> None:
    command = shlex.join([sys.executable, "-m", "zelo_train"])
    # As users have it: with a buffer, what a full device refused is refused once more at the exit.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        ["sh", "-c", f"{command} {arguments}"], cwd=folder, capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert done.stderr.startswith(said)
    assert said or not done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipes")
def test_a_reader_that_went_away_is_no_failure_of_ours(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "zelo_train", "judge", "-w", str(folder), "--show-prompt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (141, b"")


def test_a_file_that_cannot_be_written_is_named(folder: Path) -> None:
    run("collect", "-w", folder)
    result = run("judge", "-w", folder, "--write-sheet", folder / "none" / "sheet.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"zelo: {folder / 'none' / 'sheet.csv'}: No such file or directory\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_keeps_what_was_answered(folder: Path) -> None:
    run("collect", "-w", folder)
    # Enough to be in the midst of it when the signal comes.
    path = folder / "zelo.yaml"
    many = "".join(f"    - {{name: j{n}, kind: simulated}}\n" for n in range(300))
    path.write_text(path.read_text().replace("    - {name: one, kind: simulated}\n", many))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "zelo_train", "judge", "-w", str(folder)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 1" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "interrupted; what was done is kept" in rest
    assert "Traceback" not in rest
    assert "Exception ignored" not in rest
    assert not Workspace(folder).locked


@pytest.mark.slow
def test_the_embedded_collection_offline_in_under_two_minutes(tmp_path: Path) -> None:
    """As the page has it: five commands, no download. In this machine's CPU time, for others may be busy on it."""
    resource = pytest.importorskip("resource", reason="measures CPU time as Unix does")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for arguments in (("init", "demo"), *((stage, "-w", "demo") for stage in ("collect", "judge", "rate", "status"))):
        result = zelo(*arguments, cwd=tmp_path, patience=300)
        assert result.returncode == 0, result.stderr
        assert arguments[0] in ("init", "collect") or "simulated" in result.stdout.splitlines()[0].lower()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    targets = (tmp_path / "demo" / "rate" / "targets.tsv").read_text().splitlines()
    assert "simulated" in targets[0]
    assert len(targets) > 10_000


# The pages


def options(command: str) -> list[str]:
    click = typer.main.get_command(app)
    parameters = click.commands[command].params  # type: ignore[attr-defined]
    return [max(p.opts, key=len) for p in parameters if p.opts[0].startswith("-") and "--help" not in p.opts]


def test_the_page_names_every_option() -> None:
    page = (ROOT / "docs" / "workspace.md").read_text(encoding="utf-8")
    for command in ("init", "collect", "judge", "rate", "status", "answers"):
        assert f"`zelo {command}" in page, command
        for option in options(command):
            assert f"`{option}`" in page, f"{command} {option}"


def test_the_page_names_every_setting_of_collect() -> None:
    page = (ROOT / "docs" / "collect.md").read_text(encoding="utf-8")
    for name, field in Config.model_fields["collect"].annotation.model_fields.items():  # type: ignore[union-attr]
        assert f"`{name}`" in page, name
        assert field.description


def test_simulate_prints_a_table_and_says_that_it_is_simulated() -> None:
    found = run("simulate", "--table", "weights", "--queries", 4)
    assert found.exit_code == 0
    assert "simulated" in found.stdout.splitlines()[0]
    assert "±" in found.stdout
    assert run("simulate", "--table", "none").exit_code == 2
