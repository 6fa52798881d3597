"""CPU time of operations, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

# Rounds go on until all took so many seconds together, but not past so many; three there are in any case.
ENOUGH, MOST, LEAST = 0.4, 25, 3

Timed = Callable[[], Mapping[str, float]]
"""Runs an operation once and says the CPU seconds of its parts."""


def medians(operations: Mapping[str, Timed]) -> dict[str, dict[str, float]]:
    """Median CPU seconds of each operation's parts; they take turns, so that what disturbs one disturbs all.

    Args:
        operations: by name; each has run before, and so has no work left that only its first run has.
    """
    rounds: dict[str, list[Mapping[str, float]]] = {name: [] for name in operations}
    start, number = time.process_time(), 0
    while number < LEAST or (number < MOST and time.process_time() - start < ENOUGH):
        for name, operation in operations.items():
            rounds[name].append(operation())
        number += 1
    return {
        name: {part: statistics.median(one[part] for one in found) for part in found[0]}
        for name, found in rounds.items()
    }


def whole(operation: Callable[[], object], part: str = "seconds") -> Timed:
    """An operation of one part, which returns when it is done."""

    def run() -> Mapping[str, float]:
        start = time.process_time()
        operation()
        return {part: time.process_time() - start}

    return run
