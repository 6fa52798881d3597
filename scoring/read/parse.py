"""From the bytes of ``eval_measurements.csv`` to one table: sound files in bulk, others line by line.

Most files are sound and share a handful of headers, so their bodies are joined and parsed in one go. A file that
fails any of the cheap tests is read line by line; only its bad lines are lost.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import pandas as pd

from scoring.metrics import METRIC
from scoring.oddities import Oddities
from scoring.read.lines import RENAMED, read_lines

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
            pieces.append(read_lines(trial_id, where, content, odd))
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
            return [read_lines(trial_id, where, header + b"\n" + content, odd)]
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
