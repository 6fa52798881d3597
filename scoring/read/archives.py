"""The folders inside an archive, read in one pass; nothing is ever unpacked to disk."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from scoring.oddities import Oddities
from scoring.read.folders import Archive, Entry, Folder, is_foreign, is_log, note_foreign

MAX_FILE = 1 << 30  # a member claiming more than this is not a log


def unpack(archive: Archive, odd: Oddities) -> list[Folder]:
    """All folders of an archive in the order of their names; of a damaged one, what comes before the damage."""
    parts, where = archive.parts, archive.where
    found: dict[tuple[str, ...], Folder] = {(): Folder(parts, where)}
    foreign = 0
    try:
        for name, entry in _members(archive.path, where, odd):
            below = tuple(part for part in name.split("/") if part not in ("", "."))
            if not below or ".." in below:
                continue
            if any(is_foreign(part) for part in below):
                foreign += 1
                continue
            for depth in range(1, len(below) + (entry is None)):
                if below[:depth] not in found:
                    inside = "/".join(below[:depth])
                    found[below[:depth]] = Folder((*parts, *below[:depth]), f"{where}:{inside}")
                    found[below[: depth - 1]].subfolders.append(below[depth - 1])
            if entry is not None:
                found[below[:-1]].files[below[-1]] = entry
    except Exception as error:
        # tarfile, zipfile, lzma and zlib each have error classes of their own, some outside the usual hierarchy.
        detail = f"{type(error).__name__}: {error}"
        odd.add("error", where, "damaged archive", detail, "what comes before it is kept")
    note_foreign(where, foreign, odd)
    for folder in found.values():
        folder.subfolders.sort()
    return sorted(found.values(), key=lambda folder: folder.parts)


def _members(path: Path, where: str, odd: Oddities) -> Iterator[tuple[str, Entry | None]]:
    """(name, file) for each member of an archive, (name, None) for a folder."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # PowerShell before 5 and other Windows tools write names with backslashes.
                name = info.filename if "/" in info.filename else info.filename.replace("\\", "/")
                if name.endswith("/"):
                    yield name, None
                    continue
                data = archive.read(info) if _wanted(name, info.file_size, where, odd) else None
                yield name, Entry(info.file_size, info.CRC, data=data)
        return
    with tarfile.open(path, "r|*") as stream:
        for member in stream:
            if member.isdir():
                yield member.name, None
            elif member.isfile():
                data = None
                if _wanted(member.name, member.size, where, odd):
                    extracted = stream.extractfile(member) or io.BytesIO()
                    data = extracted.read()
                yield member.name, Entry(member.size, int(member.mtime), data=data)


def _wanted(name: str, size: int, where: str, odd: Oddities) -> bool:
    last = name.rsplit("/", 1)[-1]
    if not is_log(last):
        return False
    if size > MAX_FILE:
        odd.add("error", f"{where}:{name}", "too large", f"{size} bytes", "ignored")
        return False
    return True
