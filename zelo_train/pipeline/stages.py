"""What each stage depends on, and so which one is stale. A new stage is one more function and one row of the table."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zelo_train.config import Config, Section
from zelo_train.errors import ConfigError
from zelo_train.store import Stage, Workspace, fingerprint

EMBEDDED = "embedded"

SIMULATED = "Judges are simulated from qrels: these figures say nothing about LLM judges or about what training will bring."

# What can change without changing an answer.
_NOT_AN_INPUT = ("judge.cap", "judge.currency", "judge.keep_replies")


Say = Callable[[str], None]


def silent(_: str) -> None:
    """Say nothing."""


def _flat(section: Section, prefix: str) -> dict[str, Any]:
    """Settings by full name, as basic types."""
    return {f"{prefix}.{name}": value for name, value in section.model_dump(mode="json").items()}


def place(workspace: Workspace, path: str) -> Path:
    """A path of zelo.yaml, relative to it."""
    return workspace.folder / Path(path).expanduser()


def model_at(workspace: Workspace, model: str) -> str:
    """A model of zelo.yaml: the folder of that path, if there is one, else a Hub id."""
    folder = place(workspace, model)
    return str(folder) if model and folder.is_dir() else model


def collect_inputs(workspace: Workspace, config: Config) -> dict[str, Any]:
    """What the collect stage depends on.

    Raises:
        ConfigError: a file that zelo.yaml names does not exist.
    """
    section = config.collect
    inputs = _flat(section, "collect")
    for name in ("source", "documents", "queries", "qrels", "run"):
        value = getattr(section, name)
        if value is None or (name == "source" and section.documents is not None):
            continue
        if name == "source" and value == EMBEDDED:
            # The documents are those of the interpreter.
            inputs["the embedded collection"] = f"Python {platform.python_version()}"
            continue
        path = place(workspace, value)
        if not path.exists():
            raise ConfigError(f"collect.{name} is {value!r} and {path} does not exist; expected a file or folder")
        inputs[f"the content of collect.{name}"] = fingerprint(path)
    return inputs


def judge_inputs(workspace: Workspace, config: Config) -> dict[str, Any]:
    """What the judge stage depends on; `collect` is None before that has been run."""
    collected = workspace.stage("collect")
    section = {name: value for name, value in _flat(config.judge, "judge").items() if name not in _NOT_AN_INPUT}
    for judge in section["judge.judges"]:
        for name in ("price", "concurrency", "per_minute", "api_key_env"):
            judge.pop(name)
    return {
        "the output of collect": collected.fingerprint if collected else None,
        **section,
        "rate.calibration": config.rate.calibration,
    }


def rate_inputs(workspace: Workspace, config: Config) -> dict[str, Any]:
    """What the rate stage depends on; `judge` is None before that is finished."""
    judged = workspace.stage("judge")
    return {"the output of judge": judged.fingerprint if judged else None, **_flat(config.rate, "rate")}


_INPUTS: Mapping[str, Callable[[Workspace, Config], dict[str, Any]]] = {
    "collect": collect_inputs,
    "judge": judge_inputs,
    "rate": rate_inputs,
}

BUILT = tuple(_INPUTS)


@dataclass(frozen=True, slots=True)
class State:
    """Where a stage stands.

    Attributes:
        stage: its name.
        state: "not run"; "begun", and not finished; "done"; or "stale": made from something else than what is there now.
        reasons: what changed.
        note: what it left when it finished.
    """

    stage: str
    state: Literal["not run", "begun", "done", "stale"]
    reasons: tuple[str, ...]
    note: Stage | None


def state(workspace: Workspace, config: Config, stage: str) -> State:
    """Where a stage stands."""
    note = workspace.stage(stage)
    if note is None:
        return State(stage, "begun" if workspace.stage_folder(stage).exists() else "not run", (), None)
    try:
        reasons = note.differences(_INPUTS[stage](workspace, config))
    except ConfigError as error:
        reasons = (str(error),)
    before = BUILT[: BUILT.index(stage)]
    stale = [name for name in before if state(workspace, config, name).state == "stale"]
    reasons = (*(f"{name} is stale" for name in stale), *reasons)
    return State(stage, "stale" if reasons else "done", reasons, note)


def status(workspace: Workspace, config: Config) -> list[State]:
    """Where every stage stands, in order."""
    return [state(workspace, config, stage) for stage in BUILT]
