"""Sums over whole matrices as dot products.

XLA compiles each reduction on a CPU into a loop of its own, at some 30 ms for each layer shape and place in the
program; a dot product is a call.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def dots(x: Array, y: Array) -> Array:
    """(n, ...), (n, ...) -> (n,): the sums of x y, not in the narrower precision that devices take for products."""
    return jnp.einsum("ni,ni->n", _rows(x), _rows(y), precision=lax.Precision.HIGHEST)


def norms(x: Array) -> Array:
    """(n, ...) -> (n,): Frobenius norms."""
    return jnp.sqrt(dots(x, x))


def long_norms(x: Array) -> Array:
    """(n, ...) -> (n,): Frobenius norms of what may be so long that the squares of its entries overflow.

    NaN where the sum of the entries' sizes overflows, too.
    """
    scale = scales(x)
    return scale * norms(_rows(x) / scale[:, None])


def scales(x: Array) -> Array:
    """(n, ...) -> (n,): the sums of the entries' sizes, more than zero."""
    sizes = jnp.abs(_rows(x))
    return jnp.maximum(dots(sizes, jnp.ones_like(sizes)), jnp.finfo(x.dtype).tiny)


def traces(m: Array) -> Array:
    """(..., size, size) -> (...)."""
    return m.reshape(*m.shape[:-2], -1)[..., :: m.shape[-1] + 1].sum(-1)


def are_finite(x: Array) -> Array:
    """(n, ...) -> (n,): whether the entries are finite, and their sum."""
    return jnp.isfinite(dots(x, jnp.ones_like(x)))


def _rows(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)
