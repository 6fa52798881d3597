"""Sums over whole matrices as dot products.

XLA compiles each reduction on a CPU into a loop of its own, at some 30 ms for each layer shape and place in the
program; a dot product is a call. What is done once or more for every stack of layers is written in primitives: a
function of jax.numpy takes a millisecond to trace, a primitive a tenth of that.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MANY = 4096


def dots(x: Array, y: Array) -> Array:
    """(n, ...), (n, ...) -> (n,): the sums of x y, not in the narrower precision that devices take for products."""
    dims = (((1,), (1,)), ((0,), (0,)))
    return lax.dot_general(_rows(x), _rows(y), dims, precision=lax.Precision.HIGHEST)


def squares(rows: Array) -> Array:
    """(..., P) -> (...): squared norms of the rows, which are read where they are.

    Squared entries would be as many as the rows'; and rows in another shape than the model's own products take them
    in are a copy.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    return dots(flat, flat).reshape(rows.shape[:-1])


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


def nonzero(divisors: Array) -> Array:
    """The same with 1 for 0, where the quotient is of no meaning: 0 / 0 would stop a run under `jax_debug_nans`,
    even if it is selected away afterwards."""
    return jnp.where(divisors == 0, 1, divisors)


def traces(m: Array) -> Array:
    """(..., size, size) -> (...)."""
    return m.reshape(*m.shape[:-2], -1)[..., :: m.shape[-1] + 1].sum(-1)


def are_finite(x: Array) -> Array:
    """(n, ...) -> (n,): whether the entries are finite, and their sum."""
    return jnp.isfinite(dots(x, jnp.ones_like(x)))


def any_nonzero(x: Array, dims: int) -> Array:
    """Whether an entry along the last so many dimensions is not zero; NaN is not.

    Of many entries by the largest and the smallest one: XLA on a CPU keeps an array of truth values, a quarter of
    the memory of the numbers. Of few by one reduction, as each takes time to compile.
    """
    shape = x.shape[: x.ndim - dims]
    flat = x.reshape(math.prod(shape), -1)  # as in `squares`
    if flat.shape[1] < MANY:
        return (flat != 0).any(1).reshape(shape)
    return ((flat.max(1) != 0) | (flat.min(1) != 0)).reshape(shape)


def by_block(function: Callable[[Array], Array], rows: Array, blocks: Sequence[int]) -> list[Array]:
    """The function of each block of features of (..., P), one after the other; none for no blocks.

    Blocks of one size take turns in a loop: left to itself, XLA on a CPU copies all blocks out of the array before
    it reads the first, as much memory as the array, and barriers do not keep it from that.
    """
    found: list[Array] = []
    start = 0
    for size, alike in itertools.groupby(blocks):
        starts = start + size * np.arange(len(list(alike)))
        start = int(starts[-1]) + size
        if len(starts) == 1:
            found.append(function(rows[..., starts[0] : start]))
        else:
            taken = functools.partial(lax.dynamic_slice_in_dim, rows, slice_size=size, axis=-1)
            found.extend(lax.map(lambda at, taken=taken: function(taken(at)), starts))
    return found


def take(x: Array, numbers: Array) -> Array:
    """(n, ...), (k,) -> (k, ...): the entries of these numbers, all of which there are."""
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, x.ndim)), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    inside = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(x, numbers[:, None], dims, (1, *x.shape[1:]), mode=inside)


def _rows(x: Array) -> Array:
    return lax.reshape(x, (x.shape[0], math.prod(x.shape[1:])))
