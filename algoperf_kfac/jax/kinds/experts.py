"""Experts: one parameter with a weight for each, of which every row takes one (`jax.lax.ragged_dot`).

Rows come sorted by expert, with the number of rows of each. Every expert is a layer of its own, whose factors are
those of its rows; one without rows keeps them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn
from jax.typing import DTypeLike

from algoperf_kfac.jax import statistics
from algoperf_kfac.jax.factors import Reading, outer_sums
from algoperf_kfac.jax.kinds._base import Kind
from algoperf_kfac.jax.operations import Call, Read, WeightView, shape_of
from algoperf_kfac.jax.sharding import replicated
from algoperf_kfac.jax.sources import Source, is_data
from algoperf_kfac.jax.statistics import LayerSums, Product, Statistics, Tap
from algoperf_kfac.layers import LayerSpec

NAME = "experts"
Residuals: TypeAlias = tuple[Array, Reading]


def read_ragged_dot(eqn: JaxprEqn, tags: Sequence[object]) -> Read | None:
    """Rows (M, P_in) times a weight (experts, P_in, P_out); None for other ragged products."""
    weight, x_shape, weight_shape = tags[1], *map(shape_of, eqn.invars[:2])
    if not isinstance(weight, Source) or not is_data(tags[0]) or weight.is_broadcast:
        return None
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is not None:
        contracted, batched = numbers.dot_dimension_numbers
        found = (*contracted, *batched, numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions)
        if [list(dims) for dims in found] != [[1], [1], [], [], [0], [0]]:
            return None
    experts, in_dim, out_dim = weight_shape
    scans = weight.scans
    slices = 1
    for size in weight.scanned_sizes:
        slices *= size
    permutation = (*range(scans), *(scans + d for d in (0, 2, 1)))
    view = WeightView(weight, permutation, slices * experts, out_dim, in_dim)
    return Read(Call(NAME, view, x_shape[:1], experts, (0, 1), (0, 1)), 0, prepare=_with_experts)


def _with_experts(operands: Sequence[Array]) -> Array:
    """(M, P_in + 1): the rows, with the number of each one's expert as last column."""
    rows, _, sizes = operands
    numbers = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    # In a type that holds the numbers of all experts there may be.
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return jnp.concatenate([rows, numbers[:, None].astype(rows.dtype)], 1)


class Experts(Kind[LayerSums]):
    """Expand or reduce, expert by expert."""

    names = frozenset({NAME})
    rules = {"ragged_dot": read_ragged_dot, "ragged_dot_general": read_ragged_dot}  # noqa: RUF012  # as declared
    has_bias = False
    by_row = True

    def slices(self, view: WeightView) -> int:
        return view.groups

    def zeros(self, spec: LayerSpec, slices: int, reading: Reading, dtype: DTypeLike) -> LayerSums:
        return statistics.zeros(spec, slices, reading, dtype)

    def tap(self, tap: Tap, out: Array, x: Array, reading: Reading, sums: LayerSums) -> Array:
        return tap_experts(tap, out, x, reading, sums)

    def product(self, tap: Tap, x: Array, gradient: Array) -> Product:
        call = tap.use
        assert isinstance(call, Call)
        member = (x[:, -1:] == jnp.arange(call.groups)).astype(tap.dtype)[:, :, None]
        g, a = gradient.astype(tap.dtype)[:, None] * member, x[:, None, :-1].astype(tap.dtype) * member
        return statistics.multiplied(g, a)

    def finalise(self, spec: LayerSpec, sums: LayerSums, reading: Reading, scale: Array | float) -> Statistics:
        return statistics.finalise(spec, sums, reading, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_experts(static: Tap, out: Array, x: Array, reading: Reading, sums: LayerSums) -> Array:
    """The output, unchanged; arguments as for `statistics.tap`, `x` from `_with_experts`."""
    return out


def _forward(static: Tap, out: Array, x: Array, reading: Reading, sums: LayerSums) -> tuple[Array, Residuals]:
    return out, (x, reading)


def _backward(static: Tap, residuals: Residuals, gradient: Array) -> tuple[Array, None, None, LayerSums]:
    static.on_backward(static.spec.name)
    return gradient, None, None, replicated(functools.partial(_sums, static), *residuals, gradient)


def _sums(static: Tap, x: Array, reading: Reading, gradient: Array) -> LayerSums:
    """What a call adds to the sums, expert by expert."""
    spec, call = static.spec, static.use
    assert isinstance(call, Call)
    rows = reading.rows(gradient.astype(static.dtype)[:, None])  # (M, 1, 1, P_out)
    reading = reading.of_gradients(rows)
    inputs = reading.rows(x[:, None, :-1].astype(static.dtype))
    member = (x[:, -1:] == jnp.arange(call.groups)).astype(static.dtype)  # (M, experts)
    rows, inputs = (t * member[:, None, :, None] for t in (rows, inputs))
    valid = member if reading.mask is None else member * reading.mask
    counts = reading.placed(reading.sum_rows(valid)).T
    if spec.approximation == "reduce":
        sums = [jnp.moveaxis(reading.placed(reading.sum_positions(t)), 1, 0) for t in (inputs, rows)]
        return LayerSums((sums[0],), (sums[1],), counts)
    a, b = (
        outer_sums(reading.expanded(t), None, blocks)
        for t, blocks in ((inputs, spec.in_blocks), (rows, spec.out_blocks))
    )
    return LayerSums(a, b, counts)


tap_experts.defvjp(_forward, _backward)
