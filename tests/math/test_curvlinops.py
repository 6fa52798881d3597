"""Factors against curvlinops, an independent implementation, where its conventions are the same.

Of a mean loss, curvlinops divides B by the number of loss terms, and of outputs where the criterion averages over
those too; this library divides it by the number of examples. Its names for the factors are private; its version is
pinned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import FactorPair
from tests.math.support import assert_equal, empirical_factors, fisher_factors

curvlinops = pytest.importorskip("curvlinops")

N, T, C = 5, 4, 3
LOSSES = {
    "softmax_cross_entropy": nn.CrossEntropyLoss,
    "mean_squared_error": nn.MSELoss,
    "sigmoid_cross_entropy": nn.BCEWithLogitsLoss,
}


class Mean(nn.Module):
    """Average over positions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def pooled_tokens() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), Mean(1), nn.Linear(3, C))
    return model, torch.randn(N, T, 4)


def pooled_image() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), 2, dilation=2),
        Mean(2, 3),
        nn.Linear(4, C),
    )
    return model, torch.randn(N, 2, 8, 9)


def tokens() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), torch.randn(N, T, 4)


def labels(model: nn.Module, x: Tensor, loss: str) -> Tensor:
    shape = model(x).shape
    if loss == "softmax_cross_entropy":
        return torch.randint(C, shape[:-1])
    return torch.rand(shape) if loss == "mean_squared_error" else torch.randint(2, shape).double()


class ChannelsSecond(nn.Module):
    """Class scores where `nn.CrossEntropyLoss` expects them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)


def reference(model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module, **options: Any) -> dict[str, FactorPair]:
    """curvlinops's factors of the mean or summed loss, by layer."""
    prefix = ""
    if isinstance(loss, nn.CrossEntropyLoss) and y.dim() > 1:
        model, prefix = ChannelsSecond(model), "model."
    # Its check of determinism would accumulate the factors a second time.
    options |= {"separate_weight_and_bias": False, "check_deterministic": False}
    operator = curvlinops.KFACLinearOperator(model, loss, list(model.parameters()), [(x, y)], **options)
    operator.compute_kronecker_factors()
    a, b = operator._input_covariances, operator._gradient_covariances
    return {name.removeprefix(prefix): FactorPair(a[name], b[name]) for name in a}


SETTINGS = [
    pytest.param(pooled_tokens, "expand", id="linear-pooled-expand"),
    pytest.param(pooled_tokens, "reduce", id="linear-pooled-reduce"),
    pytest.param(pooled_image, "expand", id="conv-pooled-expand"),
    pytest.param(pooled_image, "reduce", id="conv-pooled-reduce"),
    pytest.param(tokens, "expand", id="linear-per-position-expand"),
]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("build", "approximation"), SETTINGS)
def test_exact_fisher(build: Any, approximation: str, loss: str, reduction: str) -> None:
    model, x = build()
    y = labels(model, x, loss)
    criterion = LOSSES[loss](reduction=reduction)
    expected = reference(model, x, y, criterion, fisher_type="type-2", kfac_approx=approximation)
    got = fisher_factors(model, x, loss, approximation, reduction=reduction)
    assert got.keys() == expected.keys()
    scale = 1.0
    if reduction == "mean":
        scale /= model(x)[0].numel() // C  # it averages over positions too
        scale /= 1 if loss == "softmax_cross_entropy" else C  # and over outputs
    for name, pair in got.items():
        assert_equal(FactorPair(pair.A, pair.B * scale), expected[name])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("build", "approximation"), SETTINGS)
def test_empirical_fisher(build: Any, approximation: str, reduction: str) -> None:
    model, x = build()
    y = labels(model, x, "softmax_cross_entropy")
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    expected = reference(model, x, y, criterion, fisher_type="empirical", kfac_approx=approximation)
    terms = y.numel()
    got = empirical_factors(
        model,
        x,
        lambda f: criterion(f.flatten(0, -2), y.flatten()),
        approximation,
        loss_normalizer=1 if reduction == "sum" else terms,
        reduction=reduction,
    )
    scale = 1.0 if reduction == "sum" else N / terms
    for name, pair in got.items():
        assert_equal(FactorPair(pair.A, pair.B * scale), expected[name])
