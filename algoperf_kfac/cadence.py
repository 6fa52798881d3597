"""When things are due: statistics steps, and whose turn a refresh is. Steps count updates from 0.

What is decided on the device has the same formulas there: `young_until`, `cycle` and `turn` take traced steps, too.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

from algoperf_kfac.config import KFACConfig


class Integer(Protocol):
    """An int, or an integer array of a framework."""

    def __neg__(self) -> Self: ...
    def __floordiv__(self, other: int) -> Self: ...
    def __mod__(self, other: int) -> Self: ...


Step = TypeVar("Step", bound=Integer)


def is_statistics_step(config: KFACConfig, step: int) -> bool:
    """Whether the update number `step` takes statistics: each of the first ones, then one in an interval.

    Of a traced step, whether it does is traced, too.
    """
    return (step < config.initial_statistics) | (step % config.factor_interval == 0)


def young_until(config: KFACConfig) -> int:
    """The step before which statistics are so young that every layer is refreshed at every statistics step."""
    return max(config.refresh_interval, config.initial_statistics)


def cycle(config: KFACConfig) -> int:
    """Statistics steps in a refresh interval: so many turns are there, one for each."""
    return config.refresh_interval // config.factor_interval


def turn(config: KFACConfig, step: Step) -> Step:
    """Whose turn a statistics step is: layer number i is refreshed where i modulo `cycle` is this number."""
    return -(step // config.factor_interval) % cycle(config)


def is_due(config: KFACConfig, step: int, number: int, refreshes: int) -> bool:
    """Whether a layer is refreshed at a statistics step.

    Args:
        config: the configuration.
        step: the update.
        number: the layer's place among the covered ones.
        refreshes: its successful refreshes so far; one that never succeeded is due at once.
    """
    return step < young_until(config) or not refreshes or number % cycle(config) == turn(config, step)
