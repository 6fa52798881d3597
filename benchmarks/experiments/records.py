"""The kept results of runs: a line of JSON for each, in the repository."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import kept
from benchmarks.experiments.runs import key
from workloads.runner.jobs import CHECKOUT

PATH = CHECKOUT / "docs" / "results" / "experiments.jsonl"


def read(path: Path = PATH) -> dict[str, dict[str, Any]]:
    """All kept results by what tells them apart.

    Raises:
        UserError: a line cannot be read.
    """
    return kept.read(path, key)


def add(results: Iterable[dict[str, Any]], path: Path = PATH) -> None:
    """Adds results; one of the same run is replaced."""
    kept.add(results, path, key)
