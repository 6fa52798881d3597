"""Several processes that train together."""

from __future__ import annotations

import copy
import datetime
import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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


@contextmanager
def joined(rank: int, world: int, folder: str) -> Iterator[None]:
    """This process, on one thread, as one of the default group; they meet in a file in the folder."""
    torch.set_num_threads(1)
    # A process that waits for one that does not come fails soon, instead of hanging.
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    yield
    dist.destroy_process_group()


def save(results: Mapping[str, Any], rank: int, folder: str) -> None:
    """Writes what `ranks_of` reads."""
    torch.save(copy.deepcopy(dict(results)), Path(folder) / f"{rank}.pt")


def run_cases(cases: Mapping[str, Callable[[int], Any]], rank: int, world: int, folder: str) -> None:
    """Saves what `cases[name](rank)` come to, each from the same random state, one after the other."""
    results = {}
    with joined(rank, world, folder):
        for case, function in cases.items():
            torch.manual_seed(0)
            results[case] = copy.deepcopy(function(rank))
            dist.barrier()  # processes that were apart go on together
        save(results, rank, folder)


def ranks_of(worker: Callable[..., None], folders: pytest.TempPathFactory) -> Ranks:
    """From a number of processes to the results of all of them, trained once.

    Args:
        worker: `worker(rank, world, folder)` saves its results (see `save`).
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
