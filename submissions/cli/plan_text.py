"""Numbers and tables of plans as text: for a terminal, or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection

Table = list[list[str]]


def without_numbers(name: str) -> str:
    """The path with its numbers left open."""
    return re.sub(r"\d+", "*", name)


def times(count: int) -> str:
    """How often a row counts, where that is not once."""
    return "" if count == 1 else f"x {count}"


def counted(number: int, noun: str) -> str:
    """A number and its noun; of one step the noun alone."""
    return f"{noun}" if number == 1 and noun == "step" else f"{number} {noun}{'' if number == 1 else 's'}"


def block_sizes(blocks: tuple[int, ...]) -> str:
    """The diagonal blocks of a factor."""
    return " + ".join(f"{size:,}" for size in blocks) if blocks else "identity"


def in_bytes(size: float) -> str:
    """Bytes in GB, MB or kB (10^9, 10^6, 10^3)."""
    unit, symbol = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:.2f} {symbol}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f} %"


def in_flops(flops: float) -> str:
    """Flops in Tflop, Gflop or Mflop."""
    unit, symbol = (1e12, "Tflop") if flops >= 1e12 else (1e9, "Gflop") if flops >= 1e8 else (1e6, "Mflop")
    return f"{flops / unit:.3g} {symbol}"


def plain(table: Table, right: Collection[str] = ()) -> str:
    """A table for a terminal; columns with these heads to the right."""
    table = _without_empty_columns(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    to_the_right = [head in right for head in table[0]]
    lines = []
    for row in table:
        cells = zip(row, widths, to_the_right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())
    return "\n".join(lines)


def markdown(table: Table, right: Collection[str] = ()) -> str:
    """A table in Markdown; columns with these heads to the right."""
    table = _without_empty_columns(table)
    rule = ["---:" if head in right else "---" for head in table[0]]
    rows = [[cell.replace("*", r"\*").replace("|", r"\|") for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _without_empty_columns(table: Table) -> Table:
    keep = [any(column) for column in zip(*table, strict=True)]
    return [[cell for cell, kept in zip(row, keep, strict=True) if kept] for row in table]
