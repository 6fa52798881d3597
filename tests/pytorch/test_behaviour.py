"""K-FAC does what it is for, and nothing a model feeds it stops the training."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_finite, images, mlp, train, vectors


def final_loss(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(optimizer, KFAC):
            with optimizer.capture() as capture:
                outputs = model(x)
                capture.backward_fisher(outputs, "mean_squared_error")
                F.mse_loss(outputs, y).backward()
        else:
            F.mse_loss(model(x), y).backward()
        optimizer.step()
    return float(F.mse_loss(model(x), y).detach())


@pytest.mark.parametrize("preconditioner", ["eigen", "inverse"])
def test_beats_gradient_descent_on_an_ill_conditioned_regression(preconditioner: str) -> None:
    """The inputs' covariance has condition number 10^4; K-FAC with the exact Fisher, no momentum and no grafting is
    damped Newton there, and gradient descent has its best learning rate of a grid up to divergence."""
    x = torch.randn(64, 6) * torch.logspace(0, -2, 6)
    y = x @ (torch.randn(6, 2) / torch.logspace(0, -2, 6)[:, None])
    start = nn.Linear(6, 2)
    descent = []
    for lr in (0.1, 0.3, 1.0, 3.0):
        model = copy.deepcopy(start)
        descent.append(final_loss(torch.optim.SGD(model.parameters(), lr=lr), model, x, y, 30))
    model = copy.deepcopy(start)
    kfac = KFAC(
        model, preconditioner=preconditioner, scaling="inverse", fisher="exact", grafting=False, damping=1e-6,
        noise_floor=0.0, learning_rate=0.5, one_minus_beta1=1.0, factor_interval=5, refresh_interval=5,
    )  # fmt: skip
    best = min(loss for loss in descent if math.isfinite(loss))
    assert best > 0.1, "the problem is not ill-conditioned"
    assert final_loss(kfac, model, x, y, 30) < 1e-4 * best


def dead(model: nn.Module) -> nn.Module:
    """The first layer's units are off for every input."""
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    return model


def inputs(kind: str) -> tuple[Tensor, Tensor]:
    x, y = vectors()
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "one example":
        x, y = x[:1], y[:1]
    elif kind == "constant columns":
        x[:, :3] = 0.5
        x[:, 3] = 0
    elif kind == "tiny":
        x = 1e-20 * x
    elif kind == "huge":
        x = 1e6 * x
    return x, y


CONFIGURATIONS = [
    pytest.param(
        {"preconditioner": p, "scaling": s, "damping": d, "damping_mode": m, "grafting": g},
        id=f"{p}-{s}-{d}-{m}-{g}",
    )
    for p, s, d, m, g in itertools.product(
        ["eigen", "inverse"],
        ["power", "root", "inverse", "second_moment"],
        [1e-3, 1e-8],
        ["relative", "absolute"],
        [True, False],
    )
    if p == "eigen" or s == "root"
]


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_rank_deficient_inputs_never_raise(options: dict[str, Any]) -> None:
    kinds = (
        "zero",
        "constant",
        "one example",
        "constant columns",
        "tiny",
        "huge",
        "dead",
        "dead zero",
        "no gradient",
    )
    for kind, bias in itertools.product(kinds, (True, False)):
        model = nn.Sequential(nn.Linear(5, 4, bias=bias or "dead" in kind), nn.ReLU(), nn.Linear(4, 3, bias=bias))
        if "dead" in kind:
            dead(model)
        optimizer = KFAC(model, learning_rate=1e-3, factor_interval=1, refresh_interval=2, **options)
        for step in range(4):
            x, y = inputs("zero" if kind == "dead zero" else kind)
            optimizer.zero_grad()
            with optimizer.capture():
                loss = F.cross_entropy(model(x), y) * (0.0 if kind == "no gradient" and step else 1.0)
                loss.backward()
            optimizer.step()
        try:
            assert_finite(model, optimizer)
        except AssertionError as error:
            raise AssertionError(f"{kind}, bias={bias}: {error}") from None


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_layer_that_dies_and_comes_back(approximation: str) -> None:
    """Its statistics shrink towards zero while it gets no gradient; the next gradient must not explode."""
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model, approximation=approximation, learning_rate=1e-3, factor_interval=1, refresh_interval=1)
    for step in range(60):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with optimizer.capture():
            (F.cross_entropy(model(x), y) * float(step < 5 or step > 55)).backward()
        optimizer.step()
        moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.parameters(), before, strict=True))
        assert moved < 0.05, f"step {step}"
    assert_finite(model, optimizer)


@pytest.mark.parametrize("options", [{}, {"preconditioner": "inverse"}, {"scaling": "second_moment"}])
def test_a_layer_that_no_gradient_reached_waits_for_one(options: dict[str, Any]) -> None:
    """Behind a weight that starts at zero there is no curvature: no refresh, and one out of turn once there is."""
    model = mlp(4, 4, 4, 3)
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    intervals = {"factor_interval": 2, "refresh_interval": 6, "initial_statistics": 1, "initial_refreshes": "every"}
    optimizer = KFAC(model, **intervals, **options)
    for step in range(9):
        if step < 8:
            nn.init.zeros_(model[4].weight)
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        metrics = optimizer.metrics()
        assert metrics["stand_ins"] == metrics["dropped"] == metrics["failures"] == 0
        refreshes = [metrics[f"{name}/refreshes"] for name in ("0", "2", "4")]
        if step == 7:
            assert refreshes == [0, 0, 3]
            factors = optimizer.factors()
            assert isinstance(factors["0"].B, Tensor)
            assert not factors["0"].B.any()
    assert refreshes == [1, 1, 4]  # at step 8, the turn of layer "4" alone


def test_default_options_learn_faster_than_their_fallback() -> None:
    """Same steps, three seeds: against itself with every layer excluded, which is NadamW, each at the best learning
    rate of a grid. (At one rate, the power and not the basis could decide: grafting gives both the same length, and
    the greater the power, the more of that length goes into flat directions, which small rates do not need.)"""
    rates = (0.03, 0.1, 0.3)
    losses = {(excluded, rate): 0.0 for excluded in (False, True) for rate in rates}
    for seed in range(3):
        torch.manual_seed(seed)
        z, rotation = torch.randn(256, 32), torch.linalg.qr(torch.randn(32, 32))[0]
        x, y = (z * torch.logspace(0, -2, 32)) @ rotation, (z @ torch.randn(32, 3)).argmax(1)
        start = mlp(32, 16, 3, activation=nn.ReLU)
        for excluded, rate in losses:
            model = copy.deepcopy(start)
            exclude = ["*"] if excluded else []
            optimizer = KFAC(model, exclude=exclude, learning_rate=rate, factor_interval=5, refresh_interval=10)
            losses[excluded, rate] += float(train(model, optimizer, [(x, y)] * 80)[-1])
    ours, theirs = ([losses[excluded, rate] for rate in rates] for excluded in (False, True))
    assert min(theirs) == theirs[1], "the grid does not hold NadamW's best learning rate"
    assert min(ours) < 0.3 * min(theirs)


def test_images_with_constant_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    x, y = images()
    x[:, :, :4] = 0
    losses = train(model, optimizer, [(x, y)] * 10)
    assert losses[-1] < losses[0]
    assert_finite(model, optimizer)
