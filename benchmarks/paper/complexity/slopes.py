"""Slopes in log-log scale: measured, and by the paper's orders."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from algoperf_kfac.subset import Subset
from benchmarks.paper.complexity.layers import Layer, Sweep
from benchmarks.paper.complexity.records import Results, key_of

TAIL = 3  # the largest sizes of a sweep, where work and not starting it is what takes time


def slope(values: Mapping[float, float]) -> float | None:
    """The least-squares slope of log(value) against log(size); None of fewer than two sizes.

    Raises:
        ValueError: a size or a value is not positive.
    """
    if len(values) < 2:
        return None
    if not all(size > 0 and value > 0 for size, value in values.items()):
        raise ValueError("slopes in log-log scale need positive sizes and values")
    fit = statistics.linear_regression(
        [math.log(size) for size in values], [math.log(value) for value in values.values()]
    )
    return fit.slope


def tail(values: Mapping[float, float]) -> dict[float, float]:
    """Those of the largest sizes."""
    return {size: values[size] for size in sorted(values)[-TAIL:]}


def measured(
    sweep: Sweep, framework: str, results: Results, quantity: str, curve: str, part: str
) -> dict[float, float]:
    """By size, what was measured of a sweep.

    Args:
        sweep: the layers.
        framework: in which.
        results: from `records.read`.
        quantity: "seconds" or "bytes".
        curve: "expand", "reduce", "part", "plain", "product" or "product of N rows".
        part: "A", "B", "both" or "step".
    """
    found: dict[float, float] = {}
    for size, layer in sweep.layers.items():
        result: dict[str, Any] | None = results.get(key_of(framework, layer))
        value = None if result is None else result[quantity].get(curve, {}).get(part)
        if value is not None:
            found[size] = value
    return found


def theory(sweep: Sweep, curve: str, part: str, rows: int) -> dict[float, float]:
    """By size, the multiply-adds of a factor by the paper's orders, their constants taken as one.

    Expand O(N R P^2), reduce O(N P (P + R)), with the P of the factor (arXiv 2311.00636, section 3); expand from
    a part of the rows as expand, of the examples that are left.

    Args:
        sweep: the layers.
        curve: "expand", "reduce" or "part".
        part: "A", "B" or "both".
        rows: `statistics_rows` of "part".
    """
    return {size: _adds(layer, curve, part, rows) for size, layer in sweep.layers.items()}


def _adds(layer: Layer, curve: str, part: str, rows: int) -> float:
    sides = {"A": (layer.in_dim,), "B": (layer.out_dim,), "both": (layer.in_dim, layer.out_dim)}[part]
    if curve == "reduce":
        return float(sum(layer.groups * layer.examples * p * (p + layer.positions) for p in sides))
    share = 1 / Subset.of(rows, layer.examples, layer.positions).weight if curve == "part" else 1.0
    return share * sum(layer.groups * layer.rows * p * p for p in sides)
