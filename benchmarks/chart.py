"""A chart as SVG, written by hand so that the same figures always give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Told apart by people who see colours differently, on white.
COLOURS = ("#0072b2", "#56b4e9", "#999999", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#000000")

WIDTH, LEFT, RIGHT, ROW, TOP = 860, 170, 20, 24, 84


def dots(rows: Sequence[str], series: Mapping[str, Sequence[float]], title: str) -> str:
    """A row per measured cell, a dot per contender, on a logarithmic axis.

    Args:
        rows: what each row is.
        series: per contender its value in each row, above zero.
        title: what the axis shows.

    Returns:
        The SVG.
    """
    values = [value for column in series.values() for value in column]
    low, high = _ticks(min(values))[0], _ticks(max(values))[1]
    height = TOP + ROW * len(rows) + 40

    def x(value: float) -> float:
        share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(row: int) -> int:
        return TOP + ROW * row + ROW // 2

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for line, names in enumerate((list(series)[:4], list(series)[4:])):
        place = LEFT
        for name in names:
            colour = COLOURS[list(series).index(name) % len(COLOURS)]
            parts.append(f'<circle cx="{place + 5}" cy="{40 + 20 * line}" r="5" fill="{colour}"/>')
            parts.append(f'<text x="{place + 15}" y="{44 + 20 * line}">{escape(name)}</text>')
            place += 30 + 7 * len(name)
    bottom = TOP + ROW * len(rows)
    for tick in _axis(low, high):
        parts.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for row, name in enumerate(rows):
        found = [column[row] for column in series.values()]
        parts.append(f'<text x="{LEFT - 10}" y="{y(row) + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<line x1="{x(min(found))}" x2="{x(max(found))}" y1="{y(row)}" y2="{y(row)}" stroke="#bbb" stroke-width="2"/>'
        )
        # Ours last, so that it lies on top.
        for number, column in reversed(list(enumerate(series.values()))):
            colour = COLOURS[number % len(COLOURS)]
            parts.append(f'<circle cx="{x(column[row])}" cy="{y(row)}" r="{6 if number == 0 else 5}" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(value: float) -> tuple[float, float]:
    """The steps of 1, 2, 5 below and above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [power * step for step in (1, 2, 5, 10)]
    return max(step for step in steps if step <= value), min(step for step in steps if step >= value)


def _axis(low: float, high: float) -> list[float]:
    found = [low]
    while found[-1] < high * 0.999:
        digit = round(found[-1] / 10.0 ** math.floor(math.log10(found[-1]) + 1e-9))
        found.append(found[-1] * (2.5 if digit == 2 else 2))
    return found
