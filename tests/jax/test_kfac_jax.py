"""Factors against kfac-jax, an independent implementation, where the conventions coincide.

Its factors are of the loss averaged over the batch; a repeated dense layer is what is called expand here (all
positions are rows). How it splits a scale between A and B differs, so their product is compared, with the exact
Fisher (all columns of the output Hessian's root).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import pytest
from jax import Array, lax

from algoperf_kfac.jax import KFAC
from tests.jax.support import normal, observe


def dense(p: Any, x: Array) -> Array:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def repeated(p: Any, x: Array) -> Array:
    return jnp.tanh(x @ p["w"] + p["b"]).mean(1) @ p["v"]


def convolution(p: Any, x: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=numbers) + p["b"]
    return jnp.tanh(h).mean((1, 2)) @ p["v"]


CASES: dict[str, tuple[Callable[..., Array], tuple[int, ...], tuple[int, ...]]] = {
    "dense": (dense, (4, 3), (6, 4)),
    "repeated": (repeated, (4, 3), (6, 5, 4)),
    "convolution": (convolution, (3, 3, 2, 3), (6, 5, 4, 2)),
}


def theirs(apply: Callable[..., Array], p: Any, x: Array, y: Array) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """A, B and what their product is scaled by, for each layer: first the one with more parameters."""

    def loss(p: Any, x: Array, y: Array) -> Array:
        f = apply(p, x)
        kfac_jax.register_squared_error_loss(f, y)
        return jnp.square(f - y).sum()

    estimator = kfac_jax.BlockDiagonalCurvature(loss)
    state = estimator.init(
        rng=jax.random.PRNGKey(0), func_args=(p, x, y), exact_powers_to_cache=None, approx_powers_to_cache=None
    )
    state = estimator.update_curvature_matrix_estimate(
        state, ema_old=0.0, ema_new=1.0, identity_weight=0.0, batch_size=len(x), rng=jax.random.PRNGKey(1),
        func_args=(p, x, y), estimation_mode="fisher_exact",
    )  # fmt: skip
    blocks = sorted(
        zip(estimator.blocks, state.blocks_states, strict=True), key=lambda pair: -pair[0].number_of_parameters
    )
    return [
        (*(np.asarray(factor.value) for factor in own.factors), float(block.scale(own, use_cache=False)))
        for block, own in blocks
    ]


@pytest.mark.parametrize("case", CASES)
def test_factors(case: str) -> None:
    apply, shape, size = CASES[case]
    p = {"w": normal(0, *shape), "b": normal(1, 3), "v": normal(2, 3, 2)}
    x, y = normal(3, *size), normal(4, size[0], 2)
    ours = KFAC(
        apply, lambda f, x: jnp.square(f - y).sum() / len(x), p, x, fisher="exact", loss_type="mean_squared_error"
    )
    _, pairs = observe(ours, p, x)
    blocks = theirs(apply, p, x, y)
    for name, (their_a, their_b, scale) in zip(("w", "v"), blocks, strict=True):
        a, b = (np.asarray(m) for m in pairs[name])
        if case == "convolution" and name == "w":
            # Kernel positions before channels there; channels before kernel positions here.
            order = [*np.arange(18).reshape(2, 9).T.reshape(-1), 18]
            a = a[np.ix_(order, order)]
        expected = np.kron(b, a) / len(x)
        np.testing.assert_allclose(scale * np.kron(their_b, their_a), expected, rtol=1e-8, atol=1e-10)
