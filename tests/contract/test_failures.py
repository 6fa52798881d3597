"""Decompositions that fail: retried with more damping and counted; what still fails leaves what there was.

In float32, where they do fail. PyTorch retries in float64, JAX in the precision of the factors, so that the number
of attempts may differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.contract.frameworks import EVERY_STEP, NAMES, Run, positions, start
from tests.contract.models import normal, perceptron

SIZE, EXAMPLES = 24, 60
# Statistics of one step alone: the factor of one example has rank one, but for rounding, which makes it indefinite.
OPTIONS = {"preconditioner": "inverse", "grafting": False, "factor_decay": 0.0, **EVERY_STEP}
ONE = positions(np.arange(EXAMPLES) == 0)


def started(framework: str, **options: Any) -> Run:
    model = perceptron((SIZE, 2), normal(EXAMPLES, SIZE), bias=False)
    return start(framework, model, dtype="float32", **OPTIONS, **options)


@pytest.mark.parametrize("framework", NAMES)
def test_more_damping_helps(framework: str) -> None:
    """Below float32's rounding damping is as good as none; a hundred times as much is enough."""
    run = started(framework, damping=4e-8)
    run.step(1.0, ONE)
    assert run.metrics()["l0/refreshes"] == 1
    assert run.metrics()["l0/failures"] in (1, 2, 3)


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("before", [0, 1], ids=["nothing-before", "one-before"])
def test_nothing_helps(framework: str, before: int) -> None:
    """Attempts are counted, and the step is made with what was there before: an inverse, or nothing."""
    run = started(framework, damping=1e-13)
    for _ in range(before):
        run.step()
    assert run.metrics()["failures"] == 0
    old = [p.copy() for p in run.parameters()]
    run.step(1.0, ONE)
    metrics = run.metrics()
    assert (metrics["l0/refreshes"], metrics["stand_ins"]) == (before, 0)
    assert metrics["l0/failures"] >= 3
    for parameter, moved in zip(old, run.parameters(), strict=True):
        assert np.isfinite(moved).all()
        assert not np.array_equal(parameter, moved)
