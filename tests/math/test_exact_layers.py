"""Every kind of layer against its exact GGN block where the approximation is exact, and what is never exact.

This ties the order of rows and columns, the groups, the flip of transposed kernels and the bias to automatic
differentiation: expand with a squared error per position, reduce with a squared error after pooling.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from benchmarks.paper.ggn import ggn_blocks, kfac_blocks, relative_error
from tests.math.strategies import convolutions
from tests.math.support import empirical_factors, examples, fisher_factors

SQUARED = "mean_squared_error"


class PerPosition(nn.Module):
    """The layer's outputs as they are, channels last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).movedim(1, -1)


class Pooled(PerPosition):
    """The layer's outputs, averaged over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1, -2).mean(1)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
@pytest.mark.parametrize(("approximation", "setting"), [("expand", PerPosition), ("reduce", Pooled)])
def test_convolutions(transposed: bool, approximation: str, setting: type[PerPosition]) -> None:
    @examples(25)
    @given(convolutions(transposed))
    def check(case: tuple[nn.Module, Tensor]) -> None:
        layer, x = case
        model = setting(layer)
        if model(x)[0].numel() > 60:  # a backward pass for each
            return
        pair = fisher_factors(model, x, SQUARED, approximation)["layer"]
        exact = ggn_blocks(model, x, SQUARED, "layer")
        assert relative_error(kfac_blocks(*pair), exact) < 1e-10

    check()


class Recurrent(nn.Module):
    """One linear layer called three times, its outputs summed (reduce setting) or stacked (expand setting)."""

    def __init__(self, stack: bool) -> None:
        super().__init__()
        self.layer, self.head, self.stack = nn.Linear(3, 3), nn.Linear(3, 2), stack

    def forward(self, x: Tensor) -> Tensor:
        calls = torch.stack([self.layer(part) for part in x.unbind(1)], 1)
        return self.head(calls if self.stack else calls.sum(1))


@pytest.mark.parametrize(("approximation", "stack"), [("expand", True), ("reduce", False)])
def test_a_module_called_several_times(approximation: str, stack: bool) -> None:
    model, x = Recurrent(stack), torch.randn(4, 3, 3)
    pair = fisher_factors(model, x, SQUARED, approximation)["layer"]
    other = fisher_factors(model, x, SQUARED, "reduce" if stack else "expand")["layer"]
    exact = ggn_blocks(model, x, SQUARED, "layer")
    assert relative_error(kfac_blocks(*pair), exact) < 1e-10
    assert relative_error(kfac_blocks(*other), exact) > 0.1


@pytest.mark.parametrize("loss", ["sigmoid_cross_entropy", "mean_absolute_error", SQUARED, "softmax_cross_entropy"])
@pytest.mark.parametrize("leading", [(1,), (1, 3)], ids=["vector", "sequence"])
def test_every_loss_on_one_position(loss: str, leading: tuple[int, ...]) -> None:
    """The last layer, one example: its block is (a a^T) (x) L whatever the loss, per position a sum of them."""
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), 2 * torch.randn(*leading, 4)
    x = x[:, :1].expand(x.shape) if x.dim() == 3 else x  # equal positions
    pair = fisher_factors(model, x, loss, "expand")["0"]
    assert relative_error(kfac_blocks(*pair), ggn_blocks(model, x, loss, "0")) < 1e-10


def test_the_empirical_fisher_is_not_the_ggn() -> None:
    """Not even for a deep linear net with squared error, where the exact Fisher is."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), torch.randn(5, 4)
    pairs = empirical_factors(model, x, lambda f: (f - torch.randn(f.shape)).square().sum(), "expand")
    for name, pair in pairs.items():
        assert relative_error(kfac_blocks(*pair), ggn_blocks(model, x, SQUARED, name)) > 0.1
