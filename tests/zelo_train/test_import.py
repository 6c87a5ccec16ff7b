"""Who may import whom in zelo_train, and what its command costs before it does anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "zelo_train"

# Floors from the ground up. A file imports from floors below its own, or from its own room.
FLOORS = (
    {"records", "errors"},
    {"chance", "cost", "config", "interrupt", "llm", "store", "evaluate"},
    {"noise", "rate"},
    {"collect", "judge"},
    {"simulate", "pipeline"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Neighbours on one floor that may see each other, with the reason.
BESIDE = {("llm", "cost")}  # a client knows the price of a token

# The same inside the pipeline: a file imports from rows above its own, and the package itself shows them all.
PIPELINE = (
    {"stages"},
    {"judges"},
    {"collect"},
    {"judge"},
    {"batches", "pilot", "rate"},
    {"__init__"},
)


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zelo_train":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("zelo_train.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        assert not imported(path)
        return
    assert own in FLOOR, f"{own} is new: give it a floor"
    for other in imported(path) - {own}:
        assert FLOOR[other] < FLOOR[own] or (own, other) in BESIDE, f"{own} imports {other}"


def test_each_stage_imports_only_those_before_it() -> None:
    row = {name: number for number, names in enumerate(PIPELINE) for name in names}
    files = {path.stem: path for path in (PACKAGE / "pipeline").glob("*.py")}
    assert set(row) == set(files)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zelo_train.pipeline"):
                other = node.module.removeprefix("zelo_train.pipeline").lstrip(".") or "__init__"
                assert row[other] < row[name], f"{name} imports {other}"


@pytest.mark.parametrize("room", ["rate", "judge/pairs.py", "evaluate/metrics.py"])
def test_the_mathematics_needs_numpy_and_scipy_only(room: str) -> None:
    place = PACKAGE / room
    allowed = {*sys.stdlib_module_names, "numpy", "scipy", "threadpoolctl", "zelo_train"}
    for path in [place] if place.is_file() else place.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_help_brings_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "openai")
    code = f"import sys; import zelo_train.cli; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
