"""The benchmark of asking: it runs, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import judging


def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "judging.json"
    judging.main(questions=300, rounds=3, delay=0.01, in_flight=20, words=20, quick=True, output=output)
    found = json.loads(output.read_text())
    assert found["kind"] == "judging"
    assert len(found["rounds"]) == 1, "a trial is short"
    assert found["per_second"] > 0 < found["per_cpu_second"]
    printed = capsys.readouterr().out
    assert "allow 2000)" in printed
    assert "ms of CPU per question" in printed
