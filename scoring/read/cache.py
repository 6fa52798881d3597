"""Parsed logs kept between two runs, so that unchanged logs are not parsed again.

Numbers are stored as plain arrays and names as JSON: nothing in a cache file can be executed. A cache that cannot
be read or written only costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from commands import atomic

FORMAT = "2"
KEEP = 8

Row = tuple[str, str, str, str, str, int]


def folder() -> Path:
    """Where caches lie: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "algoperf_kfac", "scoring")


def key(roots: Iterable[str], lines: Iterable[str]) -> str:
    """A name that changes with the inputs, with any file below them, and with the code that reads them."""
    digest = hashlib.sha256(FORMAT.encode())
    package = Path(__file__).parents[1]
    sources = [*package.glob("read/*.py"), *package.glob("*.py"), *package.glob("data/algoperf_*.json")]
    for source in sorted(sources):
        digest.update(source.read_bytes())
    for text in ("\n".join(roots), "\n".join(lines)):
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest())
    return digest.hexdigest()[:32]


def load(name: str) -> tuple[pd.DataFrame, pd.DataFrame, list[Row]] | None:
    """What was stored under ``name``, or None."""
    path = folder() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = json.loads(bytes(stored["names"]).decode())
            evals = pd.DataFrame({column: stored[f"e{k}"] for k, column in enumerate(names["evals"])}, copy=False)
        trials = pd.DataFrame(names["trials"])
        trials = trials.astype(names["types"])
        os.utime(path)
        return evals, trials, [tuple(row) for row in names["oddities"]]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    except Exception:
        # zipfile and json raise classes of their own on a torn file, which is as good as none.
        return None


def store(name: str, evals: pd.DataFrame, trials: pd.DataFrame, oddities: list[Row]) -> None:
    """Keep the tables under ``name``, and only the latest few; a full or read-only disk is no error."""
    names = {
        "evals": list(evals.columns),
        "trials": {column: trials[column].tolist() for column in trials.columns},
        "types": {column: str(trials[column].dtype) for column in trials.columns},
        "oddities": oddities,
    }
    arrays: dict[str, Any] = {f"e{k}": evals[column].to_numpy() for k, column in enumerate(evals.columns)}
    arrays["names"] = np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)
    with contextlib.suppress(OSError, ValueError):
        folder().mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, **arrays)
        atomic.write_bytes(folder() / f"{name}.npz", content.getvalue())
        kept = sorted(folder().glob("*.npz"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in kept[KEEP:]:
            path.unlink()
