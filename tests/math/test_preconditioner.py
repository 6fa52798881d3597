"""Directions against the dense Kronecker product: inverse, eigen, blocks, identity, damping; and grafting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, NadamW
from benchmarks.paper import ggn as oracle
from tests.math import dense

PLAIN: dict[str, Any] = {"one_minus_beta1": 1.0, "learning_rate": 1.0, "grafting": False, "factor_decay": 0.5}
POWERS = {"inverse": -1.0, "root": -0.5, "power": -0.75}


def model() -> nn.Module:
    """Layers of every kind; the normalisation takes the fallback."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 3, 2, stride=2, bias=False),
        nn.GroupNorm(1, 3),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    )


def backward(net: nn.Module) -> None:
    (net(torch.randn(9, 2, 4)) ** 2).sum(1).mean().backward()


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def matrix(net: nn.Module, name: str, tensors: dict[str, Tensor]) -> Tensor:
    return oracle.rows(net.get_submodule(name), tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def directions(net: nn.Module, optimizer: KFAC) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient and step (learning rate 1) of one update, by layer, as (groups, P_out, P_in)."""
    optimizer.zero_grad()
    with optimizer.capture():
        backward(net)
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    before = parameters(net)
    optimizer.step()
    steps = {name: before[name] - p for name, p in parameters(net).items()}
    names = [layer.name for layer in optimizer.coverage().layers]
    assert len(names) == 4
    return tuple({n: matrix(net, n, tensors) for n in names} for tensors in (grads, steps))


def assert_dense(net: nn.Module, exponent: float, *, least: float = 0.0, **config: Any) -> None:
    """Two steps, so that moving averages and not the last factors are used."""
    optimizer = KFAC(net, factor_interval=1, refresh_interval=1, **(PLAIN | config))
    for _ in range(2):
        grads, steps = directions(net, optimizer)
        for name, pair in optimizer.factors(reduction="mean").items():
            expected = dense.direction(
                pair, grads[name], optimizer.config.damping, optimizer.config.damping_mode, exponent, least
            )
            torch.testing.assert_close(steps[name], expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))


DAMPINGS = pytest.mark.parametrize(
    "damping",
    [{"damping": 1e-2}, {"damping": 1e-2, "damping_mode": "absolute"}, {"damping": 10.0}],
    ids=["relative", "absolute", "large"],
)
FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"max_factor_dim": 3}, {"max_factor_dim": 5, "large_factor": "one_sided"}],
    ids=["whole", "blocks", "one-sided"],
)
APPROXIMATIONS = pytest.mark.parametrize("approximation", ["expand", "reduce"])


@DAMPINGS
@FORMS
@APPROXIMATIONS
def test_inverse(damping: dict[str, Any], form: dict[str, Any], approximation: str) -> None:
    assert_dense(model(), -1.0, preconditioner="inverse", approximation=approximation, **damping, **form)


@DAMPINGS
@FORMS
@pytest.mark.parametrize("scaling", POWERS)
def test_eigen(damping: dict[str, Any], form: dict[str, Any], scaling: str) -> None:
    config = {"preconditioner": "eigen", "scaling": scaling, "power": 0.75}  # root and inverse ignore the power
    assert_dense(model(), POWERS[scaling], **config, **damping, **form)


@FORMS
@pytest.mark.parametrize(
    ("config", "exponent"),
    [
        ({"power": 0.5}, -0.5),
        ({"scaling": "inverse", "damping_mode": "absolute"}, -1.0),
        ({"preconditioner": "inverse"}, -1.0),
    ],
    ids=str,
)
def test_the_noise_floor(config: dict[str, Any], exponent: float, form: dict[str, Any]) -> None:
    """Damping is at least a multiple of what keeps rounding, 2.2e-16 / sqrt(12), from outgrowing the largest part.

    At the power -p of either side the largest part of a gradient is scaled by (max max)^-p, what lies in empty
    directions by (l l)^-p.
    """
    level = (torch.finfo(torch.float64).eps / math.sqrt(12)) ** (-0.5 / exponent)
    factor = 0.01 / level
    assert_dense(model(), exponent, least=0.01, damping=1e-8, noise_floor=factor, **config, **form)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_other_powers(power: float) -> None:
    assert_dense(model(), -power, scaling="power", power=power)


def test_forms_differ_where_they_should() -> None:
    """Guards the two tests above: their blocks and identities are really there."""
    net = model()
    blocks = {layer.name: layer for layer in KFAC(net, max_factor_dim=3).coverage().layers}["5"]
    assert (len(blocks.in_blocks), blocks.out_blocks) == (9, (3, 2))
    one_sided = KFAC(net, max_factor_dim=5, large_factor="one_sided").coverage().layers
    assert [layer.in_blocks == () for layer in one_sided] == [False, True, True, True]


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"preconditioner": "inverse"}, 0.01),
        ({"scaling": "root"}, 1.0),
        ({"scaling": "power", "power": 0.75}, 0.1),
        ({"scaling": "inverse"}, 0.01),
        ({"scaling": "polar", "polar_exponent": 0.25}, 0.1),
    ],
    ids=["inverse", "eigen-root", "eigen-power", "eigen-inverse", "eigen-polar"],
)
def test_a_rescaled_loss_rescales_the_direction(config: dict[str, Any], factor: float) -> None:
    """Relative damping: with B ~ c^2, the power p goes as c^(1 - 2p), the inverse as 1/c, the root not at all.

    The polar factor has no scale, and its tempering goes as c^(-2q).
    """
    steps = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 2))
        optimizer = KFAC(net, **(PLAIN | config))
        before = net[0].weight.detach().clone()
        with optimizer.capture():
            (scale * (net(torch.randn(7, 3)) ** 2).sum(1).mean()).backward()
        optimizer.step()
        steps.append(before - net[0].weight.detach())
    torch.testing.assert_close(steps[1], factor * steps[0])


@pytest.mark.parametrize(
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
def test_grafting_gives_the_norm_of_nadamw(config: dict[str, Any]) -> None:
    """Layer by layer, weight and bias together; parameters without K-FAC take NadamW's step itself."""
    net, twin = model(), model()
    twin.load_state_dict(net.state_dict())
    optimizer = KFAC(net, learning_rate=0.1, weight_decay=0.3, factor_interval=1, refresh_interval=1, **config)
    reference = NadamW(twin.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.3)
    for step in range(3):
        twin.load_state_dict(net.state_dict())
        before = parameters(net)
        torch.manual_seed(step)
        optimizer.zero_grad()
        with optimizer.capture():
            backward(net)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        # Decoupled weight decay is not part of the direction.
        moved = {n: before[n] * (1 - 0.1 * 0.3) - p for n, p in parameters(net).items()}
        adam = {n: before[n] * (1 - 0.1 * 0.3) - p for n, p in parameters(twin).items()}
        for layer in optimizer.coverage().layers:
            ours, theirs = matrix(net, layer.name, moved), matrix(twin, layer.name, adam)
            torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=1e-10, atol=0)
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) < 0.999
        for fallback in optimizer.coverage().fallbacks:
            torch.testing.assert_close(moved[fallback.name], adam[fallback.name], rtol=1e-10, atol=1e-15)
    assert optimizer.coverage().fallbacks
