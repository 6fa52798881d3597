"""Modules whose weights are read in parts: projections cut from one matrix, taps of a kernel, slimmable widths."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, capture_once, covered, factors_of, reasons

D = 6


class Fused(nn.Module):
    """Queries, keys and values from parts of one layer's weight, which is never called itself."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, 3)

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        weights = self.qkv.weight.chunk(3)
        return list(zip(weights, [None] * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (F.linear(x, w, b) for w, b in self.parts())
        return self.head((torch.tanh(query @ key.transpose(1, 2)) @ value).mean(1))


class Apart(Fused):
    """The same with three modules."""

    def __init__(self, fused: Fused) -> None:
        super().__init__(bias=False)
        self.layers = nn.ModuleList(nn.Linear(D, D, bias=b is not None) for _, b in fused.parts())
        for layer, (w, b) in zip(self.layers, fused.parts(), strict=True):
            layer.weight.data = w.detach().clone()
            if b is not None:
                layer.bias.data = b.detach().clone()
        self.head.load_state_dict(fused.head.state_dict())
        del self.qkv

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(layer.weight, layer.bias) for layer in self.layers]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_weight_in_disjoint_parts_is_as_many_layers(approximation: str, bias: bool) -> None:
    model, x = Fused(bias=bias), torch.randn(8, 5, D)
    squares: Callable[[nn.Module], Tensor] = lambda m: m(x).square().sum(-1).mean()  # noqa: E731
    optimizer = capture_once(copy.deepcopy(model), squares, approximation=approximation)
    assert optimizer.coverage().fraction == 1
    names = {"qkv.weight.0": "layers.0", "qkv.weight.1": "layers.1", "qkv.weight.2": "layers.2", "head": "head"}
    want = factors_of(Apart(model), squares, approximation=approximation)
    assert_same_factors(optimizer.factors(reduction="mean"), want, names)


def test_it_resumes() -> None:
    model, batches = Fused(bias=True), torch.randn(6, 8, 5, D)
    twin = copy.deepcopy(model)

    def run(model: nn.Module, optimizer: KFAC, data: Tensor) -> None:
        for x in data:
            optimizer.zero_grad()
            with optimizer.capture():
                model(x).square().mean().backward()
            optimizer.step()

    optimizer = KFAC(model, factor_interval=1, refresh_interval=2)
    run(model, optimizer, batches[:3])
    twin.load_state_dict(model.state_dict())
    resumed = KFAC(twin, factor_interval=1, refresh_interval=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, batches[3:])
    run(twin, resumed, batches[3:])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.equal(q)


class Slimmable(nn.Module):
    """Widths that share the first rows of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for width in (2, D):
            h = F.linear(x, self.hidden.weight[:width], self.hidden.bias[:width])
            outputs.append(self.head(F.pad(torch.tanh(h), (0, D - width))))
        return torch.stack(outputs).sum(0)


def test_parts_that_overlap_take_the_fallback() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = capture_once(Slimmable(), lambda m: m(torch.randn(8, D)).square().mean())
    assert covered(optimizer) == {"head"}
    assert all("linear" in reason for reason in reasons(optimizer).values())


def test_a_layer_that_is_called_keeps_its_weight_whole() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x))) + F.linear(x, self.up.weight[:3]).sum(1, keepdim=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = capture_once(Both(), lambda m: m(torch.randn(8, D)).square().mean())
    assert covered(optimizer) == {"down"}
    assert "also read by" in reasons(optimizer)["up.weight"]


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Parameter(0.3 * torch.randn(4, D))
        self.head = nn.Linear(D, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(h @ self.table)).mean(1)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_exported_modules_are_covered_as_what_they_were_made_of(approximation: str) -> None:
    model, x, y = Convolutional(), torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    exported = torch.export.export(model, (x,)).module()
    got, want = (
        factors_of(m, lambda m: F.cross_entropy(m(x), y), approximation=approximation) for m in (exported, model)
    )
    assert set(want) == {"conv", "table", "head"}
    assert_same_factors(got, want, rtol=1e-5, atol=1e-7)
