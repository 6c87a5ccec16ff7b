"""Figures to text: writes the newest JSON of benchmarks/results/ into docs/performance.md, between its markers, and the chart.

Run it:

    python -m benchmarks.report            # write
    python -m benchmarks.report --check    # fail if the page is not what the newest figures say
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import chart
from benchmarks.measure import MIB, RESULTS, newest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "performance.svg"
NOT_YET = "Not measured yet.\n"

Figures = dict[str, Any]

# What stands to the right in a table; of the cells without a figure, what says so.
NUMBER = re.compile(r"(?:[≥≤] )?[\d.,]+(?:%| s| MiB| kB| tokens)?|[\d.]+, [\d.-]+|skipped: .*|")

# Of the CPU table. At 75 kB with 50 tokens and so on; each against one contender.
GOALS = (
    ("75x50", "ST batch 32", 2.8),
    ("75x50", "ST, its best batch", 1.4),
    ("12x50", "ST batch 32", 3.0),
    ("12x50", "ST, its best batch", 1.4),
    ("12x300", "ST batch 32", 9.0),
    ("12x300", "ST, its best batch", 1.4),
)
MEMORY_GOALS_AT = 75
MEMORY_GOALS = (("ours", 0.6), ("ours, 2,048 tokens a step", 0.25))


def main(
    *, check: Annotated[bool, typer.Option("--check", help="Write nothing; status 1 if the page is stale.")] = False
) -> None:
    """Bring docs/performance.md and its chart up to date."""
    page, picture = render(PAGE.read_text(encoding="utf-8")), drawing()
    stale = page != PAGE.read_text(encoding="utf-8") or picture != (
        CHART.read_text(encoding="utf-8") if CHART.exists() else None
    )
    if check:
        typer.echo("stale: run python -m benchmarks.report" if stale else "docs/performance.md is what the newest figures say")
        raise typer.Exit(int(stale))
    PAGE.write_text(page, encoding="utf-8")
    if picture is not None:
        CHART.write_text(picture, encoding="utf-8")
    typer.echo(f"{PAGE.relative_to(ROOT)}: {'brought up to date' if stale else 'was up to date'}")


def render(page: str, results: Path = RESULTS) -> str:
    """The page with each section between its markers made anew from the newest figures of its kind.

    Raises:
        ValueError: a section has no markers.
    """
    for kind, section in SECTIONS.items():
        begin, end = f"<!-- begin {kind} -->\n", f"<!-- end {kind} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            msg = f"the page has no section {kind}; expected it once, between {begin.strip()} and {end}"
            raise ValueError(msg)
        figures = newest(kind, results)
        text = NOT_YET if figures is None else f"{section(figures)}\n{_where(figures)}"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def drawing(results: Path = RESULTS) -> str | None:
    """The chart as SVG; None before anything was measured."""
    figures = newest("cpu", results)
    if figures is None:
        return None
    cells = figures["cells"]
    return chart.dots(
        [f"{cell['kilobytes']} kB, query of {cell['query_tokens']}" for cell in cells],
        {name: [median(cell["contenders"][name]["cpu_s"]) for cell in cells] for name in cells[0]["contenders"]},
        "CPU seconds for 100 documents, one thread (logarithmic; further left is better)",
    )


def ratio(cell: Figures, rival: str, figure: str = "cpu_s") -> float:
    """How many times as much the rival took as ours: the median over runs, each run compared with its own."""
    contenders = cell["contenders"]
    if rival == "ST, its best batch":
        return min(ratio(cell, name, figure) for name in contenders if name.startswith("ST batch"))
    pairs = zip(contenders[rival][figure], contenders["ours"][figure], strict=False)
    return median(theirs / ours for theirs, ours in pairs)


def _cpu(figures: Figures) -> str:
    cells, settings, model = figures["cells"], figures["settings"], figures["model"]
    names = list(cells[0]["contenders"])
    rivals = [*(name for name in names if name != "ours"), "ST, its best batch"]
    speed = [
        [
            *_cell(cell),
            f"{median(cell['contenders']['ours']['cpu_s']):.2f} s",
            *(f"{ratio(cell, rival):.2f}" for rival in rivals),
        ]
        for cell in cells
    ]
    tokens = [[*_cell(cell), *(f"{median(cell['contenders'][name]['tokens']):,.0f}" for name in names)] for cell in cells]
    wall = [[*_cell(cell), *(f"{median(cell['contenders'][name]['wall_s']):.2f}" for name in names)] for cell in cells]
    agreeing = [cell for cell in cells if cell["contenders"]["ours"]["agreement"]]
    scores = [[*_cell(cell), *(_agreement(cell["contenders"][name]["agreement"]) for name in names)] for cell in agreeing]
    where = ["documents", "query"]
    depth = model["layers"]
    # Keys and values are 1/12 of a layer's matrices in these proportions; the last layer computes nothing else for most tokens.
    spared = 11 / 12
    deeper = (1 - spared / 28) / (1 - spared / depth)
    parts = [
        f"{settings['documents']} documents, one thread, {settings['dtype']}, medians of {settings['runs']} interleaved "
        f"runs ({settings['enough']} for who takes more than {settings['patience_s']} s), each with texts of its own; "
        f"{settings['lanes']} of the table's rows measured at once, on a core each. "
        f"The model has {depth} layers of width {model['hidden']} in zerank-1-small's proportions "
        f"({model['parameters'] / 1e6:.1f} million parameters, head/body {model['head_share']:.0%}).",
        "![CPU seconds of every contender](performance.svg)",
        "**Speed.** CPU seconds of ours, and how many times as many each other took (above 1: ours is quicker).",
        _table([*where, "ours", *rivals], speed),
        "Ours computes only the last tokens in the last layer, where the engine can. That spares more here, one layer of "
        f"{depth}, than in zerank-1-small, one of 28: there a ratio is to be divided by {deeper:.2f} at most.",
        "**Goals.**",
        _table(["goal", "expected", "found", ""], _goals(cells)),
        "**Tokens computed**, padding included.",
        _table([*where, *names], tokens),
        "**Scores** against float32, one prompt at a time: the largest difference in standard deviations of the logits, and "
        "Spearman's rank correlation.",
        _table([*where, *names], scores),
        "**Wall time**, seconds.",
        _table([*where, *names], wall),
        f"vLLM: {figures['skipped']['vLLM']}.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _goals(cells: list[Figures]) -> list[list[str]]:
    by_name = {f"{cell['kilobytes']}x{cell['query_tokens']}": cell for cell in cells}
    rows = []
    for name, rival, least in GOALS:
        kilobytes, tokens = name.split("x")
        found = ratio(by_name[name], rival)
        goal = f"{kilobytes} kB, query of {tokens}: CPU seconds of {rival} / ours"
        rows.append([goal, f"≥ {least}", f"{found:.2f}", "reached" if found >= least else "missed"])
    return rows


def _memory(figures: Figures) -> str:
    cells, settings = figures["cells"], figures["settings"]
    names = list(cells[0]["peak_bytes"])
    rows = [[*_cell(cell), *(f"{cell['peak_bytes'][name] / MIB:.0f}" for name in names)] for cell in cells]
    goals = []
    (peaks,) = (cell["peak_bytes"] for cell in cells if cell["kilobytes"] == MEMORY_GOALS_AT)
    for ours, most in MEMORY_GOALS:
        found = peaks[ours] / peaks["ST batch 32"]
        goal = f"{MEMORY_GOALS_AT} kB: memory of {ours} / ST batch 32"
        goals.append([goal, f"≤ {most}", f"{found:.2f}", "reached" if found <= most else "missed"])
    text = (
        f"Peak above the loaded model in MiB, {settings['documents']} documents, {settings['dtype']}, each in a process that "
        "scored nothing else.\n\n"
    )
    return text + _table(["documents", "query", *names], rows) + "\n" + _table(["goal", "expected", "found", ""], goals)


def _full_shape(figures: Figures) -> str:
    settings = figures["settings"]
    rows = [
        [
            name,
            f"{one['load_s']:.1f} s",
            f"{one['loaded_bytes'] / MIB:,.0f} MiB",
            f"{one['peak_bytes'] / MIB:,.0f} MiB",
            f"{one['tokens']:,}",
            f"{one['cpu_s']:.1f}",
            f"{settings['documents'] / one['wall_s']:.2f}",
        ]
        for name, one in figures["contenders"].items()
    ]
    head = ["", "loading", "loaded", "peak above it", "tokens computed", "CPU seconds", "documents per second"]
    text = (
        f"{settings['documents']} documents of {settings['characters'] / 1000:g} kB together, a query of "
        f"{settings['query_tokens']} tokens, {settings['dtype']}, {settings['threads']} threads, one run.\n\n"
    )
    return text + _table(head, rows)


def _concurrency(figures: Figures) -> str:
    settings = figures["settings"]
    rows = [
        [
            load if place == 0 else "",
            name,
            f"{one['documents_per_s']:.1f}",
            *(f"{one[f'p{percent}_s'] * 1000:,.0f}" for percent in (50, 95, 99)),
            str(one["requests"]),
        ]
        for load, contenders in figures["loads"].items()
        for place, (name, one) in enumerate(contenders.items())
    ]
    head = ["load", "", "documents per second", "p50 ms", "p95 ms", "p99 ms", "requests"]
    text = (
        f"Documents of {settings['characters']} characters, {settings['dtype']}, one thread for matrix products, "
        f"{settings['rounds']} interleaved rounds of {settings['seconds']:g} s.\n\n"
    )
    checks = [
        [check["what"], f"≤ {check['most']}", f"{check['found']:.2f}", "reached" if check["ok"] else "missed"]
        for check in figures["checks"]
    ]
    return text + _table(head, rows) + "\n" + _table(["goal", "expected", "found", ""], checks)


def _gpu(figures: Figures) -> str:
    ceilings = figures["ceilings"]
    rows = []
    for payload, contenders in figures["end_to_end"].items():
        for place, (name, one) in enumerate(contenders.items()):
            first = payload if place == 0 else ""
            if "skipped" in one:
                rows.append([first, name, f"skipped: {one['skipped']}", "", "", ""])
                continue
            share = f"{one['floor_fraction']:.0%}" if one.get("floor_fraction") else ""
            peak = f"{one['peak_bytes'] / MIB:,.0f}" if one.get("peak_bytes") is not None else ""
            rows.append([first, name, f"{one['p50_s'] * 1000:.1f}", f"{one['p95_s'] * 1000:.1f}", share, peak])
    head = ["payload", "", "p50 ms", "p95 ms", "of the floor", "peak above the model, MiB"]
    text = (
        f"{figures['device']}, shape {figures['shape']}, {figures['runs']} interleaved runs, end to end with tokenisation. "
        f"Ceilings measured there: {_ceilings(ceilings)}.\n\n"
    )
    return text + _table(head, rows)


def _ceilings(ceilings: Figures) -> str:
    return ", ".join(
        f"{name} {one['value']:.0f} {one['unit']}" if "value" in one else f"{name} skipped" for name, one in ceilings.items()
    )


SECTIONS = {"cpu": _cpu, "memory": _memory, "full-shape": _full_shape, "concurrency": _concurrency, "gpu": _gpu}


def _where(figures: Figures) -> str:
    machine = figures["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items() if number)
    return (
        f"Measured {figures['date']} on {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB "
        f"({versions}).\n"
    )


def _cell(cell: Figures) -> list[str]:
    return [f"{cell['kilobytes']} kB", f"{cell['query_tokens']} tokens"]


def _agreement(found: Figures) -> str:
    return f"{found['max_difference_std']:.3f}, {found['rank_correlation']:.4f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    # Words to the left, figures to the right.
    numeric = [bool(rows) and all(NUMBER.fullmatch(row[place]) for row in rows) for place in range(len(head))]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


if __name__ == "__main__":
    typer.run(main)
