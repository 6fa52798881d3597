"""Mixed precision: statistics at least in float32, and non-finite ones dropped."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import (
    Patches,
    assert_finite,
    assert_same_factors,
    assert_same_parameters,
    factors_of,
    images,
    mlp,
    train,
    vectors,
)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_autocast_statistics_are_float32_and_close(approximation: str) -> None:
    model, (x, y) = Patches(), images(301)  # a number that bfloat16 does not have

    def loss(m: torch.nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
            assert out.dtype == torch.bfloat16
            return F.cross_entropy(out, y)

    got = factors_of(model, loss, approximation=approximation)
    want = factors_of(model, lambda m: F.cross_entropy(m(x), y), approximation=approximation)
    for name, pair in got.items():
        for mine, theirs in zip(pair, want[name], strict=True):
            assert mine.dtype == torch.float32
            assert (mine - theirs).norm() < 0.03 * theirs.norm(), name  # bfloat16 rounds to 3 digits
    # Summed in bfloat16, 301 examples would be 300 or 302.
    ones = got["head"].A[-1, -1]
    torch.testing.assert_close(ones, torch.ones(()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", [None, "gradient"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_an_input_that_is_written_to_after_the_call(approximation: str, positions: str | None) -> None:
    """Autocast lets a model do so, as autograd keeps a cast of its own."""

    class Writes(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 4), nn.Linear(5, 3)
            self.writes = writes

        def forward(self, x: Tensor) -> Tensor:
            h = 1.5 * x
            y = self.first(h)
            h = h.add_(1) if self.writes else h + 1
            return torch.cat([y, self.second(h)], -1)

    x = torch.randn(6, 7, 5)
    found = []
    for writes in (False, True):
        model = Writes(writes)
        optimizer = KFAC(model, approximation=approximation)
        with optimizer.capture(positions), torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
        optimizer.step()
        found.append(optimizer.factors())
    assert set(found[0]) == {"first", "second"}
    assert_same_factors(found[1], found[0], rtol=0, atol=0)


def test_autocast_trains_like_float32() -> None:
    start, batch = Patches(), images(16)
    final = []
    for enabled in (False, True):
        model = copy.deepcopy(start)
        optimizer = KFAC(model, learning_rate=3e-3, factor_interval=2, refresh_interval=4, initial_statistics=1)
        for _ in range(20):
            optimizer.zero_grad()
            with optimizer.capture(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
            optimizer.step()
        final.append(float(loss.detach()))
        assert_finite(model, optimizer)
    assert final[1] == pytest.approx(final[0], rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grafting": False},
        {"scaling": "second_moment"},
        {"preconditioner": "inverse"},
        {"scaling": "polar", "length": "rms"},
    ],
)
def test_bfloat16_parameters(options: dict) -> None:
    model = Patches().bfloat16()
    optimizer = KFAC(model, learning_rate=1e-2, factor_interval=2, refresh_interval=2, **options)
    x, y = images()
    losses = train(model, optimizer, [(x.bfloat16(), y)] * 20)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(m.dtype == torch.float32 for pair in optimizer.factors().values() for m in pair)
    assert_finite(model, optimizer)


def test_float64_model() -> None:
    """Everything in float64: the float32 run agrees to float32's precision, not to float64's."""
    single = Patches()
    double = copy.deepcopy(single).double()
    one, two = (KFAC(m, factor_interval=2, refresh_interval=2) for m in (single, double))
    batches = [images() for _ in range(3)]
    train(single, one, batches)
    train(double, two, [(x.double(), y) for x, y in batches])
    factors = two.factors()
    assert all(m.dtype == torch.float64 for pair in factors.values() for m in pair)
    errors = [
        float((m - n).norm() / n.norm())
        for name in factors
        for m, n in zip(one.factors()[name], factors[name], strict=True)
    ]
    assert 1e-9 < max(errors) < 1e-3


@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, True)], ids=["both", "first", "second"])
def test_mixed_parameter_dtypes(biased: tuple[bool, bool]) -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=biased[0]), nn.Tanh(), nn.Linear(4, 3, bias=biased[1]))
    model[2].double()
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.capture():
            model[2](model[1](model[0](torch.randn(6, 5))).double()).square().mean().backward()
        optimizer.step()
    assert optimizer.factors()["0"].A.dtype == torch.float32
    assert optimizer.factors()["2"].A.dtype == torch.float64
    assert_finite(model, optimizer)


def test_the_graft_of_a_float16_layer_is_computed_in_float32() -> None:
    """The first-order step of 120,000 entries has a norm of about 330, whose square float16 does not hold."""
    model = nn.Sequential(nn.Linear(300, 400).half())
    optimizer = KFAC(model, learning_rate=1e-3, eps=1e-3)
    x = torch.randn(64, 300).half()
    train(model, optimizer, [(x, torch.randint(400, (64,)))])
    assert optimizer.metrics()["stand_ins"] == 0
    assert optimizer.metrics()["0/graft_ratio"] != 1
    assert_finite(model, optimizer)


def test_grad_scaler_skips_an_overflow_and_what_was_captured_with_it() -> None:
    """The scale is divided out through loss_normalizer; an infinite step is skipped by the scaler, and its
    statistics are gone after zero_grad."""
    model = Patches()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"learning_rate": 1e-3, "factor_interval": 2, "refresh_interval": 2, "initial_statistics": 1}
    optimizer, plain = (KFAC(m, **options) for m in (model, twin))
    for i, (x, y) in enumerate([images() for _ in range(5)]):
        overflow = i == 2  # a statistics step
        optimizer.zero_grad()
        with optimizer.capture(loss_normalizer=len(x) / scaler.get_scale()):
            loss = F.cross_entropy(model(x), y) * (float("inf") if overflow else 1)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_finite(model, optimizer)
        if not overflow:
            train(twin, plain, [(x, y)])
    assert optimizer.metrics()["steps"] == 4
    assert_same_factors(optimizer.factors(), plain.factors())
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_non_finite_statistics_are_dropped_and_counted(poison: float, approximation: str, first: bool) -> None:
    """The gradients are cleaned, as by a clipping that skips them; the statistics must clean themselves."""
    model = Patches()
    optimizer = KFAC(model, approximation=approximation, factor_interval=1, refresh_interval=1)
    before = {}
    if not first:
        train(model, optimizer, [images()])
        before = optimizer.factors()
    optimizer.zero_grad()
    with optimizer.capture():
        x, y = images()
        (F.cross_entropy(model(x), y) * poison).backward()
    for p in model.parameters():
        p.grad.nan_to_num_(0, 0, 0).clamp_(-1, 1)
    optimizer.step()
    assert optimizer.metrics()["dropped"] == 4
    assert optimizer.metrics()["head/dropped"] == 1
    if before:
        assert_same_factors(optimizer.factors(), before)
    for p in model.parameters():
        assert p.isfinite().all()
    train(model, optimizer, [images(), images()])
    assert_finite(model, optimizer)
    assert optimizer.metrics()["dropped"] == 4


def test_one_layer_that_overflows_does_not_stop_the_others() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    with optimizer.capture():
        h = model[1](model[0](x))
        h.register_hook(lambda g: g * float("inf"))
        F.cross_entropy(model[2](h), y).backward()
    for p in model.parameters():
        p.grad.nan_to_num_(0, 0, 0)
    optimizer.step()
    metrics = optimizer.metrics()
    assert (metrics["0/dropped"], metrics["2/dropped"]) == (1, 0)
    assert optimizer._layers.states["2"].weight > 0


def test_a_direction_whose_squares_overflow_is_scaled_and_kept() -> None:
    """Inputs and output gradients that all but cancel over positions: tiny factors, but not a tiny gradient.

    The norm of the K-FAC direction is far beyond 1.8e19, the root of float32's largest number.
    """
    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False)
    optimizer = KFAC(model, approximation="reduce", scaling="inverse", learning_rate=1e-3, eps=1e-12)
    x, weights = torch.randn(16, 8), 1e-2 * torch.randn(16, 6)
    almost = -1 - 2 * torch.finfo(torch.float32).eps
    x, weights = torch.stack([x, almost * x], 1), torch.stack([weights, almost * weights], 1)
    before = model.weight.detach().clone()
    with optimizer.capture():
        (model(x) * weights).sum().div(16).backward()
    optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["stand_ins"] == 0
    assert 0 < metrics["graft_ratio"] < 1e-20
    # NadamW's first step is the sign of each entry, longer by its look-ahead.
    length = float((before - model.weight.detach()).norm())
    assert 1e-3 * 48**0.5 < length < 2e-3 * 48**0.5


def first_direction(*, autocast: bool, floor: float) -> tuple[Tensor, Tensor, float]:
    """Gradient and first step of a layer whose inputs and gradients lie in three directions; its metric "noise"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 3, bias=False))
    x, y = torch.randn(200, 3), torch.randint(3, (200,))
    optimizer = KFAC(model, learning_rate=1.0, grafting=False, damping=1e-9, noise_floor=floor)
    before = model[1].weight.detach().clone()
    with optimizer.capture(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        F.cross_entropy(model(x).float(), y).backward()
    optimizer.step()
    return model[1].weight.grad, before - model[1].weight.detach(), optimizer.metrics()["1/noise"]


def test_rounding_is_not_scaled_up_to_whole_steps() -> None:
    """Under bf16 autocast the empty directions hold rounding, which little damping lets outgrow everything else."""
    gradient = first_direction(autocast=False, floor=1.0)[0]
    u, values, v = torch.linalg.svd(gradient, full_matrices=False)
    assert values[3] < 1e-5 * values[0]
    shares = []
    for floor in (1.0, 0.0):
        _, step, noise = first_direction(autocast=True, floor=floor)
        shares.append(float((u[:, :3].T @ step @ v[:3].T).norm() / step.norm()))
        assert noise >= 90  # of 96 eigenvalues, three on either side of which are signal
    assert shares[0] > 0.8 > 0.1 > shares[1], shares
