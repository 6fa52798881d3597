"""The Monte Carlo Fisher converges to the exact one, at the rate 1/sqrt(samples)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.losses import LossType
from algoperf_kfac.pytorch.fisher import exact_losses, sampled_loss
from benchmarks.paper.ggn import LOSSES, relative_error
from tests.math.support import assert_equal, fisher_factors

SEEDS = 48
EACH_LOSS = pytest.mark.parametrize("loss", LOSSES)


def hessians(outputs: Tensor, loss: str) -> Tensor:
    """(N, P, P): the Hessian of each example's loss with respect to its own outputs."""
    return torch.stack([torch.func.hessian(LOSSES[loss])(f).reshape(f.numel(), -1) for f in outputs])


def gradients(losses: Iterator[Tensor], outputs: Tensor) -> Tensor:
    """(losses, N, P)."""
    return torch.stack([torch.autograd.grad(value, outputs)[0].flatten(1) for value in losses])


@EACH_LOSS
@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3)], ids=["classes", "positions and classes"])
def test_exact_columns_are_a_root_of_the_hessian(loss: str, shape: tuple[int, ...]) -> None:
    outputs = (2 * torch.randn(shape)).requires_grad_()
    g = gradients(exact_losses(outputs, loss), outputs)
    torch.testing.assert_close(torch.einsum("cni,cnj->nij", g, g), hessians(outputs, loss))


@EACH_LOSS
def test_draws_have_the_hessian_as_covariance(loss: str) -> None:
    """200,000 draws in one batch of equal examples; mean zero, and positions independent of each other."""
    one = 1.5 * torch.randn(2, 3)
    outputs = one.expand(200_000, 2, 3).clone().requires_grad_()
    g = gradients(iter([sampled_loss(outputs, loss, generator=torch.Generator().manual_seed(1))]), outputs)[0]
    exact = hessians(one[None], loss)[0]
    assert relative_error(g.T @ g / len(g), exact) < 0.02
    assert float(g.mean(0).norm() / exact.trace().sqrt()) < 0.02


@EACH_LOSS
def test_masked_outputs_have_no_draws(loss: str) -> None:
    outputs = torch.randn(3, 4, 5).requires_grad_()
    mask = torch.rand(3, 4) < 0.5
    for losses in (exact_losses(outputs, loss, mask), iter([sampled_loss(outputs, loss, mask)])):
        g = gradients(losses, outputs).reshape(-1, 3, 4, 5).abs().amax(0)
        assert not g[~mask].any()
        assert (g[mask].amax(-1) > 0).all()


def test_losses_by_name_and_by_enum() -> None:
    outputs = torch.randn(2, 3)
    for member in LossType:
        if member is not LossType.CTC_LOSS:
            by_enum, by_name = (list(exact_losses(outputs, kind)) for kind in (member, member.name.lower()))
            assert all(itertools.starmap(torch.equal, zip(by_enum, by_name, strict=True)))


@pytest.mark.parametrize(
    ("loss", "approximation"), [(loss, ("expand", "reduce")[i % 2]) for i, loss in enumerate(LOSSES)]
)
def test_rate_of_convergence(loss: str, approximation: str) -> None:
    """16 times the samples, a quarter of the error; averaged over enough seeds for a narrow band."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3))
    x = 2 * torch.randn(2, 3, 3)
    exact = fisher_factors(model, x, loss, approximation)["0"]
    error = {}
    for samples in (4, 64):
        pairs = [
            fisher_factors(model, x, loss, approximation, fisher="mc", fisher_samples=samples, seed=seed)["0"]
            for seed in range(SEEDS)
        ]
        assert_equal((pairs[0].A, exact.B), exact)  # inputs are not sampled
        error[samples] = sum(relative_error(pair.B, exact.B) ** 2 for pair in pairs) ** 0.5 / SEEDS**0.5
    assert error[64] < 0.3
    assert 2.5 < error[4] / error[64] < 6.5
