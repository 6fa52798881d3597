"""approximation="mixed": expand's A for spatial kernels, and the identity where B is rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, Positions
from algoperf_kfac.vanishing import largest_share


class Attention(nn.Module):
    """One projection for queries, keys and values: a common shift of all keys changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


def run(model: nn.Module, x: Tensor, approximation: Any, positions: Any = None, **options: Any) -> KFAC:
    optimizer = KFAC(model, approximation=approximation, learning_rate=0.0, **options)
    optimizer.zero_grad()
    with optimizer.capture(positions, 1.0):
        (model(x).sin() + model(x) ** 2).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_the_block_of_the_keys_is_replaced(readout: str) -> None:
    """By the identity times the mean eigenvalue of expand's B; queries and values keep reduce's."""
    model, x = Attention(), torch.randn(5, 3, 4)
    options = {"positions": Positions(readout=readout), "output_splits": {"project": 3}}
    found, reduce = (run(model, x, name, **options) for name in ("mixed", "reduce"))
    b, wanted = found.factors()["project"].B, reduce.factors()["project"].B
    torch.testing.assert_close((b[0], b[2]), (wanted[0], wanted[2]))
    expand = run(model, x, "expand", **options).factors()["project"].B
    # Both calls see the same examples: 6 positions each.
    level = expand[1].trace() / 2 / (36 if readout == "sum" else 1)
    torch.testing.assert_close(b[1], level * torch.eye(2))
    assert wanted[1].trace() < largest_share(torch.finfo(x.dtype).eps) * expand[1].trace()
    assert found.metrics()["project/vanished"] == pytest.approx(1 / 3)
    assert found.metrics()["vanished"] == 1
    assert reduce.metrics()["vanished"] == 0


def test_a_by_kind_and_kernel() -> None:
    convs = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 1), nn.Flatten(), nn.Linear(6, 2))
    x = torch.randn(7, 2, 5)
    pairs = {name: run(convs, x, name).factors(reduction="mean") for name in ("expand", "reduce", "mixed")}
    for layer, a in (("0", "expand"), ("2", "reduce"), ("4", "reduce")):
        torch.testing.assert_close(pairs["mixed"][layer].A, pairs[a][layer].A)
        torch.testing.assert_close(pairs["mixed"][layer].B, pairs["reduce"][layer].B)
    by_kind = run(convs, x, {"linear": "expand", "conv": "mixed"})
    chosen = {layer.name: layer.approximation for layer in by_kind.coverage().layers}
    assert chosen == {"0": "mixed", "2": "mixed", "4": "expand"}


def test_half_precision_leaves_room() -> None:
    """Sums that do not vanish have about the size of the squares, whatever the dtype."""
    assert largest_share(torch.finfo(torch.bfloat16).eps) < 1e-2
    assert largest_share(torch.finfo(torch.float32).eps) < 1e-6
