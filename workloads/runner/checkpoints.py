"""Checkpoints of a trial: whole or absent, with the one before kept in case the last cannot be read."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from commands import atomic
from commands.errors import tell
from submissions.common.api import Tree

KEEP = 2


def save(folder: Path, step: int, content: bytes, *, keep_all: bool) -> None:
    """Writes `checkpoint_<step>`, then removes all but the last two, unless all are to be kept."""
    atomic.write_bytes(folder / f"checkpoint_{step}", content)
    if not keep_all:
        for path in _newest_first(folder)[KEEP:]:
            with contextlib.suppress(OSError):
                path.unlink()


def restore(folder: Path, unpack: Callable[[bytes], dict[str, Tree]]) -> dict[str, Tree] | None:
    """What `unpack` makes of the newest checkpoint it can read; None if there is none."""
    for path in _newest_first(folder):
        try:
            return unpack(path.read_bytes())
        except Exception as error:  # whatever a damaged file makes the reader raise
            tell(f"note: {path} cannot be read ({error}); trying the one before", sys.stderr)
    return None


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.rpartition("_")[2]), reverse=True)
