"""A damaged ``eval_measurements.csv`` line by line: only bad lines are lost, each kind of damage is reported."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd

from scoring.metrics import METRIC
from scoring.oddities import Oddities

RENAMED = {
    "global_step": "step",
    "score": "score",
    "accumulated_submission_time": "submission_time",
    "accumulated_eval_time": "eval_time",
    "accumulated_logging_time": "logging_time",
    "total_duration": "total_time",
    "preemption_count": "preemptions",
}


def read_lines(trial_id: int, where: str, content: bytes, odd: Oddities) -> pd.DataFrame:
    """The sound lines of a damaged file, with one finding for each kind of damage."""
    if not content.strip(b"\0\r\n\t ,"):
        what = "empty file" if not content else "blank file"
        odd.add("error", where, what, f"{len(content)} bytes", "the trial has no data")
        return pd.DataFrame()
    text = content.decode("utf-8-sig", errors="replace")
    unfinished = not text.endswith("\n")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not unfinished:
        lines.pop()
    reader = _Lines(where, odd)
    for number, line in enumerate(lines):
        reader.take(number, line, cut=unfinished and number == len(lines) - 1)
    reader.report()
    table = pd.DataFrame(reader.rows)
    if len(table):
        table.insert(0, "trial_id", trial_id)
    return table


class _Lines:
    """Takes one line after another; knows the header in force and counts what it had to drop."""

    def __init__(self, where: str, odd: Oddities) -> None:
        self.where = where
        self.odd = odd
        self.names: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.found: dict[tuple[str, str, str, str], list[int]] = {}

    def take(self, number: int, line: str, cut: bool) -> None:
        """Read one line; ``cut`` if no line end follows, so that its last field may have lost digits."""
        if not line.strip():
            return self._note("note", "blank line", "", "skipped", number)
        if len(line) > 1 << 16:
            return self._note("warning", "wrong number of fields", "an endless line", "the line is dropped", number)
        if "\0" in line:
            return self._note("warning", "NUL bytes", "", "the line is dropped", number)
        fields = next(csv.reader([line]), [])
        if "global_step" in fields or "score" in fields or (not self.names and not _is_number(fields[0])):
            return self._header([name.strip() for name in fields], number)
        if not self.names:
            return self._note("error", "no header", "the first line is no header", "the line is dropped", number)
        if len(fields) != len(self.names):
            what = "truncated last line" if cut else "wrong number of fields"
            detail = f"{len(fields)} instead of {len(self.names)}"
            return self._note("warning", what, detail, "the line is dropped", number)
        row: dict[str, float] = {"row": number}
        for position, (name, value) in enumerate(zip(self.names, fields, strict=True)):
            if name not in RENAMED and not METRIC.fullmatch(name):
                continue
            if cut and position == len(fields) - 1:
                self._note(
                    "warning", "truncated last line", f"{name} may lack digits", "that value is missing", number
                )
                row[RENAMED.get(name, name)] = np.nan
                continue
            row.setdefault(RENAMED.get(name, name), self._value(name, value.strip(), number))
        self.rows.append(row)

    def _value(self, name: str, value: str, number: int) -> float:
        if value in ("", "nan", "NaN"):
            return np.nan
        # float() would take 1_000 and digits of other scripts, which no logger writes.
        if value.isascii() and "_" not in value:
            try:
                return float(value)
            except ValueError:
                pass
        self._note("warning", "not a number", f"{name} is {value[:40]!r}", "that value is missing", number)
        return np.nan

    def _header(self, names: list[str], number: int) -> None:
        if self.names:
            detail = "the same columns" if names == self.names else "other columns, which hold from here on"
            self._note("warning", "repeated header", detail, "the line is dropped", number)
        if len(set(names)) < len(names):
            double = sorted({name for name in names if names.count(name) > 1})
            self._note("warning", "duplicate column", ", ".join(double), "the first of each is read", number)
        self.names = names

    def _note(self, level: str, what: str, detail: str, action: str, number: int) -> None:
        self.found.setdefault((level, what, detail, action), []).append(number)

    def report(self) -> None:
        """Hand on what was found: one line for each kind, naming the first lines concerned."""
        for (level, what, detail, action), numbers in self.found.items():
            place = "line " + ", ".join(str(number + 1) for number in numbers[:3])
            more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
            self.odd.add(
                level, self.where, what, f"{place}{more}{': ' if detail else ''}{detail}", action, len(numbers)
            )
        if not self.rows:
            what = "no usable row" if self.found else "header only"
            self.odd.add(
                "error", self.where, what, f"columns: {', '.join(self.names)[:80]}", "the trial has no data"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
