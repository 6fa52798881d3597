"""A layer written in some form beside the same layer as `nn.Linear`: factors, steps and G^T A have to agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors

Read = Callable[[Tensor, Tensor], Tensor]
NARROW, WIDE = 5, 6


@dataclasses.dataclass(frozen=True)
class Form:
    """How a weight is stored and read.

    Attributes:
        read: (input, stored weight) -> output.
        store: (P_out, P_in) -> the stored weight.
        restore: the inverse.
    """

    read: Read
    store: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


def plain(read: Read) -> Form:
    """The weight stored as nn.Linear does it."""
    return Form(read, lambda w: w, lambda w: w)


def transposed(read: Read) -> Form:
    """The weight stored as (P_in, P_out)."""
    return Form(read, lambda w: w.T, lambda w: w.T)


def shaped(read: Read, *shape: int, turned: bool = False) -> Form:
    """The weight stored in another shape, of its transpose if `turned`."""
    return Form(
        read,
        lambda w: (w.T if turned else w).reshape(shape),
        lambda w: w.reshape(NARROW, WIDE).T if turned else w.reshape(WIDE, NARROW),
    )


class Raw(nn.Module):
    """A raw weight between two linear layers."""

    def __init__(self, form: Form, like: Modular, *, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(4, NARROW), nn.Linear(WIDE, 3)
        self.load_state_dict(like.state_dict(), strict=False)
        self.matrix = nn.Parameter(form.store(like.layer.weight.detach()).contiguous().clone())
        self.form, self.checkpointed = form, checkpointed

    def middle(self, x: Tensor) -> Tensor:
        return self.form.read(x, self.matrix).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x).tanh()
        if self.checkpointed is None:
            return self.above(self.middle(x))
        return self.above(checkpoint(self.middle, x, use_reentrant=self.checkpointed))


class Modular(nn.Module):
    """The same as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.layer, self.above = (
            nn.Linear(4, NARROW),
            nn.Linear(NARROW, WIDE, bias=False),
            nn.Linear(WIDE, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.layer(self.below(x).tanh()).tanh())


def train(model: nn.Module, optimizer: KFAC, batch: tuple[Tensor, Tensor], steps: int, **capture: Any) -> None:
    x, y = batch
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.capture(**capture):
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()


def assert_like_modules(
    form: Form,
    *,
    steps: int = 3,
    checkpointed: bool | None = None,
    capture: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Train both, and compare."""
    twin = Modular()
    model = Raw(form, twin, checkpointed=checkpointed)
    batch = torch.randn(8, 4, 4), torch.randint(3, (8, 4))
    optimizers = []
    for net in (model, twin):
        optimizer = KFAC(net, learning_rate=1e-2, **options)
        train(net, optimizer, batch, steps, **(capture or {}))
        optimizers.append(optimizer)
    mine, theirs = optimizers
    assert mine.coverage().fraction == 1, str(mine.coverage())
    names = {"below": "below", "above": "above", "matrix": "layer"}
    assert_same_factors(mine.factors(), theirs.factors(), names, rtol=1e-6, atol=1e-9)
    assert mine.metrics()["matrix/gradient_error"] < 1e-8
    torch.testing.assert_close(form.restore(model.matrix), twin.layer.weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.below.weight, twin.below.weight, rtol=1e-6, atol=1e-8)
