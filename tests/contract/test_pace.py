"""A `refresh_budget`: the rule as arithmetic, and both frameworks under a clock that the test sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.serialization
import numpy as np
import pytest

from algoperf_kfac import cadence, pace
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import from_orbax, pacing
from algoperf_kfac.pace import Pacer, in_turns, interval_at, pace_of
from tests.contract.frameworks import NAMES, InJAX, Run, start
from tests.contract.models import perceptron
from tests.contract.test_cadence import FOUR, LAYERS, refreshed

# Two turns of two layers each; the clock times updates 1 to 5.
OPTIONS = {"factor_interval": 1, "initial_statistics": 0, "refresh_interval": 2, "learning_rate": 1e-3}
BUDGETED = OPTIONS | {"refresh_budget": 0.1}
TURNS = (("l0", "l2"), ("l1", "l3"))


# The rule.


@pytest.mark.parametrize(
    ("refresh", "step", "budget"), [(10.0, 0.4, 0.1), (0.5, 1.0, 0.1), (3.0, 0.2, 0.5), (1e-3, 0.4, 0.05)]
)
def test_the_least_pace_within_the_budget(refresh: float, step: float, budget: float) -> None:
    found = pace_of(refresh, step, budget)
    assert refresh / (refresh + found * step) <= budget + 1e-12
    assert found == 1 or refresh / (refresh + (found - 1) * step) > budget


def test_paces_at_the_ends() -> None:
    assert pace_of(-0.1, 1.0, 0.1) == 1  # noise: no refresh was seen
    assert pace_of(1.0, 0.0, 0.1) == pace_of(1e30, 1.0, 0.1) == pace.MOST
    config = KFACConfig(**OPTIONS, refresh_budget=0.1)
    assert [interval_at(config, steps) for steps in (1, 2, 3, 225)] == [2, 2, 4, 226]
    assert interval_at(KFACConfig(**OPTIONS), 225) == 2


def test_turns_leave_workers_without_work() -> None:
    assert in_turns([3.0, 1.0, 2.0], turns=2, workers=1) == 1
    assert in_turns([1.0, 1.0, 1.0, 1.0], turns=4, workers=4) == 4  # all at once take 1, in turns 1 each
    assert in_turns([1.0, 1.0, 1.0, 1.0], turns=1, workers=4) == 1
    assert in_turns([], turns=3, workers=4) == 1


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, "0.1", True])
@pytest.mark.parametrize("framework", NAMES)
def test_bad_budgets_are_refused(framework: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^hyperparameter refresh_budget=[^\n]*allowed is [^\n]*$"):
        start(framework, perceptron((3, 2)), refresh_budget=value)


@pytest.mark.parametrize(("interval", "first"), [(1, 0), (2, 10), (10, 10), (3, 2), (4, 6), (7, 0)])
def test_rounds_begin_at_statistics_steps(interval: int, first: int) -> None:
    config = KFACConfig(
        factor_interval=interval, refresh_interval=interval, initial_statistics=first, refresh_budget=0.1
    )
    steps = [step for step in range(2000) if cadence.is_statistics_step(config, step)]
    for count, found in zip(cadence.ROUNDS, cadence.rounds(config), strict=True):
        assert found.full == (steps[count - 1], steps[count])
        assert [*found.timed] == [found.full[1] + 1 + i for i in range(cadence.TIMED)]


@pytest.mark.parametrize(
    ("initial", "steps", "expected"),
    [
        ("every", 1, [0, 1, 2, *range(6, 20)]),
        ("every", 5, [0, 1, 2, 7, 12, 17]),
        ("doubling", 1, [0, 1, 2, 7, 15]),
        ("doubling", 5, [0, 1, 2, 15]),
        ("doubling", 45, [0, 1, 2]),
    ],
)
def test_refreshes_of_all_layers_at_a_pace(initial: str, steps: int, expected: list[int]) -> None:
    config = KFACConfig(**(BUDGETED | {"initial_statistics": 20, "initial_refreshes": initial}))
    assert [step for step in range(20) if cadence.all_are_due(config, step, steps)] == expected


class Clock:
    """What `pace.now` reads: a second for a step, `refresh` more where all layers are refreshed."""

    def __init__(self, refresh: float, config: KFACConfig, late: Callable[[int], float] = lambda update: 0) -> None:
        self.update, self.read = 0, list[int]()
        self._refresh, self._late = refresh, late
        self._full = [0, *(update for each in cadence.rounds(config) for update in each.full)]

    def __call__(self) -> float:
        self.read.append(self.update)
        refreshes = sum(update <= self.update for update in self._full)
        return self.update + self._refresh * refreshes + self._late(self.update)


def test_the_second_round_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KFACConfig(**BUDGETED)
    pacer, found = Pacer(config), []
    for refresh, updates in ((0.5, range(10)), (2.0, range(90, 110))):
        monkeypatch.setattr(pace, "now", clock := Clock(refresh, config))
        for clock.update in updates:
            if pacer.after(clock.update, lambda: None):
                found.append((clock.update, pacer.pace([1.0] * 4, 1)))
    assert found == [(5, 5), (103, 18)]


@pytest.mark.parametrize("missed", [0, 1, 3, 5])
def test_a_round_that_was_not_seen_whole(monkeypatch: pytest.MonkeyPatch, missed: int) -> None:
    """One refresh is enough; without the steps behind it there is nothing to compare with."""
    config = KFACConfig(**BUDGETED)
    monkeypatch.setattr(pace, "now", clock := Clock(0.5, config))
    pacer, found = Pacer(config), []
    for clock.update in range(8):
        if clock.update != missed and pacer.after(clock.update, lambda: None):
            found.append(pacer.pace([1.0], 1))
    assert found == {0: [5], 1: [None], 3: [None], 5: []}[missed]


# In both frameworks.

# Options -> the compiled steps of runs of FOUR with these. They know nothing of the clock.
PROGRAMS: dict[str, dict[Any, Any]] = {}


def started(framework: str, **options: Any) -> Run:
    """A run of FOUR; in JAX it takes the steps that an earlier run of these options compiled."""
    run = start(framework, FOUR, **options)
    if isinstance(run, InJAX):
        run._compiled = PROGRAMS.setdefault(repr(sorted(options.items())), run._compiled)
    return run


def budgeted(
    framework: str,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    begin: Callable[..., Run] = started,
    **options: Any,
) -> Run:
    """A run whose clock knows which update it is asked after."""
    run = begin(framework, **(BUDGETED | options))
    step, count = run.step, iter(range(1000))

    def counted(*args: Any, **kwargs: Any) -> None:
        clock.update = next(count)
        step(*args, **kwargs)

    monkeypatch.setattr(run, "step", counted)
    monkeypatch.setattr(pace, "now", clock)
    return run


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("refresh", "late", "stretch"),
    [
        (0.01, lambda update: 0, 1),
        (0.5, lambda update: 0, 3),  # a pace of 4.5 steps
        (0.5, lambda update: 500 * (update >= 1) + 90 * (update >= 4), 3),
    ],
    ids=["within-the-budget", "beyond-it", "evaluations-between-updates"],
)
def test_turns_move_apart(
    framework: str, monkeypatch: pytest.MonkeyPatch, refresh: float, late: Callable[[int], float], stretch: int
) -> None:
    clock = Clock(refresh, KFACConfig(**BUDGETED), late)
    run = budgeted(framework, monkeypatch, clock)
    found = refreshed(run, 20)
    assert {step: found.pop(step) for step in (0, 1, 2)} == dict.fromkeys((0, 1, 2), LAYERS)
    # Turns fall where minus the step, modulo the number of turns, is theirs; as with intervals that are configured.
    turns = {step: TURNS[-(step // stretch) % 2] for step in range(6, 20) if step % stretch == 0}
    assert found == turns
    assert run.metrics()["refresh_interval"] == 2 * stretch
    assert clock.read == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("initial", "refresh", "expected"),
    [
        ("every", 0.5, [0, 1, 2, 7, 12, 17]),
        ("doubling", 0.5, [0, 1, 2, 15]),
    ],
)
def test_the_first_steps_obey(
    framework: str, monkeypatch: pytest.MonkeyPatch, initial: str, refresh: float, expected: list[int]
) -> None:
    options = {"initial_statistics": 20, "initial_refreshes": initial}
    run = budgeted(framework, monkeypatch, Clock(refresh, KFACConfig(**(BUDGETED | options))), **options)
    assert refreshed(run, 20) == dict.fromkeys(expected, LAYERS)


@pytest.mark.parametrize("framework", NAMES)
def test_a_resumed_run_keeps_the_pace(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.5, KFACConfig(**BUDGETED))
    first = budgeted(framework, monkeypatch, clock)
    for _ in range(10):
        first.step()
    second = started(framework, **BUDGETED)
    hand_over(framework, first, second)
    assert second.metrics()["refresh_interval"] == 6
    for _ in range(8):
        first.step()
        second.step()
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (run.metrics() for run in (first, second))
    counts = [{name: metrics[f"{name}/refreshes"] for name in LAYERS} for metrics in (ours, theirs)]
    assert counts[0] == counts[1]
    assert clock.read == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(("before", "after"), [(OPTIONS, BUDGETED), (BUDGETED, OPTIONS)], ids=["into", "out-of"])
def test_states_with_and_without_a_budget_load_into_each_other(
    framework: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    first, second = (started(framework, **options) for options in (before, after))
    for _ in range(4):
        first.step()
    hand_over(framework, first, second)
    second.step()
    assert second.metrics()["steps"] == 5
    assert second.metrics()["refresh_interval"] == 2


def hand_over(framework: str, first: Any, second: Any) -> None:
    """What one run saved, with its parameters, to another; its number of steps, too, which users know."""
    if framework == "pytorch":
        second.module.load_state_dict(first.module.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        return
    second.params = first.params
    second.state = flax.serialization.from_bytes(second.state, flax.serialization.to_bytes(first.state))
    second._steps = first._steps


@pytest.mark.parametrize("framework", NAMES)
def test_no_clock_is_read_without_a_budget(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "now", lambda: pytest.fail("read"))
    run = started(framework, **OPTIONS)
    for _ in range(6):
        run.step()
    assert run.metrics()["refresh_interval"] == 2


def test_processes_take_the_largest_of_their_paces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them did not see the round."""
    run: Any = budgeted("pytorch", monkeypatch, Clock(0.5, KFACConfig(**BUDGETED)))
    asked = []
    gather = run.optimizer._processes.all_gather

    def all_gather(value: Any) -> list[Any]:
        if not isinstance(value, int):
            return gather(value)
        asked.append(value)
        return [value, 9, None]

    monkeypatch.setattr(run.optimizer._processes, "all_gather", all_gather)
    for _ in range(8):
        run.step()
    assert asked == [5]
    assert run.metrics()["refresh_interval"] == 10


def test_processes_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing.jax, "process_count", lambda: 2)
    monkeypatch.setattr(pacing.multihost_utils, "process_allgather", lambda own: np.stack([own, np.int32(9)]))
    run: Any = budgeted("jax", monkeypatch, Clock(0.5, KFACConfig(**BUDGETED)), partial(start, model=FOUR))
    for _ in range(8):
        run.step()
    assert run.metrics()["refresh_interval"] == 10


def test_another_pace_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = budgeted("jax", monkeypatch, Clock(0.5, KFACConfig(**BUDGETED)), partial(start, model=FOUR))
    for _ in range(9):
        run.step()
    assert [compiled._cache_size() for compiled, _ in run._compiled.values()] == [1]


def test_orbax_without_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = budgeted("jax", monkeypatch, Clock(0.5, KFACConfig(**BUDGETED)))
    for _ in range(6):
        run.step()
    saved = flax.serialization.msgpack_restore(flax.serialization.to_bytes(run.state))
    fresh = run.optimizer.init(run.params)
    assert run.optimizer.metrics(from_orbax(fresh, saved))["refresh_interval"] == 6
