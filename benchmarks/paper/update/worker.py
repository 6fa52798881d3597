"""Updates of one case, in a process of its own, whose memory can be limited and whose peak is its own.

    python -m benchmarks.paper.update.worker '{"optimizer": "expand", "batch": 128, "memory_gb": 2}'

Prints a line of JSON. Every update takes statistics and refreshes all inverses: the paper's own form, whose
inverses are damped. The limit is on the address space (RLIMIT_AS), counted from what the process has once model,
batch and optimizer are there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import algoperf_kfac
from algoperf_kfac.pytorch import KFAC
from benchmarks.paper.complexity.worker import ROWS, device
from benchmarks.paper.update.cases import Case
from benchmarks.paper.update.network import CLASSES, SIDE, wide_resnet

UPDATES, SETTLING = 3, 1  # timed ones, after so many
PAPER: dict[str, Any] = {
    "preconditioner": "inverse",
    "grafting": False,
    "damping_mode": "absolute",
    "factor_interval": 1,
    "refresh_interval": 1,
    "learning_rate": 1e-3,
}
FIELDS: dict[str, dict[str, Any]] = {
    "expand": {"approximation": "expand"},
    "part": {"approximation": "expand", "statistics_rows": ROWS},
    "reduce": {"approximation": "reduce"},
}


def run(case: Case) -> dict[str, Any]:
    """What is kept of a case."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    update = _update(case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case.memory_gb is not None:
        limit = _address_space() + int(1e9 * case.memory_gb)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # With a limit the question is whether an update fits.
    settling, timed = (SETTLING, UPDATES) if case.memory_gb is None else (1, 1)
    try:
        parts = [update() for _ in range(settling + timed)][settling:]
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error, limited=case.memory_gb is not None):
            raise
        return {**dataclasses.asdict(case), "outcome": "out"}
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    seconds = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    return {
        **dataclasses.asdict(case),
        "outcome": "fits",
        "seconds": {name: float(f"{value:.4g}") for name, value in seconds.items()},
        "peak_bytes": peak,
        "took": float(f"{time.process_time():.4g}"),
        "version": algoperf_kfac.__version__,
        "device": device("pytorch"),
    }


def ran_out(error: Exception, *, limited: bool) -> bool:
    """Whether an error says that there is no more memory.

    Args:
        error: what an update raised.
        limited: whether the process has a limit on its memory. oneDNN does not say why it has no primitive; that
            the same update runs without a limit is what the other cases show.
    """
    words = ["can't allocate memory", "not enough memory", "bad_alloc", "out of memory"]
    if limited:
        words.append("could not create a primitive")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _update(case: Case) -> Callable[[], dict[str, float]]:
    """A function that makes one update and says the CPU seconds of its parts."""
    model = wide_resnet()
    x = torch.randn(case.batch, 3, SIDE, SIDE)
    y = torch.randint(CLASSES, (case.batch,))
    loss = nn.CrossEntropyLoss()
    if case.optimizer == "nadamw":
        first_order = torch.optim.NAdam(model.parameters(), lr=1e-3, decoupled_weight_decay=True)

        def plain() -> None:
            first_order.zero_grad()
            loss(model(x), y).backward()

        return lambda: {"pass": _seconds(plain), "update": _seconds(first_order.step)}
    kfac = KFAC(model, **PAPER, **FIELDS[case.optimizer])

    def captured() -> None:
        kfac.zero_grad()
        with kfac.capture():
            loss(model(x), y).backward()

    return lambda: {"pass": _seconds(captured), "update": _seconds(kfac.step)}


def _seconds(operation: Callable[[], object]) -> float:
    start = time.process_time()
    operation()
    return time.process_time() - start


def _address_space() -> int:
    """Bytes that the process has mapped."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
