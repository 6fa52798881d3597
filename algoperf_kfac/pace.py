"""How often refreshes may come for them to stay within a share of a run's time, as a clock says. No framework.

The clock is read in the first steps, and once more at the hundredth statistics step (`cadence.rounds`): around two
updates that refresh all layers, and then around three that refresh none. With s the median of the latter's seconds,
and r the lesser of the former's, less s, two refreshes of all layers have to be

    pace = r (1 - budget) / (budget s)

steps apart for r / (r + pace s) to be the budget, and the refresh interval is the least multiple of the configured
one that reaches the pace. The lesser of two, and a median, because an evaluation between two updates, a compilation
or another program on the machine only ever adds time.

Times are not reproducible, so they decide as seldom as can be. The pace is a part of the state: behind the second
round a run that is resumed goes on bit for bit. Processes take the largest of their paces. Nothing waits for a
device but at a reading, fourteen times in a run at most.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from algoperf_kfac.assignment import largest_load
from algoperf_kfac.cadence import Step, cycle, rounds, stretch
from algoperf_kfac.config import KFACConfig

MOST = 2**28  # steps; a whole number on the device, with room for what it is multiplied by


def pace_of(refresh: float, step: float, budget: float) -> int:
    """Steps that two refreshes of all layers have to be apart.

    Args:
        refresh: seconds of a refresh of all layers.
        step: seconds of a step without.
        budget: the share of the time of both that refreshes may take, in (0, 1).
    """
    if refresh <= 0:
        return 1
    if step * MOST * budget <= refresh * (1 - budget):  # of a step that takes no time, too
        return MOST
    return max(1, math.ceil(refresh * (1 - budget) / (budget * step)))


def interval_at(config: KFACConfig, pace: Step) -> Step | int:
    """The refresh interval in force, in steps. Of a traced pace it is traced, too."""
    configured = config.refresh_interval
    return configured if config.refresh_budget is None else stretch(config, pace) * configured


def in_turns(costs: Sequence[float], turns: int, workers: int) -> float:
    """How much longer refreshes take in turns than all at once: a turn may leave some of the workers without work.

    Args:
        costs: of the layers, in their order, in any unit.
        turns: how many there are; layer number i has turn i modulo them.
        workers: that share a refresh.
    """
    together = largest_load(costs, workers)
    return sum(largest_load(costs[i::turns], workers) for i in range(turns)) / together if together else 1.0


def now() -> float:
    """Seconds, from some moment on."""
    return time.perf_counter()


class Pacer:
    """Reads the clock when it is time, and says what the pace is to be.

    Args:
        config: the configuration; without a `refresh_budget` nothing is ever read.
    """

    def __init__(self, config: KFACConfig) -> None:
        self._config = config
        self._rounds = rounds(config)
        self._marks = frozenset[int]().union(*(each.marks for each in self._rounds))
        self._read: dict[int, float] = {}

    def after(self, update: int, wait: Callable[[], object]) -> bool:
        """To be called after each update.

        Args:
            update: its number.
            wait: returns when the device is done with it; called where the clock is read.

        Returns:
            Whether `pace` is to be asked now.
        """
        if update not in self._marks:
            return False
        wait()
        self._read[update] = now()
        return any(update == each.timed[-1] for each in self._rounds)

    def pace(self, costs: Sequence[float], workers: int) -> int | None:
        """What the readings come to.

        Args:
            costs: see `in_turns`.
            workers: see `in_turns`.

        Returns:
            None if too much of the round was missed, for the run was resumed in it.
        """
        last = max(self._read)
        budget, (measured,) = self._config.refresh_budget, (r for r in self._rounds if r.timed[-1] == last)
        assert budget is not None
        steps, full = (
            [self._read[i] - self._read[i - 1] for i in updates if {i, i - 1} <= self._read.keys()]
            for updates in (measured.timed, measured.full)
        )
        self._read.clear()
        if not full or len(steps) < len(measured.timed):
            return None
        step = statistics.median(steps)
        return pace_of((min(full) - step) * in_turns(costs, cycle(self._config), workers), step, budget)

    def forget(self) -> None:
        """Nothing that was read counts any more: the run goes on from another state."""
        self._read.clear()
