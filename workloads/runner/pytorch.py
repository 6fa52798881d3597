"""What the runner does differently for PyTorch: seeds, clock, compilation, and the content of checkpoints."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import nn

from commands.errors import UserError
from submissions.common.api import Tree
from workloads.pytorch import devices
from workloads.workload import Workload


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Tree]: ...

    def load_state_dict(self, state_dict: dict[str, Tree], /) -> object: ...


class PyTorchBackend:
    """The `Backend` for PyTorch; under torchrun a process for each device."""

    def start(self) -> None:
        """Makes results repeatable and joins the other processes, if any."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS's deterministic mode
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        # The mode would also fill every torch.empty, a cost for nothing: no code here reads it unwritten.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        devices.start_processes()

    def stop(self) -> None:
        devices.stop_processes()

    def device_count(self) -> int:
        return devices.world_size()

    def is_one_process_on_cpu(self) -> bool:
        """Whether the device is the CPU, and this process alone."""
        return devices.device().type == "cpu" and devices.world_size() == 1

    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return devices.rank() == 0

    def versions(self) -> dict[str, str]:
        return {"torch_version": torch.__version__, "device": _device_name()}

    def seed_step(self, rng: np.ndarray) -> None:
        """Seeds PyTorch's generator: what a step draws depends on (seed, step), so a resumed run draws the same."""
        torch.manual_seed(int(rng[0]))

    def rng(self, rng: np.ndarray) -> np.ndarray:
        """The rng as submissions get it: as in the official harness, of dtype int32 and shape (2,)."""
        return rng

    def now(self, *results: Tree) -> float:
        """Seconds on a steady clock, once the device has done its work, whether or not `results` come of it."""
        del results
        devices.synchronize()
        return time.perf_counter()

    def compiled(self, model: nn.Module) -> Tree:
        return torch.compile(model)

    def same_on_all(self, value: float) -> float:
        """The main process's value, for decisions that all processes must take alike."""
        if self.device_count() == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=devices.device())
        torch.distributed.broadcast(tensor, src=0)
        return tensor.item()

    def watch_loss(self, workload: Workload) -> Callable[[], float]:
        """Returns a function that reads the last training loss; only reading it waits for the device."""
        original = workload.loss_fn
        last: dict[str, torch.Tensor] = {}

        def loss_fn(*args: Tree, **kwargs: Tree) -> dict[str, torch.Tensor]:
            losses = original(*args, **kwargs)
            if losses["summed"].requires_grad:  # not in evaluations
                last.update(summed=losses["summed"].detach(), n=losses["n_valid_examples"])
            return losses

        workload.loss_fn = loss_fn  # type: ignore[method-assign]
        return lambda: float(last["summed"] / last["n"]) if last else float("nan")

    def unwatch_loss(self, workload: Workload) -> None:
        """Removes what `watch_loss` added: the next trial uses the same workload."""
        del workload.loss_fn

    def check_optimizer_state(self, optimizer_state: Tree) -> None:
        """Raises UserError unless the state can be saved the way the official harness saves it."""
        if not isinstance(optimizer_state, dict):
            raise UserError("The submission's init_optimizer_state must return a dict in PyTorch.")
        for key, value in optimizer_state.items():
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise UserError(
                    f"The submission's optimizer state '{key}' has no state_dict and load_state_dict, "
                    "so it cannot be resumed; use --nosave_checkpoints or wrap it."
                )

    def pack(self, model: nn.Module, optimizer_state: Mapping[str, Stateful], rest: dict[str, object]) -> bytes:
        """The content of a checkpoint file."""
        buffer = io.BytesIO()
        content = {
            "model_params": unwrapped(model).state_dict(),
            "optimizer_state": {key: value.state_dict() for key, value in optimizer_state.items()},
            **rest,
        }
        torch.save(content, buffer)
        return buffer.getvalue()

    def peek(self, content: bytes) -> dict[str, Tree]:
        """The rest that `pack` was given, among the entries of the checkpoint."""
        checkpoint: dict[str, Tree] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return checkpoint

    def unpack(self, content: bytes, model: nn.Module, optimizer_state: Mapping[str, Stateful]) -> dict[str, Tree]:
        """Loads a checkpoint into model and optimizer state; returns them and the rest."""
        checkpoint = torch.load(io.BytesIO(content), map_location=devices.device(), weights_only=True)
        unwrapped(model).load_state_dict(checkpoint["model_params"])
        for key, value in optimizer_state.items():
            value.load_state_dict(checkpoint["optimizer_state"][key])
        return {**checkpoint, "model_params": model, "optimizer_state": optimizer_state}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
