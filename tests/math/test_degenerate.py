"""Factors without full rank, without any entry, or that will not decompose: the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.math import dense

PRECONDITIONERS = pytest.mark.parametrize(
    "config",
    [
        {"preconditioner": "inverse"},
        {"scaling": "power"},
        {"scaling": "root"},
        {"scaling": "inverse"},
        {"scaling": "second_moment"},
        {"scaling": "polar"},
    ],
    ids=["inverse", "eigen-power", "eigen-root", "eigen-inverse", "eigen-second_moment", "eigen-polar"],
)
LENGTHS = pytest.mark.parametrize("length", ["graft", "rms", "none"])


def update(net: nn.Module, optimizer: KFAC, x: Tensor, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    with optimizer.capture():
        (scale * (net(x).sin() + net(x.roll(1, 0)) ** 2).sum(-1).mean()).backward()
    optimizer.step()


def assert_finite(net: nn.Module) -> None:
    assert all(p.isfinite().all() for p in net.parameters())


@PRECONDITIONERS
@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_rank_deficient_factors(config: dict[str, Any], length: str, dtype: torch.dtype, mode: str) -> None:
    """One example, 9 x 9 factors of rank one; in front of a normalisation, whose gradients miss a direction."""
    net = nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 9)).to(dtype)
    optimizer = KFAC(
        net,
        length=length,
        damping_mode=mode,
        factor_interval=1,
        refresh_interval=1,
        learning_rate=1e-3,
        **config,
    )
    x = torch.randn(1, 8, dtype=dtype)
    for _ in range(5):
        update(net, optimizer, x)
        assert_finite(net)
    assert torch.linalg.matrix_rank(optimizer.factors()["2"].A) < 10
    assert optimizer.metrics()["failures"] == 0


@pytest.mark.parametrize("scaling", ["power", "root", "inverse"])
def test_eigenvalues_below_the_rounding_error_stay_at_the_damping(scaling: str) -> None:
    """Float32 gives the null space eigenvalues of either sign; none may fall below the damping."""
    net = nn.Sequential(nn.Linear(40, 30)).float()
    optimizer = KFAC(net, scaling=scaling, damping=1e-9, noise_floor=0.0, factor_interval=1, refresh_interval=1)
    update(net, optimizer, torch.randn(2, 40, dtype=torch.float32))
    assert_finite(net)
    state = optimizer.state_dict()["kfac"]["layers"]["0"]["state"]
    for factor, values in zip(optimizer.factors(reduction="mean")["0"], ("a_values", "b_values"), strict=True):
        assert state[values][0].min() >= 1e-9 * factor.trace() / len(factor) * (1 - 1e-6)


@PRECONDITIONERS
@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_zero_factors(config: dict[str, Any], length: str, dtype: torch.dtype, zero: str) -> None:
    """A layer that has seen no input or no gradient yet, and then does."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False)).to(dtype)
    optimizer = KFAC(net, length=length, factor_interval=1, refresh_interval=1, learning_rate=1e-6, **config)
    silent = torch.zeros(5, 3, dtype=dtype) if zero != "B" else torch.randn(5, 3, dtype=dtype)
    for _ in range(2):
        update(net, optimizer, silent, 1.0 if zero == "A" else 0.0)
        assert_finite(net)
    assert (not optimizer.factors()["0"].A.any()) == (zero != "B")
    assert (not optimizer.factors()["0"].B.any()) == (zero != "A")
    for _ in range(2):
        update(net, optimizer, torch.randn(5, 3, dtype=dtype))
        assert_finite(net)
    assert optimizer.metrics()["failures"] == 0


@PRECONDITIONERS
def test_statistics_that_are_not_finite_are_left_out_and_counted(config: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    optimizer = KFAC(net, learning_rate=1e-3, factor_interval=1, refresh_interval=1, **config)
    update(net, optimizer, torch.randn(5, 3))
    before = optimizer.factors()["0"]
    optimizer.zero_grad()
    with optimizer.capture():
        (net(torch.full((5, 3), 1e200)) ** 2).sum(1).mean().backward()
    optimizer.zero_grad(set_to_none=True)  # as after an overflow: gradients and their statistics dropped
    update(net, optimizer, torch.randn(5, 3))
    assert optimizer.metrics()["dropped"] == 0
    with optimizer.capture():
        (net(torch.full((5, 3), 1e200)) ** 2).sum(1).mean().backward()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    after = optimizer.factors()["0"]
    optimizer.step()
    assert optimizer.metrics()["dropped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(optimizer.factors()["0"], after, strict=True))
    assert not torch.equal(before.A, after.A)
    assert_finite(net)


def failing(original: Callable[..., Any], bad: Callable[[Tensor], bool]) -> Callable[..., Any]:
    def decompose(matrices: Tensor, *args: Any, **kwargs: Any) -> Any:
        if bad(matrices):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(matrices, *args, **kwargs)

    return decompose


def bases(optimizer: KFAC, name: str) -> list[Tensor]:
    """What a layer keeps of its last decomposition: its bases, or the operators made of them."""
    state = optimizer.state_dict()["kfac"]["layers"][name]["state"]
    kept = (*state["a_basis"], *state["b_basis"]) or (*state["a_operator"], *state["b_operator"])
    assert kept
    return [m.clone() for m in kept]


def failures(optimizer: KFAC, name: str) -> float:
    return optimizer.metrics()[f"{name}/failures"]


@pytest.mark.parametrize("scaling", ["power", "root", "inverse", "second_moment"])
def test_a_failed_eigendecomposition_keeps_the_last_good_one(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = KFAC(net, scaling=scaling, factor_interval=1, refresh_interval=1)
    eigh = torch.linalg.eigh
    update(net, optimizer, torch.randn(5, 3))
    old = bases(optimizer, "0")
    monkeypatch.setattr(torch.linalg, "eigh", failing(eigh, lambda m: True))
    for step in (1, 2):
        before = net[0].weight.detach().clone()
        update(net, optimizer, torch.randn(5, 3))
        assert failures(optimizer, "0") >= step
        assert not torch.equal(net[0].weight, before)
        assert_finite(net)
        assert all(torch.equal(m, n) for m, n in zip(bases(optimizer, "0"), old, strict=True))
    assert optimizer.metrics()["refreshes"] == 2  # of two layers, before the failures
    count = failures(optimizer, "0")
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    update(net, optimizer, torch.randn(5, 3))
    assert failures(optimizer, "0") == count
    assert not torch.equal(bases(optimizer, "0")[0], old[0])


def test_a_failed_inverse_keeps_the_last_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    optimizer = KFAC(net, preconditioner="inverse", factor_interval=1, refresh_interval=1)
    update(net, optimizer, torch.randn(5, 3))
    old = bases(optimizer, "0")
    cholesky_ex = torch.linalg.cholesky_ex

    def indefinite(matrices: Tensor) -> tuple[Tensor, Tensor]:
        root, info = cholesky_ex(matrices)
        return root, info + 1

    monkeypatch.setattr(torch.linalg, "cholesky_ex", indefinite)
    update(net, optimizer, torch.randn(5, 3))
    assert failures(optimizer, "0") >= 1
    assert all(torch.equal(m, n) for m, n in zip(bases(optimizer, "0"), old, strict=True))
    assert_finite(net)


def test_a_failure_before_the_first_basis_moves_along_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, lambda m: True))
    net = nn.Sequential(nn.Linear(3, 4, bias=False))
    optimizer = KFAC(net, learning_rate=1.0, grafting=False, one_minus_beta1=1.0, factor_interval=1)
    before = net[0].weight.detach().clone()
    update(net, optimizer, torch.randn(5, 3))
    torch.testing.assert_close(before - net[0].weight, net[0].weight.grad)
    assert optimizer.metrics()["failures"] >= 1
    assert optimizer.metrics()["refreshes"] == 0


def test_one_bad_layer_does_not_fail_the_others_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of equal shape are decomposed in one batch, which fails as a whole."""
    net = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    optimizer = KFAC(net, factor_interval=1, refresh_interval=1)
    huge = failing(torch.linalg.eigh, lambda m: bool((m.abs().amax((1, 2)) > 1e6).any()))
    monkeypatch.setattr(torch.linalg, "eigh", huge)
    x = torch.randn(5, 3)
    with optimizer.capture():
        (net[0](x) + 1e-4 * net[1](1e4 * x) + net[2](x)).sin().sum(1).mean().backward()
    optimizer.step()
    refreshed = [optimizer.metrics()[f"{name}/refreshes"] for name in ("0", "1", "2")]
    assert refreshed == [1, 0, 1]
    assert failures(optimizer, "1") >= 1


def test_a_retry_in_float64_succeeds_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4)).float()
    config = {"grafting": False, "one_minus_beta1": 1.0, "learning_rate": 1.0, "damping": 1e-2}
    optimizer = KFAC(net, scaling="inverse", **config)
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, lambda m: m.dtype == torch.float32))
    before = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    update(net, optimizer, torch.randn(9, 3, dtype=torch.float32))
    step = before - torch.cat([net[0].weight, net[0].bias[:, None]], 1)
    g = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    pair = optimizer.factors(reduction="mean")["0"]
    expected = dense.direction(type(pair)(*(m.double() for m in pair)), g.double()[None], 1e-2, "relative", -1.0)[0]
    torch.testing.assert_close(step.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert failures(optimizer, "0") == 1
    assert optimizer.metrics()["0/refreshes"] == 1


def test_a_retry_damps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt of the retry fails too; the second, with ten times the damping, does not."""
    net = nn.Sequential(nn.Linear(3, 4))
    config = {"grafting": False, "one_minus_beta1": 1.0, "learning_rate": 1.0, "damping": 1e-2}
    optimizer = KFAC(net, scaling="inverse", **config)

    def condition(m: Tensor) -> bool:
        values = torch.linalg.eigvalsh(m)
        return bool((values[:, 0] / m.diagonal(dim1=1, dim2=2).mean(1) < 0.05).any())

    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, condition))
    x = torch.randn(9, 3) * torch.tensor([1.0, 1.0, 1e-3])
    before = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    update(net, optimizer, x)
    step = before - torch.cat([net[0].weight, net[0].bias[:, None]], 1)
    g = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    expected = dense.direction(optimizer.factors(reduction="mean")["0"], g[None], 0.1, "relative", -1.0)[0]
    torch.testing.assert_close(step, expected)
    assert failures(optimizer, "0") == 2


def test_drift_skips_the_basis_and_updates_the_eigenvalues() -> None:
    """A basis that still diagonalises the factors is kept; its eigenvalues are u^T A u plus the damping."""
    net = nn.Sequential(nn.Linear(3, 4))
    config = {"learning_rate": 1e-4, "damping": 1e-2, "factor_decay": 0.5}
    optimizer = KFAC(net, factor_interval=1, refresh_interval=1, drift_tolerance=0.999, **config)
    update(net, optimizer, torch.randn(9, 3))
    old = bases(optimizer, "0")
    update(net, optimizer, 3 * torch.randn(9, 3))
    assert all(torch.equal(m, n) for m, n in zip(bases(optimizer, "0"), old, strict=True))
    assert optimizer.metrics()["0/skipped"] == 1
    state = optimizer.state_dict()["kfac"]["layers"]["0"]["state"]
    pair, drifts = optimizer.factors(reduction="mean")["0"], []
    for factor, basis, values in zip(pair, old, (state["a_values"][0], state["b_values"][0]), strict=True):
        rotated = basis[0].T @ factor @ basis[0]
        expected = rotated.diagonal() + 1e-2 * factor.trace() / len(factor)
        torch.testing.assert_close(values[0], expected)
        drifts.append(float((rotated - rotated.diagonal().diag()).norm() / rotated.norm()))
    assert optimizer.metrics()["0/drift"] == pytest.approx(max(drifts))
    assert max(drifts) > 0.01
