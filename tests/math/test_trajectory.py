"""Whole trajectories against a reference of a page: averages, intervals, second moment, momentum, grafting."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.math.support import empirical_factors

STEPS, BETA1, BETA2, LR, DECAY, DAMPING, EPS = 9, 0.8, 0.95, 0.05, 0.7, 1e-2, 1e-8


def loss(outputs: Tensor) -> Tensor:
    return (outputs.sin() + outputs**2).sum((1, 2)).mean()


class Reference:
    """One linear layer with a bias, its parameters as one matrix W (P_out x [P_in + 1])."""

    def __init__(self, w: Tensor, config: dict[str, Any]) -> None:
        self.w, self.config = w.clone(), config
        self.m, self.v = torch.zeros_like(w), torch.zeros_like(w)
        self.a, self.b = torch.zeros(w.shape[1], w.shape[1]), torch.zeros(w.shape[0], w.shape[0])
        self.weight, self.rotated_v, self.rotations, self.batches = 0.0, torch.zeros_like(w), 0, 0
        self.u_a = self.u_b = None

    def refresh(self) -> None:
        a, b = self.a / self.weight, self.b / self.weight
        a = a + DAMPING * a.trace() / len(a) * torch.eye(len(a))
        b = b + DAMPING * b.trace() / len(b) * torch.eye(len(b))
        old_a, old_b = self.u_a, self.u_b
        (self.values_a, self.u_a), (self.values_b, self.u_b) = torch.linalg.eigh(a), torch.linalg.eigh(b)
        if old_a is not None:
            # The covariance of the rotated gradient, diagonal in the old bases, in the new ones.
            rotation = torch.kron(old_b.T @ self.u_b, old_a.T @ self.u_a)
            covariance = rotation.T @ self.rotated_v.flatten().diag() @ rotation
            self.rotated_v = covariance.diagonal().reshape(self.w.shape)

    def precondition(self, m: Tensor, g: Tensor) -> Tensor:
        scaling = self.config["scaling"]
        rotated = self.u_b.T @ m @ self.u_a
        if scaling == "second_moment":
            self.rotations += 1
            self.rotated_v = BETA2 * self.rotated_v + (1 - BETA2) * (self.u_b.T @ g @ self.u_a) ** 2
            v = self.rotated_v / (1 - BETA2**self.rotations)
            rotated = rotated / (v + DAMPING * v.mean()).sqrt()
        else:
            power = {"root": -0.5, "power": -0.75, "inverse": -1.0}[scaling]
            rotated = rotated * torch.outer(self.values_b, self.values_a) ** power
        return self.u_b @ rotated @ self.u_a.T

    def step(self, t: int, g: Tensor, a: Tensor, b: Tensor) -> None:
        every, refresh = self.config["factor_interval"], self.config["refresh_interval"]
        initial = self.config["initial_statistics"]
        if t % every == 0 or t < initial:
            self.a, self.b = (DECAY * old + (1 - DECAY) * new for old, new in ((self.a, a), (self.b, b)))
            self.weight = DECAY * self.weight + 1 - DECAY
            self.batches += 1
            young = t < refresh or t < initial
            if self.config["initial_refreshes"] == "doubling" and young:
                due = self.batches in (1, 2, 4, 8, 16) or (t % refresh == 0 and t >= initial)
            else:
                due = young or t % refresh == 0
            if due:
                self.refresh()
        t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g**2
        m = (BETA1 * self.m + (1 - BETA1) * g) / (1 - BETA1**t)
        direction = self.precondition(m, g)
        if self.config["grafting"]:
            adam = m / ((self.v / (1 - BETA2**t)).sqrt() + EPS)
            direction = direction * adam.norm() / direction.norm()
        self.w = (1 - LR * 0.1) * self.w - LR * direction


@pytest.mark.parametrize("intervals", [(1, 1, 0), (1, 3, 1), (2, 4, 1), (2, 4, 3), (2, 4, 6), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("grafting", [True, False], ids=["grafted", "plain"])
@pytest.mark.parametrize("scaling", ["root", "power", "inverse", "second_moment"])
def test_trajectory(scaling: str, grafting: bool, intervals: tuple[int, int, int]) -> None:
    config = {
        "scaling": scaling,
        "grafting": grafting,
        "factor_interval": intervals[0],
        "refresh_interval": intervals[1],
        "initial_statistics": intervals[2],
        "initial_refreshes": "every" if grafting else "doubling",
    }
    net = nn.Sequential(nn.Linear(3, 2))
    optimizer = KFAC(
        net,
        approximation="reduce",
        learning_rate=LR,
        one_minus_beta1=1 - BETA1,
        beta2=BETA2,
        weight_decay=0.1,
        factor_decay=DECAY,
        damping=DAMPING,
        power=0.75,
        **config,
    )
    reference = Reference(torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach(), config)
    for t, x in enumerate(torch.randn(STEPS, 5, 2, 3)):
        pair = empirical_factors(net, x, loss, "reduce", loss_normalizer=None, reduction="mean")["0"]
        optimizer.zero_grad()
        with optimizer.capture():
            loss(net(x)).backward()
        g = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
        reference.step(t, g, pair.A, pair.B)
        optimizer.step()
        w = torch.cat([net[0].weight, net[0].bias[:, None]], 1)
        torch.testing.assert_close(w, reference.w, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_averages_have_their_closed_form(decay: float) -> None:
    """A_T = sum_t decay^(T-1-t) A_t / sum_t decay^(T-1-t): no trace of a start at zero or at the identity."""
    net = nn.Sequential(nn.Linear(3, 2))
    optimizer = KFAC(net, learning_rate=0.0, factor_interval=1, refresh_interval=1, factor_decay=decay)
    seen = []
    for x in torch.randn(6, 5, 2, 3):
        seen.append(empirical_factors(net, x, loss, "expand", loss_normalizer=None, reduction="mean")["0"])
        with optimizer.capture():
            loss(net(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = [decay**age for age in reversed(range(len(seen)))]
        for got, factors in zip(optimizer.factors(reduction="mean")["0"], zip(*seen, strict=True), strict=True):
            expected = sum(w * m for w, m in zip(weights, factors, strict=True)) / sum(weights)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("initial", "expected"),
    [
        (0, [False, False, True, True, False]),
        (1, [False, False, True, True, False]),
        (2, [True, False, True, True, False]),
        (4, [True, True, True, True, False]),
    ],
)
def test_intervals_decide_which_batches_count(initial: int, expected: list[bool]) -> None:
    """Steps between statistics steps leave the averages alone; a forced capture is taken."""
    net = nn.Sequential(nn.Linear(3, 2))
    optimizer = KFAC(net, learning_rate=0.0, factor_interval=3, refresh_interval=3, initial_statistics=initial)
    kept = []
    for t, x in enumerate(torch.randn(6, 5, 2, 3)):
        with optimizer.capture(force=t == 4):
            loss(net(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(optimizer.factors()["0"].A)
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(kept)]
    assert changed == expected
