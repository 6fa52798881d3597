"""The training that two processes share in several tests, and how its results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import SCALE_SENSITIVE, Patches, images

WORLD = 2
BATCH = 8
OPTIONS: dict[str, Any] = {
    "approximation": "reduce",
    "factor_interval": 2,
    "refresh_interval": 4,
    "initial_statistics": 3,
    "damping": 0.1,
    "learning_rate": 3e-3,
}
OPTIONS = SCALE_SENSITIVE | OPTIONS


def batches(steps: int = 10) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in [images(BATCH) for _ in range(steps)]]


def share(rank: int) -> slice:
    size = BATCH // WORLD
    return slice(rank * size, (rank + 1) * size)


def result(model: nn.Module, optimizer: KFAC, **more: Any) -> dict[str, Any]:
    factors = {name: tuple(pair) for name, pair in optimizer.factors().items()}
    return {"parameters": model.state_dict(), "factors": factors, **more}


def plain(rank: int | None, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """The loop of the README; with rank None alone, on the whole batch."""
    torch.manual_seed(0)
    model = Patches().double()
    wrapped = wrap(model)
    optimizer = KFAC(wrapped, **OPTIONS)
    for x, y in batches():
        mine = slice(None) if rank is None else share(rank)
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
        optimizer.step()
    return result(model, optimizer)


def assert_like(got: dict[str, Any], want: dict[str, Any], **tolerance: float) -> None:
    """Of two results: the same factors, of which there are some, and the same parameters."""
    assert want["factors"]
    for key in ("parameters", "factors"):
        torch.testing.assert_close(got[key], want[key], **tolerance)
