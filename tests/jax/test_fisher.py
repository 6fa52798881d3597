"""The Fisher of every loss, exact and sampled, against Hessians of the outputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from algoperf_kfac.jax import KFAC
from algoperf_kfac.jax.fisher import sampled_loss
from tests.jax.support import LOSSES, fisher_factors, normal


def linear(p: Any, x: Array) -> Array:
    return x @ p["w"]


def output_hessian(loss: str, f: Array) -> Array:
    """(N, C, C) of a loss summed over examples."""
    return jax.vmap(jax.hessian(LOSSES[loss]))(f)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_fisher_of_every_loss(loss: str) -> None:
    """For one layer B is the summed output Hessian: "exact" equals it, "mc" converges to it as 1/sqrt(samples)."""
    params, x = {"w": normal(0, 4, 3)}, normal(1, 5, 4)
    want = output_hessian(loss, linear(params, x)).sum(0)
    exact = fisher_factors(linear, params, x, loss, "expand")["w"]
    np.testing.assert_allclose(exact.B, want, atol=1e-10)
    errors = []
    for samples in (4, 1600):
        pair = fisher_factors(
            linear, params, x, loss, "expand", fisher="mc", fisher_samples=samples, rng=jax.random.key(1)
        )["w"]
        np.testing.assert_allclose(pair.A, exact.A, rtol=1e-10)
        errors.append(float(jnp.linalg.norm(pair.B - want) / jnp.linalg.norm(want)))
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_masked_outputs_have_no_fisher(fisher: str) -> None:
    params, x = {"w": normal(0, 4, 3)}, normal(1, 5, 4)
    mask = jnp.array([1.0, 0, 1, 1, 0])
    ours = KFAC(
        linear, lambda f, x: LOSSES["softmax_cross_entropy"](f), params, x,
        fisher=fisher, fisher_samples=800, loss_type="softmax_cross_entropy",
    )  # fmt: skip
    run = jax.jit(lambda p, x: ours.value_grad_and_statistics(p, x, loss_mask=mask, rng=jax.random.key(0))[2])
    statistics = run(params, x)["w"]
    want = output_hessian("softmax_cross_entropy", linear(params, x[mask > 0])).sum(0)
    np.testing.assert_allclose(statistics.b[0][0], want, rtol=1e-9 if fisher == "exact" else 0.15, atol=0.05)


def test_ctc() -> None:
    """Sampled label sequences: the mean score vanishes, as that of any likelihood does, paddings have none."""
    logits, paddings = {"w": normal(0, 3, 4)}, jnp.array([[0.0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    x = normal(1, 2, 5, 3)

    def apply(p: Any, x: Array) -> Any:
        return x @ p["w"], paddings

    def score(key: Array) -> Array:
        return jax.grad(lambda f: sampled_loss((f, paddings), "ctc_loss", None, key))(x @ logits["w"])

    scores = jax.jit(jax.vmap(score))(jax.random.split(jax.random.key(0), 4000))
    deviation = scores.std(0) / 4000**0.5
    assert bool((jnp.abs(scores.mean(0)) <= 5 * deviation + 1e-12).all())
    assert not scores[:, 1, 3:].any()
    assert bool((scores.std(0)[0] > 0.01).all())
    ours = KFAC(apply, lambda f, x: f[0].sum(), logits, x, fisher="mc", loss_type="ctc_loss")
    _, _, statistics = jax.jit(lambda p, x: ours.value_grad_and_statistics(p, x, rng=jax.random.key(0)))(logits, x)
    assert bool(jnp.isfinite(statistics["w"].b[0]).all())
