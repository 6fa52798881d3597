"""The controls of the experiments differ from the submission in what they say, and in nothing else."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState, damping_terms
from algoperf_kfac.pytorch.scalings import polar

CONFIG = KFACConfig(scaling="polar", factor_decay=0.9, factor_interval=1, refresh_interval=1)
SPEC = LayerSpec("layer", "linear", "weight", None, (5, 4), 1, 4, 5, "expand", (4,), (5,))


def control(name: str) -> polar.Scaling:
    return importlib.import_module(f"benchmarks.experiments.objects.{name}").DESCRIPTION.defaults["scaling"](CONFIG)


def state_of(a: torch.Tensor, b: torch.Tensor, kept=None) -> LayerState:
    state = LayerState.zeros(SPEC, a, kept or {})
    (state.a_values, state.a_basis), (state.b_values, state.b_basis) = (
        [[part] for part in torch.linalg.eigh(m[None])] for m in (a, b)
    )
    return state


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, g = draw(40, 4), draw(40, 5)
    return x.T @ x / 40, g.T @ g / 40, draw(1, 5, 4)


def power(m: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.pow(exponent) @ vectors.T


def written_out(a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The polar scaling in dense matrices, not in eigenbases."""
    q = CONFIG.polar_exponent
    whitened = power(b, -0.5) @ m[0] @ power(a, -0.5)
    return (power(b, -q) @ polar.polar(whitened[None], CONFIG.polar_steps)[0] @ power(a, -q))[None]


@pytest.mark.parametrize(
    ("name", "of_a", "of_b"),
    [
        ("only_a", lambda a: a, lambda b: torch.eye(5).double()),
        ("only_b", lambda a: torch.eye(4).double(), lambda b: b),
        ("no_factors", lambda a: torch.eye(4).double(), lambda b: torch.eye(5).double()),
        ("diagonal", lambda a: a.diagonal().diag(), lambda b: b.diagonal().diag()),
    ],
)
def test_a_control_takes_other_factors(factors, name, of_a, of_b):
    a, b, m = factors
    found = control(name).precondition(state_of(a, b), m, m, 0.99)
    assert torch.allclose(found, written_out(of_a(a), of_b(b), m))
    assert not torch.allclose(found, written_out(a, b, m), rtol=0.01)


def test_random_bases_keep_the_eigenvalues(factors):
    a, b, m = factors
    scaling, state = control("random_basis"), state_of(a, b)
    found = scaling.precondition(state, m, m, 0.99)
    assert torch.equal(found, scaling.precondition(state, m, m, 0.99))
    assert not torch.allclose(found, written_out(a, b, m), rtol=0.01)
    assert torch.allclose(state.a_basis[0][0] * state.a_values[0][0] @ state.a_basis[0][0].T, a)


def test_the_gradients_own_factors_are_their_corrected_averages(factors):
    a, b, m = factors
    scaling = control("gradient_basis")
    state = state_of(a, b, scaling.keeps(SPEC, a))
    gradients = [m, m.flip(1), 2 * m.flip(2)]
    for grad in gradients:
        found = scaling.precondition(state, m, grad, 0.99)
    weights = [0.1 * 0.9**age for age in (2, 1, 0)]
    of_a = sum(w * g[0].T @ g[0] for w, g in zip(weights, gradients, strict=True)) / sum(weights)
    of_b = sum(w * g[0] @ g[0].T for w, g in zip(weights, gradients, strict=True)) / sum(weights)
    damping = damping_terms([of_a[None]], [of_b[None]], CONFIG, state.noise_level(CONFIG))
    expected = written_out(of_a + damping[0] * torch.eye(4), of_b + damping[1] * torch.eye(5), m)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_the_submission_is_otherwise_the_same():
    from submissions.kfac_expand import DESCRIPTION

    for name in ("only_a", "only_b", "no_factors", "diagonal", "random_basis", "gradient_basis"):
        described = importlib.import_module(f"benchmarks.experiments.objects.{name}").DESCRIPTION
        same = {key: value for key, value in described.defaults.items() if key != "scaling"}
        assert same == {key: value for key, value in DESCRIPTION.defaults.items() if key != "scaling"}
        assert dataclasses.replace(described, defaults=DESCRIPTION.defaults) == DESCRIPTION
