"""What coverage() says of typical models, and how large factors are cut."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import (
    Patches,
    assert_finite,
    capture_once,
    convnet,
    covered,
    images,
    mlp,
    reasons,
    train,
    vectors,
)


def test_table_of_a_vit() -> None:
    optimizer = KFAC(Patches(), approximation="reduce")
    coverage = optimizer.coverage()
    assert [layer.name for layer in coverage.layers] == ["patch", "up", "down", "head"]
    assert reasons(optimizer).keys() == {"position", "norm.weight", "norm.bias"}
    total = sum(p.numel() for p in Patches().parameters())
    assert coverage.num_parameters == total
    assert coverage.num_covered == total - 32 - 16
    assert coverage.fraction == pytest.approx((total - 48) / total)
    raw = "raw parameter: covered from the first statistics step on if an operation with a rule reads it"
    assert str(coverage).splitlines() == [
        "parameters           treatment      A   B   note",
        "patch.weight + bias  conv reduce    17  8",
        "up.weight + bias     linear reduce  9   16",
        "down.weight + bias   linear reduce  17  8",
        "head.weight + bias   linear reduce  9   3",
        f"position             fallback               {raw}",
        "norm.weight          fallback               normalisation (LayerNorm)",
        "norm.bias            fallback               normalisation (LayerNorm)",
        "K-FAC covers 443 of 491 parameters (90.2 %)",
    ]


def test_table_of_a_convnet() -> None:
    """Depthwise groups have factors of their own."""
    model = nn.Sequential(*convnet()[:3], nn.BatchNorm2d(4), *convnet()[3:])
    optimizer = KFAC(model, approximation={"conv": "reduce"})
    layers = {layer.name: layer for layer in optimizer.coverage().layers}
    assert {name: (layer.groups, layer.factor_in_dim, layer.out_dim) for name, layer in layers.items()} == {
        "0": (1, 10, 4), "2": (4, 10, 1), "5": (1, 17, 3),
    }  # fmt: skip
    assert {name: layer.approximation for name, layer in layers.items()} == {
        "0": "reduce",
        "2": "reduce",
        "5": "expand",
    }
    assert "4 groups" in str(optimizer.coverage())
    assert set(reasons(optimizer).values()) == {"normalisation (BatchNorm2d)"}
    train(model, optimizer, [images()])
    assert optimizer.factors()["2"].A.shape == (4, 10, 10)
    assert optimizer.factors()["2"].B.shape == (4, 1, 1)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_blocks_are_the_diagonal_blocks_of_the_whole_factor(approximation: str) -> None:
    model, (x, y) = mlp(7, 6, 3), vectors(features=7)

    def factors(**options: int | str) -> KFAC:
        return capture_once(
            copy.deepcopy(model), lambda m: F.cross_entropy(m(x), y), approximation=approximation, **options
        )

    whole, cut = factors().factors(), factors(max_factor_dim=3).factors()
    for factor, sizes in (("A", (3, 3, 2)), ("B", (3, 3))):
        blocks = getattr(cut["0"], factor)
        assert tuple(len(m) for m in blocks) == sizes
        start = 0
        for m in blocks:
            torch.testing.assert_close(
                m, getattr(whole["0"], factor)[start : start + len(m), start : start + len(m)]
            )
            start += len(m)


def test_one_sided_leaves_the_large_factor_out() -> None:
    optimizer = KFAC(mlp(9, 3, 3), max_factor_dim=6, large_factor="one_sided")
    first, second = optimizer.coverage().layers
    assert (first.in_blocks, first.out_blocks) == ((), (3,))
    assert (second.in_blocks, second.out_blocks) == ((4,), (3,))
    assert "identity" in str(optimizer.coverage())


def test_both_factors_too_large_is_a_fallback() -> None:
    optimizer = KFAC(mlp(9, 9, 3), max_factor_dim=6, large_factor="one_sided")
    assert covered(optimizer) == {"2"}
    assert reasons(optimizer)["0.weight"] == "both factors above max_factor_dim=6"


@pytest.mark.parametrize("large_factor", ["block", "one_sided"])
@pytest.mark.parametrize("preconditioner", ["eigen", "inverse"])
@pytest.mark.parametrize("scaling", ["power", "root", "inverse", "second_moment"])
def test_cut_factors_train(large_factor: str, preconditioner: str, scaling: str) -> None:
    model, batch = mlp(9, 4, 3), vectors(features=9)
    optimizer = KFAC(
        model, max_factor_dim=5, large_factor=large_factor, preconditioner=preconditioner, scaling=scaling,
        learning_rate=1e-2, factor_interval=2, refresh_interval=2,
    )  # fmt: skip
    losses = train(model, optimizer, [batch] * 20)
    assert losses[-1] < 0.9 * losses[0]
    assert_finite(model, optimizer)
    assert optimizer.metrics()["failures"] == 0


class Matrix(nn.Module):
    """A raw matrix that is read as `how` says."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.matrix, self.how = nn.Parameter(torch.randn(5, 3)), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.matrix)


def spelt_out(x: Tensor, w: Tensor) -> Tensor:
    return (x.unsqueeze(2) * w).sum(1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: torch.jit.script(mlp(5, 4, 3)),
            r"0.weight \(in a torch.jit program.*torch.compile takes its place",
        ),
        (lambda: torch.jit.trace(mlp(5, 4, 3), vectors()[0]), r"2.weight \(in a torch.jit program"),
        (lambda: Matrix(spelt_out), r"matrix \(read by mul, which has no rule\)$"),
    ],
)
def test_that_no_layer_is_covered_is_said(make: Callable[[], nn.Module], reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is old
        model = make()
    optimizer = KFAC(model)
    with pytest.warns(UserWarning, match=f"no layer is covered, every parameter takes the NadamW update.*{reason}"):
        train(model, optimizer, [vectors()])


def test_raw_matrices_without_a_capture_are_said() -> None:
    """No layer is known that would miss its statistics, and none will ever be."""
    model, (x, y) = Matrix(torch.matmul), vectors()
    optimizer = KFAC(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=r"no layer is covered.*matrix \(raw parameter.*inside capture\(\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (mlp(5, 4, 3), {"exclude": ["*"]}),
        (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3).requires_grad_(False)), {}),
        (Matrix(torch.matmul), {}),
    ],
)
def test_what_is_left_out_on_purpose_is_not_said(
    model: nn.Module, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    train(model, KFAC(model, **options), [vectors()])
    assert not [w for w in recwarn if "no layer" in str(w.message)]
