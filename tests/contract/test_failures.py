"""Decompositions that fail, and numbers that overflow: counted, and what there was before stays in use.

Decompositions do fail in float32. PyTorch retries in float64, JAX in the precision of the factors, so that the
number of attempts may differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.contract.frameworks import EVERY_STEP, NAMES, Run, positions, start
from tests.contract.models import normal, perceptron

SIZE, EXAMPLES = 24, 60
# Statistics of one step alone: the factor of one example has rank one, but for rounding, which makes it indefinite.
OPTIONS = {"preconditioner": "inverse", "grafting": False, "factor_decay": 0.0, "noise_floor": 0.0, **EVERY_STEP}
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
    old = run.parameters()
    run.step(1.0, ONE)
    metrics = run.metrics()
    assert (metrics["l0/refreshes"], metrics["stand_ins"]) == (before, 0)
    assert metrics["l0/failures"] >= 3
    for parameter, moved in zip(old, run.parameters(), strict=True):
        assert np.isfinite(moved).all()
        assert not np.array_equal(parameter, moved)


@pytest.mark.parametrize("framework", NAMES)
def test_statistics_that_are_not_finite_are_left_out(framework: str) -> None:
    """Output gradients whose squares overflow; the averages stay, and so does what was made of them."""
    run = start(framework, perceptron((3, 2)), **EVERY_STEP)
    run.step()
    before = [np.array(m) for m in run.factors()["l0"]]
    run.step(1e200)
    assert run.metrics()["l0/dropped"] == 1
    assert run.metrics()["failures"] == 0
    for old, new in zip(before, run.factors()["l0"], strict=True):
        np.testing.assert_array_equal(new, old)
    assert all(np.isfinite(p).all() for p in run.parameters())
