"""Files are written in one piece; the same logs give the same bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from commands import atomic
from commands.errors import UserError


def folder(path: str) -> Path:
    """The folder to write to, made if need be.

    Raises:
      UserError: it cannot be made or written to.
    """
    try:
        found = Path(path)
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        raise UserError(f"--output_dir={path}: {error.strerror}: name a folder that can be written to") from None


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: a reader never sees half of it.

    Raises:
      UserError: it cannot be written.
    """
    try:
        atomic.write_bytes(path, content if isinstance(content, bytes) else atomic.encoded(content))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def remove(path: Path, names: Iterable[str]) -> None:
    """Files of an earlier run that this one does not write: they would pass for its own."""
    for name in names:
        (path / name).unlink(missing_ok=True)


def csv(table: pd.DataFrame) -> str:
    """A table as CSV; infinity stands for a miss, an empty field for nothing."""
    return str(table.to_csv(index=False, lineterminator="\n"))
