"""When things are due: statistics steps, and whose turn a refresh is. Steps count updates from 0.

What is decided on the device has the same formulas there: steps may be traced.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

from algoperf_kfac.config import KFACConfig


class Integer(Protocol):
    """An int, or an integer array of a framework. Truth values count as 0 and 1."""

    def __neg__(self) -> Self: ...
    def __add__(self, other: Self | int) -> Self: ...
    def __sub__(self, other: int) -> Self: ...
    def __mul__(self, other: Self) -> Self: ...
    def __floordiv__(self, other: int) -> Self: ...
    def __mod__(self, other: int) -> Self: ...
    def __and__(self, other: Self) -> Self: ...
    def __lt__(self, other: int) -> Self: ...  # type: ignore[misc]  # as of int itself
    def __ge__(self, other: int) -> Self: ...  # type: ignore[misc]


Step = TypeVar("Step", bound=Integer)


def is_statistics_step(config: KFACConfig, step: int) -> bool:
    """Whether the update number `step` takes statistics: each of the first ones, then one in an interval.

    Of a traced step, whether it does is traced, too.
    """
    return (step < config.initial_statistics) | (step % config.factor_interval == 0)


def young_until(config: KFACConfig) -> int:
    """The step before which statistics are so young that a refresh takes all layers."""
    return max(config.refresh_interval, config.initial_statistics)


def all_are_due(config: KFACConfig, step: Step) -> Step:
    """Whether a statistics step refreshes every layer, as the statistics are young.

    Each does, or the first, second, fourth, eighth, ... of them ("doubling"): what rests on n batches is worth
    decomposing anew when there are 2 n. Of a traced step, whether it does is traced, too.
    """
    young = step < young_until(config)
    if config.initial_refreshes == "every":
        return young
    count = _statistics_steps(config, step)
    return young & ((count & (count - 1)) < 1)


def _statistics_steps(config: KFACConfig, step: Step) -> Step:
    """How many statistics steps there are up to `step`, which is one of them."""
    first, interval = config.initial_statistics, config.factor_interval
    later = step // interval + (first + 1 + -first // interval)  # multiples of the interval from `first` on
    return (step + 1) * (step < first) + later * (step >= first)


def cycle(config: KFACConfig) -> int:
    """Statistics steps in a refresh interval: so many turns are there, one for each."""
    return config.refresh_interval // config.factor_interval


def turn(config: KFACConfig, step: Step) -> Step:
    """Whose turn a statistics step is: layer number i is refreshed where i modulo `cycle` is this number.

    -1, nobody's, as long as all steps take statistics.
    """
    number = -(step // config.factor_interval) % cycle(config)
    return (number + 1) * (step >= config.initial_statistics) - 1


def is_due(config: KFACConfig, step: int, number: int, refreshes: int) -> bool:
    """Whether a layer is refreshed at a statistics step.

    Args:
        config: the configuration.
        step: the update.
        number: the layer's place among the covered ones.
        refreshes: its successful refreshes so far; one that never succeeded is due at once.
    """
    return bool(all_are_due(config, step)) or not refreshes or number % cycle(config) == turn(config, step)
