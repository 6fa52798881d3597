"""Weights that a model holds as raw parameters and hands to an operation itself."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import (
    Functional,
    assert_same_factors,
    assert_same_parameters,
    capture_once,
    covered,
    factors_of,
    images,
    reasons,
    train,
)


class Modular(nn.Module):
    """The same with modules."""

    def __init__(self, like: Functional) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.linear = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            self.conv.weight.copy_(like.kernel)
            self.conv.bias.copy_(like.kernel_bias)
            self.linear.weight.copy_(like.matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3))) * self.scale


SETTINGS = [("expand", "eigen"), ("reduce", "eigen"), ("expand", "inverse"), ("reduce", "inverse")]


@pytest.mark.parametrize(("approximation", "preconditioner"), SETTINGS)
def test_raw_parameters_are_covered_from_the_first_statistics_step(approximation: str, preconditioner: str) -> None:
    functional = Functional()
    modular = Modular(functional)
    options = {
        "approximation": approximation,
        "preconditioner": preconditioner,
        "factor_interval": 2,
        "refresh_interval": 4,
        "initial_statistics": 1,
    }
    mine, theirs = KFAC(functional, **options), KFAC(modular, **options)
    assert not covered(mine)
    assert "first statistics step" in reasons(mine)["kernel"]
    batches = [images() for _ in range(5)]
    losses = train(functional, mine, batches)
    assert losses == train(modular, theirs, batches)
    assert reasons(mine).keys() == {"scale"}
    assert mine.coverage().fraction == theirs.coverage().fraction
    names = {"kernel": "conv", "matrix": "linear"}
    assert_same_factors(mine.factors(), theirs.factors(), names)
    for raw, module in ((functional.kernel, modular.conv.weight), (functional.matrix, modular.linear.weight)):
        assert torch.equal(raw, module)


def test_promotion_survives_a_checkpoint_into_a_fresh_optimizer() -> None:
    batches = [images() for _ in range(7)]
    model = Functional()
    optimizer = KFAC(model, factor_interval=2, refresh_interval=4, initial_statistics=1)
    train(model, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = Functional()
    resumed.load_state_dict(saved["model"])
    fresh = KFAC(resumed, factor_interval=2, refresh_interval=4, initial_statistics=1)
    fresh.load_state_dict(saved["optimizer"])
    assert str(fresh.coverage()) == str(optimizer.coverage())
    train(model, optimizer, batches[3:])
    train(resumed, fresh, batches[3:])
    assert_same_parameters(resumed, model, rtol=0, atol=0)
    assert_same_factors(fresh.factors(), optimizer.factors(), rtol=0, atol=0)


def test_a_weight_converted_before_use_stays_on_the_fallback() -> None:
    """F.linear sees a tensor that is no parameter: nothing to cover, nothing missing."""

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.matrix / self.matrix.norm())

    optimizer = capture_once(Standardised(), lambda m: m(torch.randn(6, 4)).square().mean())
    assert reasons(optimizer).keys() == {"matrix"}


class Twice(nn.Module):
    """A weight read by F.linear, and again in some other way."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.linear(x, self.matrix).tanh(), self.matrix)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: x * w[0],
        lambda x, w: torch.baddbmm(torch.zeros(1, 6, 4), x.unsqueeze(0), w.unsqueeze(0)),
        lambda x, w: torch.einsum("ni,oi->n", x, w),
        lambda x, w: torch.cdist(x, w),
        lambda x, w: torch.mm(x, w.mT.relu()),
        lambda x, w: torch.addmm(torch.zeros(4), x, torch.cat([w, w]).T[:, :4]),
    ],
    ids=["row", "baddbmm", "einsum", "distance", "mT", "cat"],
)
def test_a_raw_parameter_also_read_otherwise_is_not_covered(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Its statistics would miss that other use."""
    with pytest.warns(UserWarning, match="layer matrix takes the fallback.*: also read by"):
        optimizer = capture_once(Twice(read), lambda m: m(torch.randn(6, 4)).square().mean())
    assert "also read by" in reasons(optimizer)["matrix"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: torch.matmul(x, other=w.t()),
        lambda x, w: torch.linalg.matmul(x, w.t()),
        lambda x, w: torch.einsum("ni,oi->no", x, w),
        lambda x, w: torch.einsum("ni,oi->no", [x, w]),
        lambda x, w: torch.mm(x, mat2=w.mT),
    ],
    ids=["t", "keyword", "linalg", "einsum", "einsum list", "mT"],
)
def test_a_raw_parameter_also_read_by_another_product_is_one_layer(
    read: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """As if both were F.linear."""
    x, model = torch.randn(6, 4), Twice(read)
    twin = Twice(F.linear)
    twin.load_state_dict(model.state_dict())
    mine, theirs = (capture_once(net, lambda m: m(x).square().mean()) for net in (model, twin))
    assert mine.coverage().fraction == 1
    assert_same_factors(mine.factors(), theirs.factors())


def test_reading_a_weight_for_a_penalty_keeps_it_covered() -> None:
    model = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = capture_once(
            model, lambda m: m(torch.randn(6, 4)).mean() + 1e-3 * m.weight.square().sum() + m.weight.norm() * 0.1
        )
    assert covered(optimizer) == {""}


def test_a_frozen_forward_pass_promotes_nothing() -> None:
    """A raw parameter read only without gradients was never a layer: it must not be missed either."""

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(4, 4)
            self.raw = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = F.linear(x, self.raw)
            return self.student(x) - target

    optimizer = capture_once(Teacher(), lambda m: m(torch.randn(6, 4)).square().mean())
    assert covered(optimizer) == {"student"}
    assert reasons(optimizer).keys() == {"raw"}


def test_two_raw_weights_in_one_module_get_names_of_their_own() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 4))
            self.second = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.first).tanh(), self.second)

    model = nn.Sequential(Pair())
    optimizer = capture_once(model, lambda m: m(torch.randn(6, 4)).square().mean())
    assert len(covered(optimizer)) == 2
    assert optimizer.coverage().fraction == 1


class Joined(nn.Module):
    """Parameters that are put together, and taken apart again before their use."""

    def __init__(self, how: Callable[[list[Tensor]], list[Tensor]]) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), how

    def forward(self, x: Tensor) -> Tensor:
        weights = self.how([layer.weight for layer in self.layers])
        biases = self.how([layer.bias for layer in self.layers])
        for weight, bias in zip(weights, biases, strict=True):
            x = torch.tanh(F.linear(x, weight, bias))
        return x


JOINED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "cat": lambda parts: list(torch.cat(parts).chunk(3)),
    "split": lambda parts: list(torch.concat(parts, dim=0).split(4)),
    "slices": lambda parts: [torch.cat(parts)[i : i + 4] for i in (0, 4, 8)],
    "stack": lambda parts: list(torch.stack(parts).unbind()),
}


@pytest.mark.parametrize("how", JOINED)
def test_parameters_put_together_and_taken_apart_are_themselves(how: str) -> None:
    model, x = Joined(JOINED[how]), torch.randn(8, 4)
    got = factors_of(model, lambda m: m(x).square().mean())
    model.how = lambda parts: parts
    assert_same_factors(got, factors_of(model, lambda m: m(x).square().mean()))
    assert set(got) == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize(
    "how",
    [
        lambda parts: [torch.cat(parts)[i : i + 4] for i in (0, 2, 8)],
        lambda parts: list(torch.cat(parts).mul_(0.5).chunk(3)),
        lambda parts: list(torch.cat([parts[0], 2 * parts[1], parts[2]]).chunk(3)),
    ],
    ids=["across", "in place", "scaled"],
)
def test_parameters_that_are_more_than_put_together_are_not(how: Callable[[list[Tensor]], list[Tensor]]) -> None:
    with pytest.warns(UserWarning, match="layers.0, .* take the fallback from now on"):
        optimizer = capture_once(Joined(how), lambda m: m(torch.randn(8, 4)).square().mean())
    assert not covered(optimizer)
