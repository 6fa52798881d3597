"""Tables as terminal text and Markdown, and numbers as people read them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from scoring.judge.columns import Column

NOTHING = "–"


@dataclass
class Table:
    """A table of ready text.

    Attributes:
      caption: what it shows, and under which rules.
      headers, rows: one text per column.
      left: positions of columns to align left; the others are numbers.
      note: how to read it.
      sticky: how many first columns stay in sight when a page scrolls the table sideways.
      shades: by row and column, from 0 (best) to 1 (worst), None for no shade; empty for a table without.
    """

    caption: str
    headers: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: tuple[int, ...] = (0,)
    note: str = ""
    sticky: int = 1
    shades: list[list[float | None]] = field(default_factory=list)


def terminal(table: Table) -> str:
    """The table for a terminal, columns separated by two blanks."""
    lines = [table.headers, *table.rows]
    widths = [max(_width(line[k]) for line in lines) for k in range(len(table.headers))]
    ruled = [
        "  ".join(_pad(cell, widths[k], k in table.left) for k, cell in enumerate(line)).rstrip() for line in lines
    ]
    ruled.insert(1, "  ".join("-" * width for width in widths))
    parts = [table.caption, *ruled] + ([table.note] if table.note else [])
    return "\n".join(parts)


def markdown(table: Table, level: int = 2) -> str:
    """The table in Markdown, the caption as a heading of a level."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    ruler = ["---" if k in table.left else "---:" for k in range(len(table.headers))]
    lines = [f"{'#' * level} {table.caption}", "", row(table.headers), row(ruler), *map(row, table.rows)]
    return "\n".join(lines + (["", table.note] if table.note else []))


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _pad(text: str, width: int, left: bool) -> str:
    blanks = " " * (width - _width(text))
    return text + blanks if left else blanks + text


def number(value: float, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, thousands separated; a dash for a missing one."""
    if value is None or np.isnan(value):
        return NOTHING
    if np.isinf(value):
        return "miss" if value > 0 else "-inf"
    if value == 0:
        return "0"
    size = int(np.floor(np.log10(abs(value))))
    if size >= digits - 1:
        return f"{value:,.0f}"
    if size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits - 1 - size}f}"


def steps(value: float) -> str:
    """A count of steps (a median of two may be half a step)."""
    return (
        number(value) if not np.isfinite(value) or value < 1 else f"{value:,.10g}" if value % 1 else f"{value:,.0f}"
    )


def seconds(value: float) -> str:
    """A time in seconds."""
    return number(value, 3) + (" s" if np.isfinite(value) else "")


def sentence(text: str) -> str:
    """A text that begins with a capital, whatever it is made of."""
    return text[:1].upper() + text[1:]


def percent(value: float) -> str:
    """A share as a percentage."""
    return NOTHING if not np.isfinite(value) else f"{100 * value:.0f} %"


def ratio(value: float) -> str:
    """A ratio with two decimals."""
    return f"{value:.2f}" if np.isfinite(value) else number(value)


def between(low: float, high: float, show: Callable[[float], str] = ratio) -> str:
    """An interval; a dash for none."""
    return NOTHING if np.isnan(low) or np.isnan(high) else f"{show(low)} to {show(high)}"


def spread(middle: float, low: float, high: float, show: Callable[[float], str] = number) -> str:
    """``median (low to high)``, without the brackets where nothing varies."""
    if low == high or np.isnan(low) or np.isnan(high):
        return show(middle)
    return f"{show(middle)} ({show(low)} to {show(high)})"


def milliseconds(value: float) -> str:
    """Milliseconds with three digits."""
    return number(value, 3)


# How the values of columns.COLUMNS are written, by their kind.
KINDS: dict[str, Callable[[float], str]] = {
    "number": number,
    "steps": steps,
    "seconds": seconds,
    "ms": milliseconds,
    "percent": percent,
}


def shown(column: Column, value: object) -> str:
    """A value of a column as text."""
    return str(value) if column.kind == "text" else KINDS[column.kind](float(value))  # type: ignore[arg-type]
