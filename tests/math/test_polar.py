"""The whitened polar: Newton-Schulz against a singular value decomposition, and what stands around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.config import POLAR_STEPS as STEPS
from algoperf_kfac.layers import make_spec
from algoperf_kfac.polar import BAND, COEFFICIENTS, LEAST
from algoperf_kfac.pytorch import KFAC, KFACConfig
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings.polar import Scaling, polar
from tests.math import dense
from tests.math.test_preconditioner import FORMS, PLAIN, directions, model

SEEDS = pytest.mark.parametrize("seed", range(40))


def matrices(seed: int, decades: float = 0.0) -> Tensor:
    """Two matrices of a random shape and scale, their singular values spread over some decades."""
    torch.manual_seed(seed)
    p_out, p_in = torch.randint(1, 30, (2,)).tolist()
    u, s, vh = torch.linalg.svd(torch.randn(2, p_out, p_in), full_matrices=False)
    spread = 10 ** (-decades * torch.linspace(0, 1, s.shape[1]))
    return 10 ** float(3 * torch.randn(())) * u * (s * spread)[:, None, :] @ vh


def in_its_vectors(result: Tensor, z: Tensor) -> Tensor:
    """(groups, n): the singular values of a result that has the singular vectors of z, which is asserted."""
    u, _, vh = torch.linalg.svd(z, full_matrices=False)
    core = u.mT @ result @ vh.mT
    values = core.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(core, torch.diag_embed(values), rtol=0, atol=1e-9)
    torch.testing.assert_close(result, u * values[:, None, :] @ vh, rtol=0, atol=1e-9)  # and nothing else
    return values


def newton_schulz(s: Tensor, steps: int = STEPS) -> Tensor:
    """What the iteration makes of singular values, relative to their norm: numbers, no matrices."""
    a, b, c = COEFFICIENTS
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("steps", [1, 3])
def test_fewer_steps(steps: int) -> None:
    z = matrices(0)
    values = in_its_vectors(polar(z, steps), z)
    torch.testing.assert_close(values, newton_schulz(torch.linalg.svdvals(z), steps), rtol=0, atol=1e-9)


@SEEDS
def test_the_vectors_stay_and_the_values_come_near_one(seed: int) -> None:
    z = matrices(seed)
    s = torch.linalg.svdvals(z)
    values = in_its_vectors(polar(z, STEPS), z)
    known = s >= LEAST * s.norm(dim=1, keepdim=True)
    assert known.double().mean() > 0.9
    assert (values[known] > BAND[0]).all()
    assert (values < BAND[1]).all()
    torch.testing.assert_close(values, newton_schulz(s), rtol=0, atol=1e-9)


@SEEDS
def test_small_values_are_lifted_and_none_leaves_the_band_above(seed: int) -> None:
    z = matrices(seed, decades=7.0)
    s = torch.linalg.svdvals(z) / torch.linalg.matrix_norm(z)[:, None]
    values = in_its_vectors(polar(z, STEPS), z)
    assert (values > -1e-9).all()
    assert (values < BAND[1]).all()
    assert (values <= COEFFICIENTS[0] ** STEPS * s + 1e-9).all()
    torch.testing.assert_close(values, newton_schulz(s), rtol=0, atol=1e-9)


def test_the_band() -> None:
    """What `algoperf_kfac.polar` says of the iteration, at every number that a singular value may start from."""
    a, b, c = COEFFICIENTS
    s = torch.linspace(0, 1, 2_000_001)
    largest = s
    start = s
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
        largest = largest.maximum(s)
        assert (s >= 0).all()
    assert largest.max() < BAND[1]
    assert s[start >= LEAST].min() > BAND[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e-30, 1e30, 1e300])
def test_extreme_scales(dtype: torch.dtype, scale: float) -> None:
    """Squares of such entries vanish or overflow; what a dtype cannot hold is zero, or infinite before it comes."""
    z = (scale * torch.randn(1, 4, 6)).to(dtype)
    if not z.isfinite().all():
        return
    got = polar(z, STEPS)
    assert got.isfinite().all()
    if (z.abs() >= torch.finfo(dtype).tiny).all():
        torch.testing.assert_close(got, polar(z / z.abs().max(), STEPS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 5, 3), (1, 1, 1)], ids=str)
def test_zero_stays_zero(shape: tuple[int, ...]) -> None:
    assert torch.equal(polar(torch.zeros(shape), STEPS), torch.zeros(shape))
    one_group = torch.randn(shape)
    one_group[0] = 0
    got = polar(one_group, STEPS)
    assert not got[0].any()
    assert got.isfinite().all()
    assert shape[0] == 1 or got[1].any()


def root(factor: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(factor)
    return vectors * values**power @ vectors.T


@FORMS
@pytest.mark.parametrize("exponent", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_the_direction(form: dict[str, Any], exponent: float, mode: str) -> None:
    """Whitening and tempering with dense roots of the damped factors, the iteration on singular values alone.

    On convolutions, grouped ones among them, transposed ones and linear layers; averages of two steps.
    """
    net = model()
    config = {"scaling": "polar", "polar_exponent": exponent, "damping": 1e-2, "damping_mode": mode}
    optimizer = KFAC(net, factor_interval=1, refresh_interval=1, **(PLAIN | config | form))
    for _ in range(2):
        grads, steps = directions(net, optimizer)
    for name, pair in optimizer.factors(reduction="mean").items():
        groups, p_out, p_in = grads[name].shape
        a, b = (dense.blocks_of(factor, groups) for factor in pair)
        for group in range(groups):
            means = dense.mean_eigenvalue(a, group), dense.mean_eigenvalue(b, group)
            lambdas = [1e-2 * mean for mean in means]
            if mode == "absolute":
                pi = (means[0] / means[1]) ** 0.5
                lambdas = [pi * 0.1, 0.1 / pi]
            whole_a = dense.damped(a, group, lambdas[0], p_in)
            whole_b = dense.damped(b, group, lambdas[1], p_out)
            white = root(whole_b, -0.5) @ grads[name][group] @ root(whole_a, -0.5)
            u, s, vh = torch.linalg.svd(white, full_matrices=False)
            expected = root(whole_b, -exponent) @ (u * newton_schulz(s) @ vh) @ root(whole_a, -exponent)
            got = steps[name][group]
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))
            # And so it is the polar factor itself, up to the band.
            back = root(whole_b, exponent) @ got @ root(whole_a, exponent)
            values = (u.T @ back @ vh.T).diagonal()
            assert ((values > BAND[0] - 1e-6) | (s < LEAST * s.norm())).all()
            assert (values < BAND[1]).all()


def state_of(a: Tensor, b: Tensor) -> LayerState:
    """A layer's state as a refresh leaves it, for damped factors (groups, size, size)."""
    groups, (p_out, p_in) = len(a), (b.shape[1], a.shape[1])
    spec = make_spec(
        name="layer", kind="linear", weight="layer.weight", bias=None, weight_shape=(groups * p_out, p_in),
        groups=groups, in_dim=p_in, out_dim=p_out, config=KFACConfig(),
    )  # fmt: skip
    state = LayerState.zeros(spec, a, {})
    (a_values, a_basis), (b_values, b_basis) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    state.a_values, state.a_basis, state.b_values, state.b_basis = [a_values], [a_basis], [b_values], [b_basis]
    state.refreshes = 1
    return state


@pytest.mark.parametrize("seed", range(20))
def test_rotations_and_scales(seed: int) -> None:
    """Rotated inputs and outputs rotate the direction; a longer momentum changes nothing."""
    torch.manual_seed(seed)
    groups, p_out, p_in = torch.randint(1, 4, ()).item(), *torch.randint(2, 12, (2,)).tolist()
    a, b = (torch.randn(groups, n, 2 * n) for n in (p_in, p_out))
    a, b, m = a @ a.mT, b @ b.mT, torch.randn(groups, p_out, p_in)
    q, p = (torch.linalg.qr(torch.randn(groups, n, n)).Q for n in (p_out, p_in))
    scaling = Scaling(KFACConfig(scaling="polar"))
    direction = scaling.precondition(state_of(a, b), m, m, 0.9)
    rotated = scaling.precondition(state_of(p @ a @ p.mT, q @ b @ q.mT), q @ m @ p.mT, m, 0.9)
    torch.testing.assert_close(rotated, q @ direction @ p.mT, rtol=0, atol=1e-9 * float(direction.abs().max()))
    longer = scaling.precondition(state_of(a, b), 1e6 * m, m, 0.9)
    torch.testing.assert_close(longer, direction, rtol=0, atol=1e-9 * float(direction.abs().max()))
    # Each group by itself.
    first = scaling.precondition(state_of(a[:1], b[:1]), m[:1], m[:1], 0.9)
    torch.testing.assert_close(first, direction[:1])


def test_before_the_first_refresh_the_momentum_stands() -> None:
    """A layer whose output gradients are zero has no factor to decompose."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False))
    optimizer = KFAC(net, scaling="polar", **PLAIN)
    before = net[0].weight.detach().clone()
    optimizer.zero_grad()
    with optimizer.capture():
        (0 * net(torch.randn(5, 3))).sum().backward()
    net[0].weight.grad = torch.randn(4, 3)
    optimizer.step()
    assert optimizer.metrics()["refreshes"] == 0
    torch.testing.assert_close(before - net[0].weight.detach(), net[0].weight.grad)
