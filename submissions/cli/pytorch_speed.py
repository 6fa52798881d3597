"""The operations of a refresh and a direction in PyTorch, to be timed; see `calibration`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping

import torch

from submissions.cli.calibration import Operation, rows_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name() -> str:
    """See `calibration.Device`."""
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def operations(size: int) -> Mapping[str, Operation]:
    """See `calibration.Device`."""
    generator = torch.Generator(device=DEVICE).manual_seed(size)
    x = torch.randn(size, size, generator=generator, device=DEVICE)
    definite = x @ x.T / size + torch.eye(size, device=DEVICE)
    orthogonal = torch.linalg.qr(x)[0]

    def iteration() -> object:
        basis = torch.linalg.qr(definite @ orthogonal)[0]
        return basis * (definite @ basis)

    def inverse() -> object:
        root, _ = torch.linalg.cholesky_ex(definite)
        return torch.cholesky_inverse(root)

    return {
        "products": _finished(lambda: x @ definite),
        "decompositions": _finished(lambda: torch.linalg.eigh(definite)),
        "iterations": _finished(iteration),
        "inverses": _finished(inverse),
    }


def sum_of(entries: int) -> Operation:
    """See `calibration.Device`."""
    x = torch.ones(entries, device=DEVICE).reshape(rows_of(entries))
    return _finished(lambda: x.sum(1))


def _finished(operation: Callable[[], object]) -> Operation:
    def run() -> None:
        operation()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run
