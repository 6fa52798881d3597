"""Folders of a directory tree or an archive in one form: names, sizes, and the bytes of the files that matter."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scoring.errors import InputError
from scoring.oddities import Oddities

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
MAX_DEPTH = 12
MAX_FILE = 1 << 30  # a member claiming more than this is not a log


@dataclass(slots=True)
class Entry:
    """One file: its size and time of change, and where its bytes are."""

    size: int
    mtime_ns: int
    path: str = ""
    data: bytes | None = None

    def read(self) -> bytes:
        """The bytes of the file."""
        if self.data is not None:
            return self.data
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            chunks = [os.read(descriptor, self.size + 1)]
            # A run may be writing while we read, and one call may hand over less than asked.
            while chunks[-1]:
                chunks.append(os.read(descriptor, 1 << 20))
            return b"".join(chunks)
        finally:
            os.close(descriptor)


@dataclass(slots=True)
class Folder:
    """One folder: the names of all its parents (root first), its files, and the names of its subfolders."""

    parts: tuple[str, ...]
    where: str
    files: dict[str, Entry] = field(default_factory=dict)
    subfolders: list[str] = field(default_factory=list)


def is_log(name: str) -> bool:
    """Whether a file is one of those a trial is read from."""
    return name in ("eval_measurements.csv", "hparams.json") or (
        name.startswith(("meta_data_", "flags_")) and name.endswith(".json")
    )


def archive_stem(name: str) -> str | None:
    """``runs`` for ``runs.tar.gz``, and None for what is no archive."""
    for suffix in sorted(ARCHIVES, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


def folders(root: str | os.PathLike[str], odd: Oddities) -> list[Folder]:
    """All folders at and below ``root`` (a directory or an archive), in the order of their names."""
    path = Path(root)
    if not path.exists():
        raise InputError(f"{root}: no such file or directory")
    if path.is_file():
        stem = archive_stem(path.name)
        if stem is None:
            raise InputError(f"{root}: neither a directory nor an archive ({', '.join(ARCHIVES)})")
        return list(_archive(path, (stem,), str(root), odd))
    full = path.resolve()
    found = list(_directory(str(full), full.parts[1:], str(root), odd, 0, set()))
    return sorted(found, key=lambda folder: folder.parts)


def _directory(
    path: str, parts: tuple[str, ...], where: str, odd: Oddities, depth: int, seen: set[str]
) -> Iterator[Folder]:
    folder = Folder(parts, where)
    below: list[tuple[str, str]] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    folder.subfolders.append(entry.name)
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    if real not in seen:
                        seen.add(real)
                        below.append((entry.name, real))
                elif entry.is_file():
                    status = entry.stat()
                    folder.files[entry.name] = Entry(status.st_size, status.st_mtime_ns, entry.path)
                else:
                    odd.add("note", f"{where}/{entry.name}", "stray file", "a broken link or a device", "ignored")
    except OSError as error:
        odd.add("error", where, "unreadable", f"{error.strerror}", "the folder is ignored")
        return
    folder.subfolders.sort()
    yield folder
    # Checkpoints below a trial are of no interest, and may be many.
    if "eval_measurements.csv" in folder.files:
        return
    if depth >= MAX_DEPTH:
        odd.add("warning", where, "too deep", f"more than {MAX_DEPTH} levels", "not followed")
        return
    for name, real in below:
        yield from _directory(real, (*parts, name), f"{where}/{name}", odd, depth + 1, seen)
    for name in sorted(folder.files):
        stem = archive_stem(name)
        if stem is not None:
            yield from _archive(Path(path, name), (*parts, stem), f"{where}/{name}", odd)


def _archive(path: Path, parts: tuple[str, ...], where: str, odd: Oddities) -> Iterator[Folder]:
    found: dict[tuple[str, ...], Folder] = {(): Folder(parts, where)}
    try:
        for name, entry in _members(path, where, odd):
            below = tuple(part for part in name.split("/") if part not in ("", "."))
            if not below or ".." in below:
                continue
            for depth in range(1, len(below)):
                if below[:depth] not in found:
                    inside = "/".join(below[:depth])
                    found[below[:depth]] = Folder((*parts, *below[:depth]), f"{where}:{inside}")
                    found[below[: depth - 1]].subfolders.append(below[depth - 1])
            if entry is None:
                if below not in found:
                    found[below] = Folder((*parts, *below), f"{where}:{'/'.join(below)}")
                    found[below[:-1]].subfolders.append(below[-1])
            else:
                found[below[:-1]].files[below[-1]] = entry
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        odd.add(
            "error", where, "damaged archive", f"{type(error).__name__}: {error}", "what comes before it is kept"
        )
    except Exception as error:
        # lzma and zlib have error classes of their own, outside the usual hierarchy.
        odd.add(
            "error", where, "damaged archive", f"{type(error).__name__}: {error}", "what comes before it is kept"
        )
    for folder in found.values():
        folder.subfolders.sort()
    yield from sorted(found.values(), key=lambda folder: folder.parts)


def _members(path: Path, where: str, odd: Oddities) -> Iterator[tuple[str, Entry | None]]:
    """(name, file) for each member of an archive, (name, None) for a folder; nothing is ever unpacked to disk."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    yield info.filename, None
                    continue
                data = archive.read(info) if _wanted(info.filename, info.file_size, where, odd) else None
                yield info.filename, Entry(info.file_size, info.CRC, data=data)
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
    if not is_log(name.rsplit("/", 1)[-1]):
        return False
    if size > MAX_FILE:
        odd.add("error", f"{where}:{name}", "too large", f"{size} bytes", "ignored")
        return False
    return True


def signature(found: list[Folder]) -> list[str]:
    """One line per file, changing whenever a name, a size or a time of change does."""
    return [
        f"{'/'.join(folder.parts)}/{name} {entry.size} {entry.mtime_ns}"
        for folder in found
        for name, entry in sorted(folder.files.items())
    ] + [f"{'/'.join(folder.parts)}/" for folder in found]


def archive_stamp(root: str | os.PathLike[str]) -> str:
    """Size and time of change of a file, so that an unchanged archive need not be unpacked again."""
    status = os.stat(root)
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""
