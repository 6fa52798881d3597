"""Files and folders that are whole at every moment: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`; a reader, or a process killed on the way, sees the old file or the new one.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is untouched then.
    """
    temporary = _beside(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may leave the new name with an empty file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, content: str) -> None:
    """As `write_bytes`, for UTF-8 text."""
    write_bytes(path, encoded(content))


def encoded(text: str) -> bytes:
    """UTF-8, also of text with the name of a file that the locale could not read."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        # Python reads such names byte by byte (PEP 383); most of them are UTF-8 after all.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with contextlib.suppress(UnicodeEncodeError):
            whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return whole.encode("utf-8")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """As `write_bytes`, for a JSON object indented by two; values JSON does not know are written as text."""
    write_text(path, json.dumps(content, indent=2, default=str))


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Replaces a folder, with all that is in it, by these files.

    Args:
        folder: its place; the folders above it are made.
        files: path relative to the folder -> UTF-8 text.

    Raises:
        OSError: it cannot be written; the old folder is in its place then.
    """
    temporary, old = _beside(folder, "tmp"), _beside(folder, "old")
    try:
        for name, text in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(text))
        # A folder that is not empty cannot be replaced by a rename: it steps aside first.
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except OSError:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of killed processes. Only for a folder no other process writes to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    """A hidden neighbour; the process id keeps two writers of a shared cache from tearing each other's."""
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")
