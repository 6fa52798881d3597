"""The device of this process and, under torchrun, its place among the others."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0


def world_size() -> int:
    """The number of devices that share a batch: one for each process."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def device() -> torch.device:
    """This process's GPU if there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_processes() -> None:
    """Joins the process group torchrun announces; nothing without torchrun."""
    if world_size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop_processes() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def synchronize() -> None:
    """Waits until the device has done what it was given, so that a clock read afterwards is honest."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
