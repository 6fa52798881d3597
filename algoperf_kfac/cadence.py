"""When things are due: statistics steps, and whose turn a refresh is. Steps count updates from 0.

What is decided on the device has the same formulas there: steps may be traced.

With a `refresh_budget` the pace counts, too: how many steps two refreshes of all layers are to be apart
(`pace.py`). It is 1 until the clock was read. The interval is the configured one times the least whole number that
reaches the pace. Layers that share a turn go on sharing it, and their turns move apart: so the work of a turn is
still divided over several devices, and compiled programs do not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol, Self, TypeVar

from algoperf_kfac.config import KFACConfig

# The clock is read from these statistics steps on, counted from 1. The first compiles and takes memory; by the
# hundredth, input pipelines and the clocks of processors have settled.
ROUNDS = (2, 100)
TIMED = 3  # steps without refresh behind a round's two refreshes; their median bears one that was held up


class Integer(Protocol):
    """An int, or an integer array of a framework. Truth values count as 0 and 1."""

    def __neg__(self) -> Self: ...
    def __add__(self, other: Self | int) -> Self: ...
    def __sub__(self, other: int) -> Self: ...
    def __mul__(self, other: Self | int) -> Self: ...
    def __floordiv__(self, other: Self | int) -> Self: ...
    def __mod__(self, other: Self | int) -> Self: ...
    def __and__(self, other: Self) -> Self: ...
    def __or__(self, other: Self | int) -> Self: ...
    def __lt__(self, other: int) -> Self: ...  # type: ignore[misc]  # as of int itself
    def __ge__(self, other: Self | int) -> Self: ...


Step = TypeVar("Step", bound=Integer)


def is_statistics_step(config: KFACConfig, step: int) -> bool:
    """Whether the update number `step` takes statistics: each of the first ones, then one in an interval.

    Of a traced step, whether it does is traced, too.
    """
    return (step < config.initial_statistics) | (step % config.factor_interval == 0)


def young_until(config: KFACConfig) -> int:
    """The step before which statistics are so young that a refresh takes all layers."""
    return max(config.refresh_interval, config.initial_statistics)


def all_are_due(config: KFACConfig, step: Step, pace: Step | int = 1) -> Step:
    """Whether a statistics step refreshes every layer, as the statistics are young.

    Each does, or the first, second, fourth, eighth, ... of them ("doubling"): what rests on n batches is worth
    decomposing anew when there are 2 n. With a budget, those of them that are as far apart as the pace, and those
    that the clock times. Of a traced step, whether it does is traced, too.
    """
    due, count = step < young_until(config), _statistics_steps(config, step)
    doubles = config.initial_refreshes == "doubling"
    if doubles:
        due = due & ((count & (count - 1)) < 1)
    if config.refresh_budget is None:
        return due
    first = rounds(config)[0].full[1]  # up to this one the pace is not known
    # Of the powers of 2, the one before is half as many statistics steps away.
    apart = (count // 2) >= pace if doubles else ((step - first) % pace) < 1
    timed = _is_one_of(step, (update for each in rounds(config) for update in each.full))
    return (due & (apart | (step < first)) & (_is_quiet(config, step) < 1)) | timed


def _statistics_steps(config: KFACConfig, step: Step) -> Step:
    """How many statistics steps there are up to `step`, which is one of them."""
    first, interval = config.initial_statistics, config.factor_interval
    later = step // interval + (first + 1 + -first // interval)  # multiples of the interval from `first` on
    return (step + 1) * (step < first) + later * (step >= first)


def cycle(config: KFACConfig) -> int:
    """Statistics steps in a refresh interval: so many turns are there, one for each."""
    return config.refresh_interval // config.factor_interval


def stretch(config: KFACConfig, pace: Step) -> Step:
    """What the refresh interval is multiplied by, for refreshes to be no closer than the pace."""
    return -(-pace // config.refresh_interval)


def turn(config: KFACConfig, step: Step, pace: Step | int = 1) -> Step:
    """Whose turn a statistics step is: layer number i is refreshed where i modulo `cycle` is this number.

    -1, nobody's, as long as all steps take statistics, between turns that a budget has moved apart, and while steps
    without a refresh are timed.
    """
    place = -(step // config.factor_interval)
    if config.refresh_budget is None:
        number = place % cycle(config)
        return (number + 1) * (step >= config.initial_statistics) - 1
    apart = stretch(config, pace)
    place = place % (apart * cycle(config))
    begins = ((place % apart) < 1) & (step >= config.initial_statistics) & (_is_quiet(config, step) < 1)
    return (place // apart + 1) * begins - 1


def is_due(config: KFACConfig, step: int, number: int, refreshes: int, pace: int = 1) -> bool:
    """Whether a layer is refreshed at a statistics step.

    Args:
        config: the configuration.
        step: the update.
        number: the layer's place among the covered ones.
        refreshes: its successful refreshes so far; one that never succeeded is due at once.
        pace: steps that two refreshes of all layers are to be apart; counts with a `refresh_budget` only.
    """
    all_are = bool(all_are_due(config, step, pace))
    return all_are or not refreshes or number % cycle(config) == turn(config, step, pace)


@dataclasses.dataclass(frozen=True)
class Round:
    """Updates between which the clock is read.

    Attributes:
        full: two that refresh all layers.
        timed: those behind them, which refresh none.
    """

    full: tuple[int, int]
    timed: range

    @property
    def marks(self) -> frozenset[int]:
        """The updates after which the clock is read."""
        return frozenset({each - before for each in self.full for before in (0, 1)} | {*self.timed})


def rounds(config: KFACConfig) -> tuple[Round, ...]:
    """When the clock is read; never without a budget."""
    if config.refresh_budget is None:
        return ()
    found = []
    for count in ROUNDS:
        full = (_statistics_step(config, count), _statistics_step(config, count + 1))
        found.append(Round(full, range(full[1] + 1, full[1] + 1 + TIMED)))
    return tuple(found)


def _statistics_step(config: KFACConfig, count: int) -> int:
    """The update that is the statistics step with this number, counted from 1; as in `_statistics_steps`."""
    first, interval = config.initial_statistics, config.factor_interval
    return count - 1 if count <= first else (count - 1 - first - (-first // interval)) * interval


def _is_quiet(config: KFACConfig, step: Step) -> Step:
    """Whether steps without a refresh are timed."""
    return _is_one_of(step, (update for each in rounds(config) for update in each.timed))


def _is_one_of(step: Step, updates: Iterable[int]) -> Step:
    found = step < 0
    for update in updates:
        found = found | ((step >= update) & (step < update + 1))
    return found
