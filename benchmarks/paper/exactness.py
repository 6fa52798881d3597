"""The page of exactness: measured errors of both approximations, case by case."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.paper.exactness_cases import TABLE, ZERO, errors
from commands import atomic

HEAD = """# Where expand and reduce are exact

Written by `python -m benchmarks.paper exactness`. Relative Frobenius error of each approximation (exact
type-2 Fisher, float64) against the layer's exact block of the Gauss-Newton matrix, by automatic
differentiation. **0** is below 1e-10. The setting is the paper's: *expand*, every position has a loss of its
own; *reduce*, positions are summed or averaged before the loss. The same lines, with bounds on both sides,
are tests in both frameworks (`tests/math/test_truth_table.py`, `tests/jax/test_truth_table.py`).

| row | case | layer | setting | expand | reduce |
|---|---|---|---|---|---|
"""
READING = """
- Each is exact in its setting for deep linear networks with a Gaussian likelihood (rows 1, 2), as the paper
  proves, and only there: a loss whose curvature differs between examples, as cross-entropy's does, leaves an
  error in either setting (row 4), and so do weights that differ between positions (row 3).
- With one example reduce is exact whatever stands behind the sum (row 5). A batch of one vector leaves nothing
  to approximate (row 6).
- In the middle of a network the setting is not that of the loss alone: what mixes positions decides. Under
  uniform attention reduce is exact although each position has its own loss (row 7).
- Of a bias alone reduce is exact in any network (row 10): its input is 1 everywhere.
- On graphs of several sizes reduce is exact if it is told how nodes are read out, and is not if it is told
  wrong (rows 11, 12).
- Zero padding makes border pixels unlike the others: the first of two convolutions is then in neither setting
  (row 13).
"""


def run(given: argparse.Namespace, output: Path) -> None:
    """Writes the page; nothing else is asked."""
    atomic.write_text(output, page())


def page() -> str:
    """The whole page; the same on every call."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return HEAD + "".join(f"{line}\n" for line in _lines()) + READING
    finally:
        torch.set_default_dtype(dtype)


def _lines() -> Iterator[str]:
    for line in TABLE.values():
        found = {}
        for approximation in ("expand", "reduce"):
            torch.manual_seed(0)
            found[approximation] = errors(line.make(), approximation)
        for layer, expand in found["expand"].items():
            cells = [_cell(expand), _cell(found["reduce"][layer])]
            yield f"| {line.row} | {line.what} | `{layer}` | {line.setting} | {' | '.join(cells)} |"


def _cell(error: float) -> str:
    return "**0**" if error < ZERO else f"{error:.2g}"
