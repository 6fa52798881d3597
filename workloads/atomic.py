"""Files that are whole at every moment: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`; a reader, or a process killed on the way, sees the old file or the new one.

    Raises:
      OSError: the folder cannot be written or the disk is full; the old file is untouched then.
    """
    # The process id keeps two writers of one file (a shared cache) from tearing each other's temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of killed processes. Only for a folder no other process writes to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """As `write_bytes`, for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_bytes`, for a JSON object indented by two; values JSON does not know are written as text."""
    write_text(path, json.dumps(content, indent=2, default=str))
