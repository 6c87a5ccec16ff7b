"""What a command ends in: the one message and the status, whatever happened."""

from __future__ import annotations

import errno
import warnings

import pytest
from typer.testing import CliRunner

from zerank_integrations.shell import Mistake, Shell


class Failure(Exception):
    pass


class Shown(UserWarning):
    pass


def outcome(error: BaseException | None, *, interrupted: str | None = None) -> tuple[int, str, str]:
    shell = Shell("tool", "About it.", failures=[Failure], shown=Shown, interrupted=interrupted)

    def work() -> None:
        if error is not None:
            raise error
        warnings.warn("look here", Shown, stacklevel=1)
        warnings.warn("not here", UserWarning, stacklevel=1)

    shell.command(work)

    def other() -> None:
        """So that `work` has to be named."""

    shell.command(other)
    found = CliRunner().invoke(shell.app, ["work"], prog_name="tool")
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exc_info
    return found.exit_code, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Mistake("no such thing"), 1, "tool: no such thing\n"),
        (Failure("it is broken"), 1, "tool: it is broken\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 1, "tool: a.txt: No such file or directory\n"),
        # As transformers raises it: no number, no file, only words.
        (OSError("no model of that name"), 1, "tool: no model of that name\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_one_message_and_a_status(error: BaseException, status: int, said: str) -> None:
    assert outcome(error) == (status, "", said)


def test_an_interrupt_may_have_an_answer() -> None:
    assert outcome(KeyboardInterrupt(), interrupted="all is kept") == (130, "", "tool: all is kept\n")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(AssertionError):
        outcome(ZeroDivisionError())


def test_only_warnings_for_the_user_are_shown() -> None:
    # As for a user: pytest makes errors of warnings.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.warnoptions", [])
        assert outcome(None) == (0, "", "tool: warning: look here\n")


def test_help_and_versions() -> None:
    shell = Shell("tool", "About it.", failures=[])
    shell.command(lambda: None)
    found = CliRunner().invoke(shell.app, ["--help"], prog_name="tool")
    assert "About it." in found.stdout
    assert CliRunner().invoke(shell.app, ["--version"]).stdout.startswith("zerank-integrations ")
