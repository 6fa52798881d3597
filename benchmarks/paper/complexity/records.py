"""What was measured of layers, kept in the repository: a line of JSON for each layer and framework."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept
from benchmarks.paper.complexity import layers
from benchmarks.paper.complexity.layers import Layer
from workloads.runner.jobs import CHECKOUT

PATH = CHECKOUT / "docs" / "results" / "complexity.jsonl"
Results = dict[str, dict[str, Any]]


def key(found: Mapping[str, Any]) -> str:
    """What tells results apart: framework and layer."""
    return json.dumps({"framework": found["framework"], "layer": found["layer"]}, sort_keys=True)


def key_of(framework: str, layer: Layer) -> str:
    """The same of a layer."""
    return key({"framework": framework, "layer": layers.as_dict(layer)})


def read(path: Path = PATH) -> Results:
    """All kept results by key.

    Raises:
        UserError: a line cannot be read.
    """
    return kept.read(path, key)


def add(results: Iterable[dict[str, Any]], path: Path = PATH) -> None:
    """Adds results; one of the same layer in the same framework is replaced."""
    kept.add(results, path, key)


def missing(wanted: Sequence[Layer], framework: str, results: Results) -> list[Layer]:
    """The layers without a result."""
    return [layer for layer in wanted if key_of(framework, layer) not in results]
