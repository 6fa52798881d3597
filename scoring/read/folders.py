"""Folders of a directory tree or an archive in one form: names, sizes, and the bytes of the files that matter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from commands.errors import UserError
from scoring.oddities import Oddities

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
MAX_DEPTH = 12


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


@dataclass(slots=True)
class Archive:
    """An archive that has not been opened yet."""

    path: Path
    parts: tuple[str, ...]
    where: str


@dataclass
class Survey:
    """What lies at and below one input, before any file is opened.

    Attributes:
      root: the names of the input and of all folders above it; an archive's own is its stem.
      folders: the folders of the directory tree.
      archives: the archives among them, or the input itself.
      stamp: size and time of change of the input if it is an archive.
    """

    root: tuple[str, ...]
    folders: list[Folder] = field(default_factory=list)
    archives: list[Archive] = field(default_factory=list)
    stamp: str = ""

    def signature(self) -> list[str]:
        """One line per file, changing whenever a name, a size or a time of change does."""
        lines = [self.stamp] if self.stamp else []
        for folder in self.folders:
            place = "/".join(folder.parts)
            lines.append(f"{place}/")
            lines += [f"{place}/{name} {one.size} {one.mtime_ns}" for name, one in sorted(folder.files.items())]
        return lines


def is_log(name: str) -> bool:
    """Whether a file is one of those a trial is read from."""
    return name in ("eval_measurements.csv", "hparams.json") or (
        name.startswith(("meta_data_", "flags_")) and name.endswith(".json")
    )


def is_foreign(name: str) -> bool:
    """Whether a file or folder is what a Mac's Finder adds to archives and foreign disks: copies without data."""
    return name == "__MACOSX" or name.startswith("._")


def archive_stem(name: str) -> str | None:
    """``runs`` for ``runs.tar.gz``, and None for what is no archive."""
    for suffix in sorted(ARCHIVES, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


def survey(root: str | os.PathLike[str], odd: Oddities) -> Survey:
    """All folders at and below ``root`` (a directory or an archive), in the order of their names.

    Raises:
      UserError: ``root`` does not exist, or is a file and no archive.
    """
    path = Path(root)
    if not path.exists():
        raise UserError(f"{root}: no such file or directory")
    if path.is_file():
        stem = archive_stem(path.name)
        if stem is None:
            raise UserError(f"{root}: neither a directory nor an archive ({', '.join(ARCHIVES)})")
        status = path.stat()
        # An archive is packed in one go, so that its own size and time stand for all it holds.
        full = path.resolve()
        parts = (*full.parts[1:-1], stem)
        stamp = f"{full} {status.st_size} {status.st_mtime_ns}"
        return Survey(parts, archives=[Archive(path, parts, str(root))], stamp=stamp)
    full = path.resolve()
    found = Survey(full.parts[1:])
    _directory(str(full), found.root, str(root), found, odd, 0, set())
    found.folders.sort(key=lambda folder: folder.parts)
    found.archives.sort(key=lambda archive: (archive.parts, archive.path))
    return found


def _directory(
    path: str, parts: tuple[str, ...], where: str, found: Survey, odd: Oddities, depth: int, seen: set[str]
) -> None:
    folder = Folder(parts, where)
    below: list[tuple[str, str]] = []
    foreign = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_foreign(entry.name):
                    foreign += 1
                elif entry.is_dir():
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
    note_foreign(where, foreign, odd)
    folder.subfolders.sort()
    found.folders.append(folder)
    # Checkpoints below a trial are of no interest, and may be many.
    if "eval_measurements.csv" in folder.files:
        return
    if depth >= MAX_DEPTH:
        odd.add("error", where, "too deep", f"more than {MAX_DEPTH} levels", "not followed")
        return
    for name, real in below:
        _directory(real, (*parts, name), f"{where}/{name}", found, odd, depth + 1, seen)
    for name in sorted(folder.files):
        stem = archive_stem(name)
        if stem is not None:
            found.archives.append(Archive(Path(path, name), (*parts, stem), f"{where}/{name}"))


def note_foreign(where: str, count: int, odd: Oddities) -> None:
    """Say that a Mac's additions were left out."""
    if count:
        odd.add("note", where, "files of the Finder", "__MACOSX or ._ names, copies without data", "ignored", count)
