"""The framework-specific half of the runner, as the rest of it sees one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from submissions.common.api import Rng, Tree
from workloads.workload import Workload


class Backend(Protocol):
    """What a framework does its own way: processes, random numbers, the clock, and the content of checkpoints."""

    def start(self) -> None:
        """Before the first trial."""

    def stop(self) -> None:
        """After the last one."""

    def device_count(self) -> int:
        """The devices that share a batch."""

    def is_one_process_on_cpu(self) -> bool:
        """Whether this process's CPU seconds are all the work there is."""

    def is_main(self) -> bool:
        """Whether this process writes the files."""

    def versions(self) -> dict[str, str]:
        """Of the framework and the device, for the logs."""

    def seed_step(self, rng: np.ndarray, /) -> None:
        """Seeds the framework's generator, if it has one."""

    def rng(self, rng: np.ndarray, /) -> Rng:
        """The rng as submissions get it: as in the official harness."""

    def now(self, *results: Tree) -> float:
        """Seconds on a steady clock, once the device has made these results."""

    def compiled(self, model: Tree, /) -> Tree:
        """The model under --torch_compile."""

    def same_on_all(self, value: float, /) -> float:
        """The main process's value, on every process."""

    def watch_loss(self, workload: Workload, /) -> Callable[[], float]:
        """A function that reads the last training loss; NaN before the first."""

    def unwatch_loss(self, workload: Workload, /) -> None:
        """Removes what `watch_loss` added."""

    def check_optimizer_state(self, optimizer_state: Tree, /) -> None:
        """Raises UserError unless the state can be saved the way the official harness saves it."""

    def pack(self, params: Tree, optimizer_state: Tree, rest: dict[str, object], /) -> bytes:
        """The content of a checkpoint file."""

    def peek(self, content: bytes, /) -> dict[str, Tree]:
        """The rest that `pack` was given, without loading anything."""

    def unpack(self, content: bytes, params: Tree, optimizer_state: Tree, /) -> dict[str, Tree]:
        """What `pack` was given, with "model_params" and "optimizer_state"."""
