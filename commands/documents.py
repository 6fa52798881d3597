"""Documents of which a command writes a part."""

from __future__ import annotations

from pathlib import Path

from commands import atomic
from commands.errors import UserError


def insert(document: Path, begin: str, end: str, content: str) -> None:
    """Replaces what stands between two markers.

    Args:
        document: a text file.
        begin, end: the lines that stay around it.
        content: what is put there, an empty line before and behind it.

    Raises:
        UserError: the document lacks a marker.
    """
    before, begins, rest = document.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        raise UserError(f"{document} lacks the lines {begin} and {end}; add them where the tables shall stand.")
    atomic.write_text(document, f"{before}{begin}\n\n{content}\n\n{end}{after}")
