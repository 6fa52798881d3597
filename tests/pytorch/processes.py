"""Several processes that train together."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.multiprocessing

Ranks = Callable[[int], list[dict[str, Any]]]

# Imported once, by the process the others are forked from: in each of them it would take longer than most tests.
IMPORTED = ["torch._dynamo", "torch.distributed.nn", "algoperf_kfac.pytorch"]


def run(worker: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Calls `worker(rank, *arguments)` in `count` processes.

    Raises:
      torch.multiprocessing.ProcessRaisedException: with the traceback of the first that failed.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(worker, arguments, nprocs=count, start_method="forkserver")


def ranks_of(worker: Callable[..., None], folders: pytest.TempPathFactory) -> Ranks:
    """From a number of processes to the results of all of them, trained once.

    Args:
        worker: `worker(rank, world, folder)` saves its results as `<folder>/<rank>.pt`.
        folders: makes the folders.
    """

    @functools.cache
    def results(world: int) -> list[dict[str, Any]]:
        folder = folders.mktemp("processes")
        run(worker, (world, str(folder)), world)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return results


def alone_of(train: Callable[[str, int, int], dict[str, Any]], cases: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What `train(case, world, rank)` comes to in this process alone, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {case: train(case, 1, 0) for case in cases}
    torch.set_num_threads(threads)
    return results
