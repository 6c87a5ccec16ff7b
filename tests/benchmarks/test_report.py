"""docs/performance.md says what the newest figures say, and the report says it right."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.contenders import CONTENDERS
from benchmarks.cpu import KILOBYTES, QUERY_TOKENS
from benchmarks.measure import MIB, RESULTS, newest

HEAD = {
    "date": "2026-01-02 03:04 UTC",
    "quick": False,
    "machine": {"processor": "abacus", "cores": 2, "memory_gib": 4.0, "system": "none"},
    "versions": {"python": "3.11", "vllm": None},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Made-up figures: rival number n takes n times as much as ours, in every run its own amount."""
    cells = [
        {
            "kilobytes": kilobytes,
            "query_tokens": tokens,
            "documents": 100,
            "contenders": {
                name: {
                    "cpu_s": [number * (1 + run) for run in range(3)],
                    "wall_s": [float(number)] * 3,
                    "tokens": [1000 * number] * 3,
                    "agreement": {"max_difference_std": 0.01, "rank_correlation": 0.999} if tokens == 50 else None,
                }
                for number, name in enumerate(CONTENDERS, start=1)
            },
        }
        for kilobytes in KILOBYTES
        for tokens in QUERY_TOKENS
    ]
    settings = {"runs": 3, "lanes": 1, "documents": 100, "dtype": "bfloat16", "patience_s": 20, "enough": 3}
    model = {"layers": 8, "hidden": 384, "parameters": 17_000_000, "head_share": 0.22}
    figures = HEAD | {"settings": settings, "model": model, "skipped": {"vLLM": "skipped: not there"}, "cells": cells}
    (tmp_path / "cpu-20260102-0304.json").write_text(json.dumps(figures))
    return tmp_path


def section(page: str, kind: str) -> str:
    return page.partition(f"<!-- begin {kind} -->\n")[2].partition(f"<!-- end {kind} -->")[0]


def table(text: str, title: str) -> list[list[str]]:
    """The rows of the first table after a title, without its rule."""
    rows = [line for line in text.partition(title)[2].partition("\n\n")[2].partition("\n\n")[0].splitlines() if line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not re.fullmatch(r"[| :-]+", row)]


def test_the_page_is_what_the_newest_figures_say() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.render(page) == page, "docs/performance.md is stale: python -m benchmarks.report"
    drawn = report.drawing()
    assert drawn is None or report.CHART.read_text(encoding="utf-8") == drawn


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_committed_figures_are_whole(file: Path) -> None:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert file.name.startswith(f"{found['kind']}-")
    assert found["quick"] is False
    assert {"date", "machine", "versions"} <= set(found)


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    page = report.render(report.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert [section(page, kind).strip() for kind in report.SECTIONS] == ["Not measured yet."] * len(report.SECTIONS)


def test_ratios_and_goals(results: Path) -> None:
    page = report.render(report.PAGE.read_text(encoding="utf-8"), results)
    text = section(page, "cpu")
    head, *rows = table(text, "**Speed.**")
    assert head[:3] == ["documents", "query", "ours"]
    assert len(rows) == 12
    row = dict(zip(head, rows[0], strict=True))
    # Ours is number 1; of runs of 1, 2 and 3 seconds the median is 2.
    assert row["ours"] == "2.00 s"
    assert (row["padded"], row["ST batch 8"], row["ST batch 32"], row["published"]) == ("3.00", "4.00", "5.00", "7.00")
    assert row["ST, its best batch"] == "4.00"
    goals = table(text, "**Goals.**")[1:]
    found = {goal: (expected, figure, verdict) for goal, expected, figure, verdict in goals}
    assert found["75 kB, query of 50: CPU seconds of ST batch 32 / ours"] == ("≥ 2.8", "5.00", "reached")
    assert found["12 kB, query of 300: CPU seconds of ST batch 32 / ours"] == ("≥ 9.0", "5.00", "missed")
    assert len(table(text, "**Scores**")) == 1 + 4
    assert "abacus" in text
    # Eight layers, one of which does a twelfth of its work: as the text says, 28 would gain less.
    assert f"divided by {(1 - 11 / 12 / 28) / (1 - 11 / 12 / 8):.2f} at most" in text
    assert report.render(page, results) == page


def test_a_run_is_compared_with_its_own() -> None:
    runs = {"ours": {"cpu_s": [1.0, 10.0, 2.0]}, "padded": {"cpu_s": [2.0, 20.0, 4.0]}, "ST batch 100": {"cpu_s": [3.0, 30.0]}}
    assert report.ratio({"contenders": runs}, "padded") == 2
    assert report.ratio({"contenders": runs}, "ST batch 100") == 3


def test_the_newest_counts(results: Path) -> None:
    newer = json.loads((results / "cpu-20260102-0304.json").read_text()) | {"date": "later"}
    (results / "cpu-20260102-0305.json").write_text(json.dumps(newer))
    found = newest("cpu", results)
    assert found is not None
    assert found["date"] == "later"
    assert newest("gpu", results) is None


def test_the_chart_has_a_dot_for_each_figure(results: Path) -> None:
    drawn = report.drawing(results)
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    dots = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == len(CONTENDERS) * (12 + 1)  # and one each in the legend
    places = [float(dot.attrib["cx"]) for dot in dots[len(CONTENDERS) :]]
    width = float(root.attrib["viewBox"].split()[2])
    assert all(report.chart.LEFT <= place <= width for place in places)


def test_the_other_sections(tmp_path: Path) -> None:
    latency = {"documents_per_s": 10.0, "p50_s": 0.1, "p95_s": 0.2, "p99_s": 0.3, "requests": 7}
    check = {"what": "w", "found": 1.5, "most": 1.3, "ok": False}
    settings = {"seconds": 4, "rounds": 3, "threads": 1, "dtype": "bfloat16", "characters": 200}
    many = HEAD | {"settings": settings, "checks": [check], "loads": {"1 client": {"worker": latency}}}
    one = {"load_s": 9.5, "loaded_bytes": 3_300 * MIB, "peak_bytes": 70 * MIB, "tokens": 5_000, "cpu_s": 80.0, "wall_s": 40.0}
    settings = {"documents": 20, "characters": 15_000, "query_tokens": 50, "threads": 2, "dtype": "bfloat16"}
    whole = HEAD | {"settings": settings, "contenders": {"ours": one}}
    way = {"p50_s": 0.08, "p95_s": 0.09, "peak_bytes": None, "floor_fraction": 0.7}
    ceilings = {"matmul bf16": {"value": 700.0, "unit": "TFLOP/s"}, "matmul fp8": {"skipped": "old"}}
    ends = {"75 kB": {"ours": way, "ours, fp8": {"skipped": "none"}}}
    device = HEAD | {"device": "a GPU", "shape": "tiny", "runs": 30, "ceilings": ceilings, "end_to_end": ends}
    peaks = {name: number * 100 * MIB for number, name in enumerate(CONTENDERS, start=1)}
    cell = {"kilobytes": 75, "query_tokens": 50, "peak_bytes": peaks}
    memory = HEAD | {"settings": {"documents": 100, "dtype": "bfloat16"}, "cells": [cell]}
    for kind, figures in (("memory", memory), ("concurrency", many), ("full-shape", whole), ("gpu", device)):
        (tmp_path / f"{kind}-1.json").write_text(json.dumps(figures))
    page = report.render(report.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| 75 kB: memory of ours / ST batch 32 | ≤ 0.6 | 0.20 | reached |" in section(page, "memory")
    assert "| 1 client | worker | 10.0 | 100 | 200 | 300 | 7 |" in section(page, "concurrency")
    assert "| w | ≤ 1.3 | 1.50 | missed |" in section(page, "concurrency")
    assert "| ours | 9.5 s | 3,300 MiB | 70 MiB | 5,000 | 80.0 | 0.50 |" in section(page, "full-shape")
    assert "| 75 kB | ours | 80.0 | 90.0 | 70% |  |" in section(page, "gpu")
    assert "skipped: none" in section(page, "gpu")
    assert "matmul bf16 700 TFLOP/s, matmul fp8 skipped" in section(page, "gpu")


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no section cpu"):
        report.render("# Performance\n")
