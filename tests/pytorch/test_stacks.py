"""Layers of equal shape in one product: the same steps as layer by layer, nothing kept twice."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.scalings import inverse, polar, power

POINTS: dict[str, tuple[type, dict[str, Any]]] = {
    "power": (power.Scaling, {}),
    "inverse": (inverse.Scaling, {"preconditioner": "inverse"}),
    "polar": (polar.Scaling, {"scaling": "polar", "length": "rms"}),
    "none": (power.Scaling, {"length": "none", "learning_rate": 1e-4}),
}
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "factor_interval": 1,
    "refresh_interval": 3,
    "initial_statistics": 2,
}


class Net(nn.Module):
    """Convolutions in groups, transposed ones and linear layers, with and without bias, several of each shape."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1, groups=2) for _ in range(3))
        self.back = nn.ModuleList(nn.ConvTranspose1d(4, 4, 3, padding=1) for _ in range(2))
        self.plain = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.linear = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        for layer in (*self.convs, *self.back, *self.plain):
            x = x + layer(x).tanh()
        for layer in list(self.linear)[int(skip) :]:
            x = x + layer(x).tanh()
        return x


def alone(base: type) -> Any:
    """The scaling with an override of a user's, which gets its layers one by one."""

    class Alone(base):
        calls: ClassVar[list[int]] = []

        def precondition(self, state: Any, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
            self.calls.append(len(momentum))
            direction: Tensor = super().precondition(state, momentum, grad, beta2)
            return direction

    return Alone


def train(model: Net, optimizer: KFAC, steps: range) -> None:
    for number in steps:
        x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        with optimizer.capture():
            model(x, skip=number % 4 == 3).square().mean((1, 2)).mean().backward()
        optimizer.step()


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", POINTS)
def test_the_same_steps_as_layer_by_layer(name: str) -> None:
    """Through refreshes in turns, and steps at which a layer has no gradient."""
    base, options = POINTS[name]
    torch.manual_seed(0)
    model = Net()
    other = copy.deepcopy(model)
    scaling = alone(base)
    train(model, KFAC(model, **OPTIONS | options), range(9))
    of_class = {key: value for key, value in options.items() if key != "preconditioner"} | {"scaling": scaling}
    train(other, KFAC(other, **OPTIONS | of_class), range(9))
    assert set(scaling.calls) == {1, 2}  # of one layer, which may have two groups
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8 if name == "polar" else 1e-11, atol=1e-10)


def test_nothing_is_kept_twice_and_copies_go_on_alike() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = KFAC(model, **OPTIONS)
    train(model, optimizer, range(3))
    operators = [t for s in optimizer._layers.states.values() for t in (*s.a_operator, *s.b_operator)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in operators}
    assert sum(storages.values()) == sum(t.numel() * t.element_size() for t in operators)
    assert len(storages) < len(operators)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 9))
    train(twin, twin_optimizer, range(3, 9))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
