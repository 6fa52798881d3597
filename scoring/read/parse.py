"""From the bytes of ``eval_measurements.csv`` to one table: sound files in bulk, others line by line.

Most files are sound and share a handful of headers, so their bodies are joined and parsed in one go. A file that
fails any of the cheap tests is read line by line; only its bad lines are lost.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

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
METRIC = re.compile(r"(train|validation|test)/(?!num_examples$).+")
BATCH_BYTES = 4 << 20
_BLOCKERS = (b"\0", b'"', b"\r")


def parse(files: Iterable[tuple[int, str, bytes]], odd: Oddities) -> pd.DataFrame:
    """Rows of all ``(trial_id, where, content)`` in file order: trial_id, row, step, the times, and the metrics.

    ``row`` is the line number in the file (the header is line 0); a missing column is all NaN.
    """
    pieces: list[pd.DataFrame] = []
    waiting: dict[bytes, list[tuple[int, str, bytes]]] = {}
    sizes: dict[bytes, int] = {}
    for trial_id, where, content in files:
        header, _, body = content.partition(b"\n")
        if not _plain(header, body):
            pieces.append(_by_line(trial_id, where, content, odd))
            continue
        waiting.setdefault(header, []).append((trial_id, where, body))
        sizes[header] = sizes.get(header, 0) + len(body)
        if sizes[header] > BATCH_BYTES:
            pieces.extend(_batch(header, waiting.pop(header), odd))
            sizes[header] = 0
    for header, group in waiting.items():
        pieces.extend(_batch(header, group, odd))
    pieces = [piece for piece in pieces if len(piece)]
    columns = ["trial_id", "row", *RENAMED.values()]
    if not pieces:
        return _typed(pd.DataFrame(columns=columns))
    metrics = sorted({name for piece in pieces for name in piece.columns if METRIC.fullmatch(name)})
    table = pd.concat([piece.reindex(columns=[*columns, *metrics]) for piece in pieces], ignore_index=True)
    pieces.clear()
    order = np.argsort(table["trial_id"].to_numpy(), kind="stable")
    return _typed(table.iloc[order].reset_index(drop=True))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    types = dict.fromkeys(table.columns, "float64") | {"trial_id": "int32", "row": "int32"}
    return table.astype(types)


def _plain(header: bytes, body: bytes) -> bool:
    """Whether a file can be parsed in bulk: a usable header, whole lines, nothing that needs a CSV dialect."""
    names = header.split(b",")
    return (
        body.endswith(b"\n")
        and len(set(names)) == len(names)
        and b"global_step" in names
        and all(name == name.strip() and name for name in names)
        and not any(blocker in body or blocker in header for blocker in _BLOCKERS)
        and header.isascii()
    )


def _batch(header: bytes, group: list[tuple[int, str, bytes]], odd: Oddities) -> list[pd.DataFrame]:
    """The rows of files of one header; where the batch as a whole fails, file by file."""
    names = header.decode().split(",")
    body = b"".join(content for _, _, content in group)
    values = _numbers(body, names)
    if values is None:
        if len(group) == 1:
            trial_id, where, content = group[0]
            return [_by_line(trial_id, where, header + b"\n" + content, odd)]
        return [piece for one in group for piece in _batch(header, [one], odd)]
    counts = [content.count(b"\n") for _, _, content in group]
    values["trial_id"] = np.repeat(np.array([trial_id for trial_id, _, _ in group], dtype=np.int32), counts)
    values["row"] = np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts])
    return [values]


def _numbers(body: bytes, names: list[str]) -> pd.DataFrame | None:
    """The body as float64, or None unless every line has exactly one number (or nothing) per name."""
    raw = np.frombuffer(body, dtype=np.uint8)
    separators = raw[np.flatnonzero((raw == ord(",")) | (raw == ord("\n")))]
    if len(separators) % len(names):
        return None
    lines = separators.reshape(-1, len(names))
    if (lines[:, -1] != ord("\n")).any() or (lines[:, :-1] != ord(",")).any():
        return None
    wanted = [name for name in names if name in RENAMED or METRIC.fullmatch(name)]
    try:
        table = pd.read_csv(
            io.BytesIO(body),
            header=None,
            names=names,
            usecols=wanted,
            dtype="float64",
            index_col=False,
            skip_blank_lines=False,
            keep_default_na=False,
            na_values=["", "nan", "NaN"],
            float_precision="round_trip",  # the last digit decides whether a value at the target is a hit
        )
    except (ValueError, OverflowError):
        return None
    return table.rename(columns=RENAMED) if len(table) == len(lines) else None


def _by_line(trial_id: int, where: str, content: bytes, odd: Oddities) -> pd.DataFrame:
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
