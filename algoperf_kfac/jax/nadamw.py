"""NadamW's direction in JAX: pure functions over pytrees, and an optax transformation made of them.

K-FAC takes `nesterov` and `nadamw_directions` for its fallback parameters and for grafting, so that both optimizers
differ in the direction alone. The formulas are those of `algoperf_kfac.pytorch.nadamw`. Weight decay and the
learning rate are the caller's: p <- (1 - lr * weight_decay) p - lr * direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from algoperf_kfac.jax.trained import zeros_like
from algoperf_kfac.jax.types import Tree


class ScaleByNadamwState(NamedTuple):
    """State of `scale_by_nadamw`.

    Attributes:
        count: updates made so far, int32 ().
        mu: first moments, shapes of the parameters.
        nu: second moments, shapes of the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    mu: Tree
    nu: Tree


def nesterov(grads: Tree, mu: Tree, count: jax.Array | int, beta1: float) -> tuple[Tree, Tree]:
    """The new first moments and the bias-corrected look-ahead momentum m_hat.

    m <- beta1 m + (1 - beta1) g,  m_hat = (beta1 m + (1 - beta1) g) / (1 - beta1^count)  (Dozat 2016).

    Args:
        grads: gradients g.
        mu: first moments m, shapes of `grads`.
        count: number of this update, from 1; may be traced.
        beta1: decay of the first moment, in [0, 1).
    """
    mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, mu, grads)
    correction = _bias_correction(beta1, count)
    m_hat = jax.tree.map(lambda m, g: (beta1 * m + (1 - beta1) * g) / correction, mu, grads)
    return mu, m_hat


def nadamw_directions(
    grads: Tree, m_hat: Tree, nu: Tree, count: jax.Array | int, beta2: float, eps: float
) -> tuple[Tree, Tree]:
    """The new second moments and the directions m_hat / (sqrt(v_hat) + eps).

    v <- beta2 v + (1 - beta2) g^2,  v_hat = v / (1 - beta2^count)  (Kingma and Ba 2015).

    Args:
        grads: gradients g.
        m_hat: momenta as `nesterov` returns them, shapes of `grads`.
        nu: second moments v, shapes of `grads`.
        count: number of this update, from 1; may be traced.
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment; at least the least normal number of its type, as what float16
            rounds to zero would be divided by.
    """

    def direction(m: jax.Array, v: jax.Array) -> jax.Array:
        return m / (jnp.sqrt(v) / root + max(eps, float(jnp.finfo(v.dtype).tiny)))

    nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, nu, grads)
    root = jnp.sqrt(_bias_correction(beta2, count))
    return nu, jax.tree.map(direction, m_hat, nu)


def scale_by_nadamw(one_minus_beta1: float, beta2: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """Replaces gradients by NadamW's directions, without learning rate, sign and weight decay.

    Args:
        one_minus_beta1: 1 - decay of the first moment, in (0, 1].
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.

    Raises:
        ValueError: if a value is outside its range.
    """
    if not 0 < one_minus_beta1 <= 1:
        raise ValueError(f"one_minus_beta1 must lie in (0, 1], got {one_minus_beta1}")
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 must lie in [0, 1), got {beta2}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    beta1 = 1.0 - one_minus_beta1

    def init(params: Tree) -> ScaleByNadamwState:
        return ScaleByNadamwState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(zeros_like, params),
            nu=jax.tree.map(zeros_like, params),
        )

    def update(
        updates: Tree, state: ScaleByNadamwState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByNadamwState]:
        del params
        count = state.count + 1
        mu, m_hat = nesterov(updates, state.mu, count, beta1)
        nu, directions = nadamw_directions(updates, m_hat, state.nu, count, beta2, eps)
        return directions, ScaleByNadamwState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _bias_correction(beta: float, count: jax.Array | int) -> jax.Array:
    """1 - beta^count. In float32 the plain formula would lose four digits for beta near 1 and small counts."""
    if beta == 0:
        return jnp.ones(())
    return -jnp.expm1(count * math.log(beta))
