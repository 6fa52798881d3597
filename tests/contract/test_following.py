"""Bases that follow the factors by one step of orthogonal iteration (decomposition="qr"), against numpy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from algoperf_kfac.jax import decompositions
from tests.contract.frameworks import EVERY_STEP, NAMES, Run, positions, start
from tests.contract.models import normal, perceptron

IN, OUT, EXAMPLES = 6, 4, 40
LEARNING_RATE, DAMPING, POWER = 1e-6, 1e-3, 0.75
X = normal(EXAMPLES, IN) * np.geomspace(3, 0.3, IN)
# The first step sees other examples than those that follow, so that its bases are not those of the later factors.
FIRST = positions(np.arange(EXAMPLES) < EXAMPLES // 2)
OPTIONS = {
    **EVERY_STEP,
    "learning_rate": LEARNING_RATE,
    "one_minus_beta1": 1.0,
    "damping": DAMPING,
    "power": POWER,
    "length": "none",
    "factor_decay": 0.0,
    "noise_floor": 0.0,
    "initial_refreshes": "every",
}


def started(framework: str, decomposition: str = "qr", **options: Any) -> Run:
    model = perceptron((IN, OUT), X, bias=False)
    return start(framework, model, dtype="float64", **OPTIONS | {"decomposition": decomposition} | options)


def weight(run: Run) -> np.ndarray:
    """(P_out, P_in), whatever the framework's order."""
    (w,) = run.parameters()
    return w if w.shape == (OUT, IN) else w.T


def step(run: Run, seen: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of a step, and its direction at norm 1, (P_out, P_in) each."""
    before = weight(run).copy()
    run.step(1.0, seen)
    direction = before - weight(run)
    return 2 * (X @ before.T - 0.3).T @ X, direction / np.linalg.norm(direction)


def damped(m: np.ndarray) -> np.ndarray:
    return m + DAMPING * np.trace(m) / len(m) * np.eye(len(m))


def preconditioned(gradient: np.ndarray, a: Any, b: Any) -> np.ndarray:
    """B^-p G A^-p at norm 1, from pairs of eigenvalues and bases."""
    (a_values, a_basis), (b_values, b_basis) = a, b
    rotated = b_basis.T @ gradient @ a_basis * a_values**-POWER * b_values[:, None] ** -POWER
    direction = b_basis @ rotated @ a_basis.T
    return direction / np.linalg.norm(direction)


def followed(m: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new = np.linalg.qr(m @ basis)[0]
    return np.einsum("ij,ij->j", new, m @ new), new


@pytest.mark.parametrize("framework", NAMES)
def test_two_steps_by_hand(framework: str) -> None:
    """The first refresh decomposes; each that follows takes one step from the bases before, largest value first."""
    run = started(framework)
    gradient, direction = step(run, FIRST)
    first = [np.array(m) for m in run.factors()["l0"]]
    a, b = (np.linalg.eigh(damped(m)) for m in first)
    np.testing.assert_allclose(direction, preconditioned(gradient, a, b), atol=1e-8)
    bases = [basis[:, ::-1] for _, basis in (a, b)]
    for _ in range(2):
        gradient, direction = step(run)
        a, b = (followed(damped(np.array(m)), q) for m, q in zip(run.factors()["l0"], bases, strict=True))
        np.testing.assert_allclose(direction, preconditioned(gradient, a, b), atol=1e-8)
        bases = [q[:, np.argsort(-values)] for values, q in (a, b)]
    assert run.metrics()["l0/refreshes"] == 3
    assert run.metrics()["failures"] == 0


@pytest.mark.parametrize("framework", NAMES)
def test_bases_reach_those_of_factors_that_stay(framework: str) -> None:
    follows, decomposes = started(framework), started(framework, "eigh")
    differences = []
    for number in range(60):
        seen = FIRST if number == 0 else None
        (_, ours), (_, theirs) = step(follows, seen), step(decomposes, seen)
        differences.append(np.abs(ours - theirs).max())
    assert differences[0] < 1e-8  # the first refresh decomposes
    assert differences[1] > 1e-2
    assert differences[-1] < 1e-3


@pytest.mark.parametrize("framework", NAMES)
def test_what_does_not_follow_is_decomposed(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of iteration that is not finite is counted, and the factors are decomposed as they are."""
    qr = decompositions.qr  # by name here: what JAX traced of one function is kept for the next optimizer
    monkeypatch.setattr(decompositions, "qr", lambda pairs: tuple(part * jnp.nan for part in qr(pairs)))
    householder = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda m: [part * torch.nan for part in householder(m)])
    fails, decomposes = started(framework), started(framework, "eigh")
    for number in range(3):
        seen = FIRST if number == 0 else None
        (_, ours), (_, theirs) = step(fails, seen), step(decomposes, seen)
        np.testing.assert_allclose(ours, theirs, atol=1e-8)
    assert fails.metrics()["l0/failures"] == 2
    assert fails.metrics()["l0/refreshes"] == 3


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("scaling", ["power", "polar", "second_moment"])
def test_every_scaling_keeps_what_it_follows_from(framework: str, scaling: str) -> None:
    run = started(framework, scaling=scaling)
    for _ in range(3):
        step(run)
    assert run.metrics()["l0/refreshes"] == 3
    assert all(np.isfinite(p).all() for p in run.parameters())
