"""A shell's habits, for each of the commands: what Ctrl-C, a closed pipe, a full disk or a mistake ends in.

status 0      done
       1      it failed; one message on stderr says why, without a traceback
       2      it was called wrongly
       130    interrupted
       141    whoever read the output has gone
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, TextIO

import typer

FAILURE, INTERRUPTED, BROKEN_PIPE = 1, 128 + 2, 128 + 13


class Mistake(Exception):
    """What the user gave cannot be used; told in one line, without a traceback."""


class Shell:
    """A command of the shell and its subcommands.

    Args:
        name: what it is called.
        about: one sentence, for --help.
        failures: exceptions whose message is for the user.
        shown: warnings that are for the user; others are kept off.
        interrupted: what Ctrl-C answers, if anything.

    Attributes:
        app: the typer application, with every `command`.
    """

    def __init__(
        self,
        name: str,
        about: str,
        *,
        failures: Sequence[type[Exception]],
        shown: type[Warning] | None = None,
        interrupted: str | None = None,
    ) -> None:
        self.name, self._shown, self._interrupted = name, shown, interrupted
        self._failures: tuple[type[Exception], ...] = (Mistake, *failures)
        self.app = typer.Typer(
            name=name,
            no_args_is_help=True,
            add_completion=False,
            # Plain help: quick to print, and no escape sequences in a pipe or a log.
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
        )
        self.app.callback(help=about)(_options)

    def command(self, function: Callable[..., None]) -> Callable[..., None]:
        """Register a subcommand, named like its function."""

        @functools.wraps(function)
        def command(*arguments: Any, **options: Any) -> None:  # noqa: ANN401 - whatever the command takes
            try:
                with warnings.catch_warnings():
                    if not sys.warnoptions:
                        self._filter_warnings()
                    function(*arguments, **options)
                sys.stdout.flush()
            except self._failures as error:
                self.say(str(error))
                raise typer.Exit(FAILURE) from None
            except KeyboardInterrupt:
                if self._interrupted is not None:
                    self.say(self._interrupted)
                raise typer.Exit(INTERRUPTED) from None
            except OSError as error:
                raise typer.Exit(self._unwritten(error)) from None

        return self.app.command()(command)

    def main(self) -> None:
        """Run the command of `sys.argv` and exit with its status."""
        _open_streams()
        _quieten()
        try:
            try:
                self.app(prog_name=self.name)
            finally:
                sys.stdout.flush()
        except OSError as error:
            # Help and versions are printed by no subcommand.
            sys.exit(self._unwritten(error))

    def say(self, message: str) -> None:
        """Tell the user something on stderr."""
        try:
            print(f"{self.name}: {message}", file=sys.stderr, flush=True)
        except OSError:
            # Nobody can be told that nobody can be told.
            _discard(sys.stderr)

    def _filter_warnings(self) -> None:
        warnings.simplefilter("ignore")
        if self._shown is not None:
            warnings.simplefilter("always", self._shown)
            warnings.showwarning = lambda message, *_, **__: self.say(f"warning: {message}")

    def _unwritten(self, error: OSError) -> int:
        """Say what the system refused, and return the status for it. Of files, only the output has no name."""
        if error.filename is not None:
            self.say(f"{os.fsdecode(error.filename)}: {error.strerror}")
            return FAILURE
        if error.errno is None:
            # Not the system's: a library's own words.
            self.say(str(error))
            return FAILURE
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        self.say(f"the output cannot be written: {error.strerror or error}")
        return FAILURE


def _discard(stream: TextIO) -> None:
    """Point a stream at nothing: what is still in its buffer would be refused once more at the interpreter's exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams() -> None:
    """A stream that the shell closed (`<&-`) is None, which nothing that reads or writes expects."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - it lives as long as the process


def _quieten() -> None:
    """What other libraries say on their own account is kept off; their bars only show where someone watches."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        # A lone surrogate, or a terminal that knows no UTF-8: an escape sequence rather than a traceback.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _print_version(*, wanted: bool) -> None:
    if wanted:
        brought = [*map(_version, ("torch", "transformers")), f"Python {sys.version.split()[0]}"]
        print(f"{_version('zerank-integrations')} ({', '.join(brought)})")
        raise typer.Exit


def _options(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the versions and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What every command takes before its subcommand."""
