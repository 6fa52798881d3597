"""Which process or device does which of several jobs of known cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(costs: Sequence[float], workers: int) -> list[int]:
    """Which worker takes each job: the longest first, to the worker with the least work so far.

    The largest load is at most 4/3 - 1/(3 workers) times the least possible (Graham 1969). Ties go to the first
    job and the lowest worker, so that all processes come to the same assignment without asking each other.
    """
    loads = [(0.0, worker) for worker in range(workers)]
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        load, owner = heapq.heappop(loads)
        owners[job] = owner
        heapq.heappush(loads, (load + costs[job], owner))
    return owners


def deal(costs: Sequence[float], workers: int) -> list[int]:
    """`assign`, with each worker's jobs of one cost side by side: equal jobs are then done in one go.

    Who takes which of them makes no difference to anyone's work.
    """
    owners = assign(costs, workers)
    alike: dict[float, list[int]] = {}
    for job, cost in enumerate(costs):
        alike.setdefault(cost, []).append(job)
    for jobs in alike.values():
        for job, owner in zip(jobs, sorted(owners[job] for job in jobs), strict=True):
            owners[job] = owner
    return owners


def runs(count: int, workers: int) -> list[range]:
    """The jobs of each worker where all take equally many that stand side by side; the last ones' may overlap.

    There are at least as many jobs as workers.
    """
    each = -(-count // workers)
    starts = (min(worker * each, count - each) for worker in range(workers))
    return [range(start, start + each) for start in starts]


def largest_load(costs: Sequence[float], workers: int) -> float:
    """The work of the busiest worker under `assign`."""
    sums = [0.0] * workers
    for cost, owner in zip(costs, assign(costs, workers), strict=True):
        sums[owner] += cost
    return max(sums)
