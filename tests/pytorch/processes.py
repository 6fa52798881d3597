"""Several processes that train together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# Imported once, by the process the others are forked from: in each of them it would take longer than most tests.
IMPORTED = ["torch._dynamo", "torch.distributed.nn", "algoperf_kfac.pytorch"]


def run(worker: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Calls `worker(rank, *arguments)` in `count` processes.

    Raises:
      torch.multiprocessing.ProcessRaisedException: with the traceback of the first that failed.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(worker, arguments, nprocs=count, start_method="forkserver")
