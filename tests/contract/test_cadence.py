"""Which steps take statistics and whose turn a refresh is, watched from outside: factors move, counts go up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.contract.frameworks import NAMES, Run, start
from tests.contract.models import perceptron

FOUR = perceptron((3, 4, 3, 4, 2))
LAYERS = ("l0", "l1", "l2", "l3")


def refreshed(run: Run, steps: int) -> dict[int, tuple[str, ...]]:
    """Step -> the layers that were refreshed in it, of the steps in which some were."""
    found, before = {}, dict.fromkeys(LAYERS, 0.0)
    for step in range(steps):
        run.step()
        metrics = run.metrics()
        after = {name: metrics[f"{name}/refreshes"] for name in LAYERS}
        names = tuple(name for name in LAYERS if after[name] > before[name])
        if names:
            found[step] = names
        before = after
    return found


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"factor_interval": 1, "initial_statistics": 0, "refresh_interval": 2}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"factor_interval": 3, "initial_statistics": 2, "refresh_interval": 3}, [0, 1, 3, 6, 9]),
        ({"factor_interval": 4, "initial_statistics": 6, "refresh_interval": 4}, [0, 1, 2, 3, 4, 5, 8]),
    ],
)
def test_statistics_steps(framework: str, options: dict[str, int], expected: list[int]) -> None:
    """The first ones all, then one in an interval; on no other step do the factors move."""
    run = start(framework, perceptron((3, 2)), learning_rate=1e-2, **options)
    announced, moved, last = [], [], np.zeros(())
    for step in range(10):
        if run.is_statistics_step():
            announced.append(step)
        run.step()
        now = np.asarray(run.factors()["l0"].B)
        if not np.array_equal(now, last):
            moved.append(step)
        last = now.copy()
    assert announced == moved == expected


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        pytest.param(
            (2, 1, 6, "every"),
            {
                **dict.fromkeys((0, 2, 4), LAYERS),  # young: before step 6
                6: ("l0", "l3"),
                8: ("l2",),
                10: ("l1",),
                12: ("l0", "l3"),
            },
            id="three-turns",
        ),
        pytest.param(
            (2, 5, 4, "every"),
            {
                **dict.fromkeys((0, 1, 2, 3, 4), LAYERS),  # young: as long as all steps take statistics
                6: ("l1", "l3"),
                8: ("l0", "l2"),
                10: ("l1", "l3"),
                12: ("l0", "l2"),
            },
            id="two-turns",
        ),
        pytest.param(
            (4, 0, 4, "every"),
            dict.fromkeys((0, 4, 8, 12), LAYERS),
            id="all-at-once",
        ),
        pytest.param(
            (1, 0, 6, "every"),
            {
                **dict.fromkeys(range(6), LAYERS),
                6: ("l0",),
                9: ("l3",),
                10: ("l2",),
                11: ("l1",),
                12: ("l0",),
            },
            id="more-turns-than-layers",
        ),
        pytest.param(
            (2, 4, 8, "doubling"),  # statistics at 0, 1, 2, 3, 4, 6, 8, ...
            {
                **dict.fromkeys((0, 1, 3), LAYERS),
                4: ("l2",),  # turns begin where only one step in an interval takes statistics
                6: ("l1",),
                8: ("l0",),
                10: ("l3",),
                12: ("l2",),
            },
            id="doubling",
        ),
        pytest.param(
            (1, 0, 8, "doubling"),
            {
                **dict.fromkeys((0, 1, 3, 7), LAYERS),
                5: ("l3",),
                6: ("l2",),
                8: ("l0",),
            },
            id="doubling-among-turns",
        ),
    ],
)
def test_refreshes(framework: str, intervals: tuple[int, int, int, str], expected: dict[int, Any]) -> None:
    """All layers while the statistics are young, at each step or some; then each once in an interval, in turns."""
    names = ("factor_interval", "initial_statistics", "refresh_interval", "initial_refreshes")
    options = dict(zip(names, intervals, strict=True))
    assert refreshed(start(framework, FOUR, learning_rate=1e-3, **options), 13) == expected


@pytest.mark.parametrize("framework", NAMES)
def test_a_layer_without_gradient_is_due_until_it_has_one(framework: str) -> None:
    """Its factor is zero and there is nothing to decompose; then it does not wait for its turn."""
    options = {"factor_interval": 1, "initial_statistics": 0, "refresh_interval": 4, "learning_rate": 1e-3}
    run = start(framework, FOUR, **options)
    counts = []
    for step in range(7):
        run.step(0.0 if step < 5 else 1.0)
        metrics = run.metrics()
        counts.append([metrics[f"{name}/refreshes"] for name in LAYERS])
    assert counts[4] == [0, 0, 0, 0]
    assert counts[5] == [1, 1, 1, 1]
    assert sum(counts[6]) == 5  # step 6 is the turn of one of them
    assert run.metrics()["failures"] == 0


@pytest.mark.parametrize("framework", NAMES)
def test_what_is_counted(framework: str) -> None:
    """The same names in both, for the run and for each layer.

    PyTorch compares G^T A with the gradient at the first step; a program cannot, JAX does it when it is asked to.
    Noise is counted among eigenvalues, which JAX does not keep.
    """
    run = start(framework, FOUR, factor_interval=1, refresh_interval=1)
    run.step()
    metrics = run.metrics()
    each = {"refreshes", "failures", "skipped", "dropped", "idle", "vanished", "drift", "graft_ratio", "cosine"}
    own = {"gradient_error", "noise"} if framework == "pytorch" else set()
    assert {key for key in metrics if "/" in key} == {f"{name}/{key}" for name in LAYERS for key in each | own}
    assert {"steps", "coverage", "stand_ins", *(each - {"drift"})} <= metrics.keys()
    assert (metrics["steps"], metrics["coverage"], metrics["refreshes"]) == (1, 1, 4)
