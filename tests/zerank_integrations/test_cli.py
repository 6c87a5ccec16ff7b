"""The `zerank` command: inputs, outputs, the shell's habits, and its page of the documentation."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers.utils import logging
from typer.testing import CliRunner, Result

from zerank_integrations import Reranker
from zerank_integrations.check import Golden, check
from zerank_integrations.cli import app

Folder = Callable[[str], Path]

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
QUERY = "read a csv file"
LINES = ["a file path", "bread and butter", "the moon and a planet", "你好"]


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    """As `main` sees to where standard error is no terminal; here transformers is imported before."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def run(*arguments: object, stdin: bytes | str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="zerank")
    # Anything but an exit is a traceback.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


@pytest.fixture
def rank(tiny_causal_lm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`zerank rank` with the tiny checkpoint, on the CPU in float32, printing lines that are not shortened."""
    monkeypatch.setenv("COLUMNS", "300")

    def ranked(*arguments: object, query: str = QUERY, stdin: bytes | str | None = None) -> Result:
        model = ("--model", tiny_causal_lm, "--device", "cpu", "--dtype", "float32")
        return run("rank", "--query", query, *model, *arguments, stdin=stdin)

    return ranked


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.txt"
    file.write_text(f"{LINES[0]}\n\n{LINES[1]}\r\n   \n{LINES[2]}\n{LINES[3]}", encoding="utf-8", newline="")
    return file


@pytest.fixture
def best_first(tiny_causal_lm: Path) -> list[int]:
    """Indices of LINES as the library ranks them."""
    return Reranker(tiny_causal_lm, device="cpu", dtype="float32").rank(QUERY, LINES).indices


def results(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# What is ranked


def test_each_line_is_a_document(rank: Callable[..., Result], notes: Path, best_first: list[int]) -> None:
    numbers = [1, 3, 5, 6]
    found = rank(notes)
    assert found.exit_code == 0
    assert found.stderr == ""
    table = [re.fullmatch(r"([01]\.\d{3})  (\S+):(\d+)  (.+)", line) for line in found.stdout.splitlines()]
    assert [(row[2], int(row[3]), row[4]) for row in table if row] == [(str(notes), numbers[i], LINES[i]) for i in best_first]
    relevances = [float(row[1]) for row in table if row]
    assert relevances == sorted(relevances, reverse=True)


@pytest.mark.parametrize("dash", [[], ["-"]])
def test_standard_input_is_read(rank: Callable[..., Result], dash: list[str], best_first: list[int]) -> None:
    found = results(rank("--jsonl", *dash, stdin="\n".join(LINES)))
    assert [record["index"] for record in found] == best_first
    assert {record["file"] for record in found} == {"-"}


def test_files_and_standard_input_are_ranked_together(rank: Callable[..., Result], notes: Path) -> None:
    found = results(rank("--jsonl", notes, "-", stdin="one more"))
    assert sorted((record["index"], record["file"]) for record in found)[-1] == (4, "-")


def test_whole_files(rank: Callable[..., Result], notes: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "one.md").write_text("# One\n\nA file path.\n")
    found = results(rank("--whole", "--jsonl", notes, tmp_path / "blank.txt", tmp_path / "one.md"))
    assert {record["file"]: record["line"] for record in found} == {str(notes): None, str(tmp_path / "one.md"): None}
    assert {record["text"] for record in found} == {notes.read_bytes().decode(), "# One\n\nA file path.\n"}


def test_json_lines_keep_their_ids(rank: Callable[..., Result], tmp_path: Path, best_first: list[int]) -> None:
    file = tmp_path / "corpus.jsonl"
    ids: list[dict[str, object]] = [{"id": "first"}, {"_id": 2}, {"id": "", "_id": "x"}, {}]
    file.write_text("\n".join(json.dumps(i | {"text": t, "title": "T"}) for i, t in zip(ids, LINES, strict=True)))
    found = results(rank("--jsonl", file))
    expected = ["first", 2, "", None]
    assert [(record["id"], record["line"], record["text"]) for record in found] == [
        (expected[i], i + 1, LINES[i]) for i in best_first
    ]
    table = rank(file).stdout
    assert "  first  " in table
    assert f"{file}:4" in table


def test_a_field_makes_every_input_json_lines(rank: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    file.write_text("\n".join(json.dumps({"body": text}) for text in LINES))
    assert {record["text"] for record in results(rank("--jsonl", "--field", "body", file))} == set(LINES)


def test_piped_records_are_recognised(rank: Callable[..., Result]) -> None:
    records = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(LINES))
    assert {record["id"] for record in results(rank("--jsonl", stdin=records))} == {0, 1, 2, 3}
    # Text that looks like JSON but is no record stays text.
    found = results(rank("--jsonl", stdin='{"no": "document"}\n[1]\n'))
    assert {record["text"] for record in found} == {'{"no": "document"}', "[1]"}


def test_a_byte_order_mark_is_no_text(rank: Callable[..., Result]) -> None:
    (found,) = results(rank("--jsonl", stdin=b"\xef\xbb\xbfwords\n"))
    assert found["text"] == "words"


# What is printed


def test_one_json_object(rank: Callable[..., Result], notes: Path, tiny_causal_lm: Path, best_first: list[int]) -> None:
    found = json.loads(rank("--json", "--top-k", 2, notes).stdout)
    ranked = Reranker(tiny_causal_lm, device="cpu", dtype="float32").rank(QUERY, LINES, top_k=2)
    assert found["query"] == QUERY
    assert found["documents"] == 4
    assert [record["rank"] for record in found["results"]] == [1, 2]
    for record, expected in zip(found["results"], ranked, strict=True):
        assert record["index"] == expected.index
        assert record["text"] == expected.text
        assert record["logit"] == pytest.approx(expected.logit, abs=1e-4)
        assert record["relevance"] == pytest.approx(expected.relevance, abs=1e-5)
        assert record["tokens"] == expected.tokens
        assert record["truncated"] is False
        assert record["span"] is None


def test_a_threshold(rank: Callable[..., Result], notes: Path) -> None:
    relevances = [record["relevance"] for record in results(rank("--jsonl", notes))]
    between = (relevances[1] + relevances[2]) / 2
    assert len(results(rank("--jsonl", "--threshold", between, notes))) == 2
    found = rank("--threshold", 1, notes)
    assert (found.exit_code, found.stdout) == (0, "")
    assert found.stderr == "zerank: none of 4 documents has relevance 1 or more\n"
    assert rank("--top-k", 0, notes).stdout == ""


def test_a_cut_document_is_marked_and_told(rank: Callable[..., Result]) -> None:
    found = rank("--max-length", 60, stdin="short\n" + "long " * 100)
    assert [line.endswith(" [cut]") for line in found.stdout.splitlines() if "long" in line] == [True]
    assert [line.endswith(" [cut]") for line in found.stdout.splitlines() if "short" in line] == [False]
    assert found.stderr.startswith("zerank: warning: 1 of 2 documents were longer than a prompt of 60 tokens")
    assert found.stderr.count("\n") == 1


def test_the_best_passage_is_shown(rank: Callable[..., Result]) -> None:
    text = " ".join(f"word {number}" for number in range(100))
    (found,) = results(rank("--jsonl", "--max-passage-tokens", 30, stdin=text))
    start, end = found["span"]
    assert 0 <= start < end <= len(text)
    shown = rank("--max-passage-tokens", 30, stdin=text).stdout.split("  ")[2].rstrip("…\n")
    assert text[start:end].strip().startswith(shown)


def test_the_instruction_goes_into_the_query(rank: Callable[..., Result], notes: Path, tiny_causal_lm: Path) -> None:
    reranker = Reranker(tiny_causal_lm, device="cpu", dtype="float32", instruction="be kind")
    found = results(rank("--jsonl", "--instruction", "be kind", notes))
    assert found[0]["logit"] == pytest.approx(reranker.rank(QUERY, LINES)[0].logit, abs=1e-4)
    assert found[0]["logit"] != pytest.approx(results(rank("--jsonl", notes))[0]["logit"], abs=1e-4)


def test_control_tokens_can_be_parsed(rank: Callable[..., Result]) -> None:
    text = "words<|im_end|>more"
    plain, parsed = (results(rank("--jsonl", *parse, stdin=text))[0] for parse in ([], ["--control-tokens", "parse"]))
    assert parsed["tokens"] < plain["tokens"]


def test_a_document_cannot_command_the_terminal(rank: Callable[..., Result]) -> None:
    text = "red \x1b[31m\x07 alert\u202e\tand\xa0more"
    found = rank(stdin=text + "\n")
    assert found.stdout.endswith("red \ufffd[31m\ufffd alert\ufffd and more\n")
    assert results(rank("--jsonl", stdin=text))[0]["text"] == text


def test_text_is_shortened_to_the_width(rank: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    wide, narrow = "你好" * 40, "word " * 40
    for text in (wide, narrow):
        (line,) = rank(stdin=text).stdout.splitlines()
        columns = sum(1 + (ord(character) > 0x2E80) for character in line)
        assert 38 <= columns <= 40
        assert line.endswith("…")


# A user's mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "corpus.jsonl cannot be read: No such file"),
        (b'{"text": "fine"}\n\n{"text": ', r"corpus.jsonl:3: no JSON"),
        (b'{"text": "fine"}\n["text"]', r"corpus.jsonl:2: list; expected an object"),
        (b'{"title": "no text"}', r"corpus.jsonl:1: only ['title']; expected a text in 'text'. Name another with --field"),
        (b'{"text": 7}', r"corpus.jsonl:1: 'text' is int; expected a text"),
        (b'{"text": "fine"}\n{"text": "\xff"}', r"corpus.jsonl:2: byte 0xff is not UTF-8"),
        (b" \n\n", "there is no document in "),
    ],
)
def test_a_wrong_input_is_one_line(rank: Callable[..., Result], tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "corpus.jsonl"
    if content is not None:
        file.write_bytes(content)
    found = rank(file)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("zerank: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_folder_is_no_document(rank: Callable[..., Result], tmp_path: Path) -> None:
    found = rank(tmp_path)
    assert found.exit_code == 1
    assert "is a folder; expected files" in found.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nobody"], "there is no folder 'nobody'"),
        (["--model", "nobody/nothing", "--local-files-only"], "nobody/nothing could not be had"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--max-length", "5"], "leave no room for a document"),
    ],
)
def test_a_wrong_model_or_device_fails(rank: Callable[..., Result], options: list[str], message: str) -> None:
    found = rank(*options, stdin="words")
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("zerank: ")
    assert message in found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["rank"],
        ["rank", "--query", "  "],
        ["rank", "--query", "q", "--top-k", "-1"],
        ["rank", "--query", "q", "--threshold", "2"],
        ["rank", "--query", "q", "--dtype", "int4"],
        ["rank", "--query", "q", "--json", "--jsonl"],
        ["rank", "--query", "q", "--whole", "--field", "text"],
        ["rank", "--query", "q", "--nonsense"],
        ["check", "--as", "zerank-9"],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    found = run(*arguments, stdin="words")
    assert found.exit_code == 2
    assert "Usage: zerank" in found.stderr + found.stdout


# Checking


def test_check_prints_each_check_and_succeeds(tiny_stack: Path) -> None:
    found = run("check", tiny_stack, "--dtype", "float32", "--device", "cpu")
    assert found.exit_code == 0, found.stdout
    lines = found.stdout.splitlines()
    assert lines[0] == f"ok    location         {tiny_stack}"
    assert [line[:4].strip() for line in lines[:-1]] == [
        *["ok"] * 8, "skip", *["ok"] * 4, "skip", "skip"
    ]  # fmt: skip
    assert lines[-1] == "15 checks: 12 ok, 0 failed, 3 skipped"
    assert found.stderr == ""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_check_of_an_adapter_whose_base_has_moved(tiny_lora: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny_lora, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    found = run("check", adapter, "--device", "cpu")
    assert found.exit_code == 1
    assert "FAIL  loading" in found.stdout
    assert run("check", adapter, "--device", "cpu", "--base", tiny_lora.parent / "base").exit_code == 0


def test_check_fails_with_the_remedy(tiny_folder: Folder) -> None:
    found = run("check", tiny_folder("headless"), "--device", "cpu")
    assert found.exit_code == 1
    lines = found.stdout.splitlines()
    assert lines[-3].startswith("FAIL  loading")
    assert "newly initialised" in lines[-3]
    assert lines[-2].startswith(" " * 23 + "expected all of them")
    assert lines[-1] == "4 checks: 3 ok, 1 failed, 0 skipped"


def test_check_of_a_copy_that_is_none_fails(tiny_causal_lm: Path) -> None:
    found = run("check", tiny_causal_lm, "--as", "zerank-2", "--device", "cpu", "--json")
    assert found.exit_code == 1
    answer = json.loads(found.stdout)
    assert answer["ok"] is False
    assert [one["name"] for one in answer["checks"] if not one["ok"]] == ["size", "tokenizer", "golden rows"]
    assert all(one["remedy"] for one in answer["checks"] if not one["ok"])


# The shell's habits


def test_help_and_version_are_quick() -> None:
    """Without torch: under a second of CPU."""
    resource = pytest.importorskip("resource", reason="measures CPU time as Unix does")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([sys.executable, "-m", "zerank_integrations", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage: zerank" in answer.stdout
    assert "\x1b" not in answer.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert re.match(r"zerank-integrations \d+\.\d+\S* \(torch \S+, transformers \S+, Python \S+\)\n", run("--version").stdout)


@pytest.mark.skipif(os.name != "posix", reason="a shell's signals")
def test_ctrl_c_is_quiet() -> None:
    """While it waits for its standard input; the core's own tests interrupt a running ranking."""
    command = [sys.executable, "-m", "zerank_integrations", "rank", "-q", "q", "-m", "zelo-mini"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        _wait_until_reading(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"")
        assert process.returncode == 130


def _wait_until_reading(pid: int) -> None:
    """Linux says what a process waits in; elsewhere a moment must do."""
    deadline = time.monotonic() + 10
    waiting = Path(f"/proc/{pid}/wchan")
    while time.monotonic() < deadline:
        if not waiting.exists():
            time.sleep(3)
            return
        if "pipe" in waiting.read_text():
            return
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipes")
def test_a_closed_pipe_is_quiet_and_so_are_the_libraries(tiny_causal_lm: Path) -> None:
    """`zerank rank … | head`: no complaint, no bar, no log where standard error is no terminal."""
    command = [sys.executable, "-m", "zerank_integrations", "rank", "-q", "q", "-m", str(tiny_causal_lm), "--jsonl", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate(b"a file path\nbread and butter\n" * 50, timeout=120)
        assert (process.returncode, said) == (141, b"")


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        ("<&-", 1, "there is no document"),
        ("< notes.txt >&-", 0, ""),
        pytest.param(
            "< notes.txt > /dev/full",
            1,
            "the output cannot be written",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device"),
        ),
    ],
)
def test_closed_and_full_streams_are_no_traceback(
    tiny_causal_lm: Path, notes: Path, streams: str, status: int, said: str
) -> None:
    command = shlex.join([sys.executable, "-m", "zerank_integrations", "rank", "-q", "q", "-m", str(tiny_causal_lm)])
    done = subprocess.run(["sh", "-c", f"{command} {streams}"], cwd=notes.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert said in done.stderr


def test_json_too_deep_to_read_is_named(rank: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    found = rank(tmp_path / "deep.jsonl")
    assert found.exit_code == 1
    assert "deep.jsonl:1: no JSON" in found.stderr
    assert rank("--jsonl", stdin="[" * 100_000).exit_code == 0


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_a_bar_where_someone_watches(tiny_causal_lm: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "zerank_integrations", "rank", "-q", "q", "-m", str(tiny_causal_lm), "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        printed, _ = process.communicate("你好\nbread\n".encode() * 50, timeout=120)
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
    assert b"ranking" in said
    assert b"100/100" in said
    assert len(printed.decode().splitlines()) == 100
    assert b"\x1b" not in printed


# The page


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _table_of(name: str) -> str:
    """The option table as the page must have it."""
    rows = [f"| option of `zerank {name}` | meaning | default |", "|---|---|---|"]
    for option in COMMANDS[name].params:
        if option.param_type_name != "option" or "--help" in option.opts:
            continue
        names = ", ".join(f"`{spelling}`" for spelling in sorted(option.opts, key=len, reverse=True))
        shown = option.show_default if isinstance(option.show_default, str) else option.default
        default = "required" if option.required else "" if shown in (None, False) else shown
        meaning = option.help.replace("|", "\\|")
        rows.append(f"| {names} | {meaning} | {default} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_page_lists_the_options_as_they_are(name: str) -> None:
    table = _table_of(name)
    assert table in PAGE.read_text(encoding="utf-8"), f"docs/cli.md lacks this table:\n{table}"


def _examples() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("example", _examples())
def test_the_pages_examples_are_understood(example: str) -> None:
    (command,) = (part.strip() for part in example.split(" | ") if part.strip().startswith("zerank "))
    _, name, *arguments = shlex.split(command)
    COMMANDS[name].make_context(name, arguments)


def test_the_page_names_every_check_and_every_key(tiny_causal_lm: Path, rank: Callable[..., Result]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("| check | what is done |\n|---|---|\n")[2].partition("\n\n")[0]
    assert [row.split("|")[1].strip() for row in table.splitlines()] == [
        one.name for one in check(tiny_causal_lm, device="cpu")
    ]
    (record,) = results(rank("--jsonl", stdin="words"))
    assert [key for key in record if f"`{key}`" not in page] == []


def test_the_pages_other_blocks_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(python, {})
    assert capsys.readouterr().out.startswith("True location ")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    known = Golden.of(json.loads(example), "float32")
    assert known.rows[0].logit == 7.25
    assert Golden.of(json.loads(example), "bfloat16").rows[0].logit == 7.1875
