"""What is run, and the results that are kept of it. No framework."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept
from workloads.runner.jobs import CHECKOUT

PATH = CHECKOUT / "docs" / "results" / "update.jsonl"
OPTIMIZERS = ("nadamw", "expand", "part", "reduce")
BATCHES = (128, 512, 2048)
QUICK = (128,)
Results = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Updates by one optimizer.

    Attributes:
        optimizer: "nadamw", or an approximation: "expand", "reduce", "part" (expand from a part of the rows).
        batch: examples.
        memory_gb: what the process may take beyond what it has before the first update; None for no limit.
    """

    optimizer: str
    batch: int
    memory_gb: float | None = None


def cases(memory_gb: float, *, quick: bool) -> list[Case]:
    """All: each without a limit, which is timed, and with it."""
    return [
        Case(optimizer, batch, limit)
        for batch in (QUICK if quick else BATCHES)
        for optimizer in OPTIMIZERS
        for limit in (None, memory_gb)
    ]


def key(found: Mapping[str, Any]) -> str:
    """What tells results apart."""
    return json.dumps({field.name: found[field.name] for field in dataclasses.fields(Case)})


def read(path: Path = PATH) -> Results:
    """All kept results by key.

    Raises:
        UserError: a line cannot be read.
    """
    return kept.read(path, key)


def add(results: Iterable[dict[str, Any]], path: Path = PATH) -> None:
    """Adds results; one of the same case is replaced."""
    kept.add(results, path, key)


def missing(wanted: Sequence[Case], results: Results) -> list[Case]:
    """Those without a result."""
    return [case for case in wanted if key(dataclasses.asdict(case)) not in results]
