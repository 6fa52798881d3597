"""Hooks on a layer's output that change its gradient: what reaches the layer is what its weight gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, factors_of, vectors

Change = Callable[[Tensor], Tensor]


class Changed(torch.autograd.Function):
    """The identity, with another gradient: what a hook comes to, as an operation of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Change) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def by_hook(h: Tensor, change: Change) -> Tensor:
    if h.requires_grad:  # the first run of a reentrant checkpoint is without
        h.register_hook(change)
    return h


def by_hook_and_kept(h: Tensor, change: Change) -> Tensor:
    h.retain_grad()
    return by_hook(h, change)


def by_two_hooks(h: Tensor, change: Change) -> Tensor:
    h.register_hook(lambda grad: 3 * grad)
    h.register_hook(lambda grad: change(grad / 3))
    return h


def by_node(h: Tensor, change: Change) -> Tensor:
    node = h.grad_fn
    assert node is not None
    node.register_prehook(lambda grads: (change(grads[0]),))
    return h


def by_operation(h: Tensor, change: Change) -> Tensor:
    return Changed.apply(h, change)


class Net(nn.Module):
    """Two layers; between them a change of the gradient, and perhaps an in-place operation."""

    def __init__(self, first: nn.Module | None = None, act: Change = torch.tanh) -> None:
        super().__init__()
        self.first, self.act = first or nn.Linear(5, 8), act
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor, how: Callable[[Tensor, Change], Tensor], change: Change) -> Tensor:
        return self.second(self.act(how(self.first(x), change)))


class Images(nn.Module):
    """A convolution, its channels put last, a view in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Checkpointed(Net):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor, how: Callable[[Tensor, Change], Tensor], change: Change) -> Tensor:
        x = x.clone().requires_grad_()
        forward = super().forward
        return checkpoint(lambda h: forward(h, how, change), x, use_reentrant=self.reentrant)


CHANGES = {"clip": lambda grad: grad.clamp(-1e-3, 1e-3), "scale": lambda grad: 0.1 * grad}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": Net,
    "positions": Net,
    "convolution": lambda: Net(Images()),
    "not reentrant": lambda: Checkpointed(reentrant=False),
    "reentrant": lambda: Checkpointed(reentrant=True),
}


def loss(x: Tensor, y: Tensor, how: Callable[[Tensor, Change], Tensor], change: Change, model: nn.Module) -> Tensor:
    outputs = model(x, how, change)
    return F.cross_entropy(outputs.mean(1) if outputs.dim() == 3 else outputs, y)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", MODELS)
def test_a_hook_is_what_an_operation_with_that_gradient_is(model: str, change: str, approximation: str) -> None:
    net, (x, y) = MODELS[model](), vectors()
    if model in ("positions", "convolution"):
        x = x.unsqueeze(1) * torch.tensor([[1.0], [-0.5]])
    want = factors_of(net, partial(loss, x, y, by_operation, CHANGES[change]), approximation=approximation)
    for how in (by_hook,) if model == "reentrant" else (by_hook, by_hook_and_kept, by_two_hooks, by_node):
        got = factors_of(net, partial(loss, x, y, how, CHANGES[change]), approximation=approximation)
        assert_same_factors(got, want)


@pytest.mark.parametrize("act", [torch.relu_, lambda h: h.mul_(2).tanh_()], ids=["relu_", "arithmetic"])
def test_an_in_place_operation_after_the_hook(act: Change) -> None:
    net, (x, y) = Net(act=act), vectors()
    clip = CHANGES["clip"]
    got = factors_of(net, partial(loss, x, y, by_hook, clip))
    want = factors_of(net, partial(loss, x, y, by_operation, clip))
    assert_same_factors(got, want)


def test_a_hook_that_begins_later_is_not_silently_wrong() -> None:
    """No step but the first looks at the weight's gradient."""
    net, (x, y) = Net(), vectors()
    optimizer = KFAC(net, lr=0.0, factor_interval=1, factor_decay=0.0)
    for change in (lambda grad: grad, CHANGES["clip"]):
        optimizer.zero_grad()
        with optimizer.capture():
            loss(x, y, by_hook, change, net).backward()
        optimizer.step()
    want = factors_of(net, partial(loss, x, y, by_operation, CHANGES["clip"]))
    assert_same_factors(optimizer.factors(reduction="mean"), want)


def test_a_hook_on_the_loss_scales_it() -> None:
    """Of micro-batches in one capture each is scaled by what its own loss got."""
    net, (x, y) = Net(), vectors()

    def twice(scaled: Callable[[Tensor], Tensor]) -> KFAC:
        model = copy.deepcopy(net)
        optimizer = KFAC(model)
        with optimizer.capture():
            for part in (slice(0, 4), slice(4, None)):
                scaled(loss(x[part], y[part], lambda h, _: h, torch.tanh, model)).backward()
        optimizer.step()
        return optimizer

    def hooked(value: Tensor) -> Tensor:
        value.register_hook(lambda grad: grad / 2)
        return value

    got, want = (twice(scaled).factors() for scaled in (hooked, lambda value: value / 2))
    assert_same_factors(got, want)


def test_a_gradient_with_respect_to_the_output_itself_is_none_of_the_layer() -> None:
    """It ends at the output: the layer gets none of it, and its statistics are those of the loss alone."""
    net, (x, y) = Net(), vectors()

    def at_the_output(model: Net) -> Tensor:
        h = model.first(x)
        value = F.cross_entropy(model.second(torch.tanh(h)), y)
        torch.autograd.grad(value, h, retain_graph=True)
        return value

    want = factors_of(net, partial(loss, x, y, lambda h, _: h, torch.tanh))
    assert_same_factors(factors_of(net, at_the_output), want)
