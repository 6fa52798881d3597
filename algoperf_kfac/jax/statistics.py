"""One layer's statistics, gathered in the backward pass: no activation is kept that the gradient does not need.

A weighted operation's output goes through `tap`, the identity, whose backward pass sees input and output gradient
together. What it makes of them leaves the backward pass as the gradient of the layer's sums, zeros that nothing
depends on: gradients add up over calls, micro-batches and loop turns, and so do they.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax.factors import Reading, grouped_outer_sums, outer_sums
from algoperf_kfac.jax.operations import Call, Use
from algoperf_kfac.jax.sharding import replicated
from algoperf_kfac.jax.vanishing import block_squares, without_vanishing
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.vanishing import largest_share


class Statistics(NamedTuple):
    """What one or more backward passes gathered for one layer, as sums.

    Attributes:
        a: sums of input outer products, a (groups, b, b) matrix per block of A.
        b: sums of output-gradient outer products of the per-example loss, per block of B.
        a_count: what `a` is divided by: valid positions (expand) or examples (reduce), a scalar or (groups,).
        examples: what `b` is divided by, a scalar or (groups,).
        vanished: share of the output features whose sums of gradients vanish, times examples, mean of groups, ().
    """

    a: tuple[Array, ...]
    b: tuple[Array, ...]
    a_count: Array
    examples: Array
    vanished: Array


@jax.tree_util.register_pytree_with_keys_class
class Gathered(dict[str, Statistics]):
    """The statistics of a batch by layer; a pytree.

    Args:
        statistics: of the layers that were called.
        idle: names of those that were not.
    """

    def __init__(self, statistics: Mapping[str, Statistics], idle: Iterable[str] = ()) -> None:
        super().__init__(statistics)
        self.idle = tuple(sorted(idle))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = sorted(self)
        return tuple((jax.tree_util.DictKey(name), self[name]) for name in names), (tuple(names), self.idle)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Gathered:
        names, idle = static
        return cls(dict(zip(names, children, strict=True)), idle)


class LayerSums(NamedTuple):
    """What a layer collects in a backward pass, `groups` over scanned layers and channel groups.

    Attributes:
        inputs: expand: outer products, (groups, b, b) per block; reduce: one (groups, examples, P_in), of the
            examples that it chooses.
        gradients: the same of the output gradients.
        counts: (slices, examples): positions that count; slices is the number of scanned layers.
        taken: (slices,): of expand with a part of the examples, positions that count in `inputs`, times the weight.
        squares: (groups, examples, blocks of B): squared norms of the output gradients, where vanishing sums are
            watched; and of these what rounding may leave.
    """

    inputs: tuple[Array, ...]
    gradients: tuple[Array, ...]
    counts: Array
    taken: Array | None = None
    squares: tuple[Array, Array] | None = None


class Product(NamedTuple):
    """What a layer's inputs and output gradients say of its weight's gradient, (groups, P_out, P_in [+ 1]).

    Attributes:
        total: sum_n sum_r g a^T, with the bias as last column.
        magnitude: sum_n sum_r |g| |a|^T, which rounding is relative to.
    """

    total: Array
    magnitude: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """What is static about a tapped use; one is like no other.

    Attributes:
        spec: the layer.
        use: the operation.
        dtype: of the sums.
        on_backward: told the layer's name when the backward pass comes by.
    """

    spec: LayerSpec
    use: Use
    dtype: DTypeLike
    on_backward: Callable[[str], None]


def zeros(spec: LayerSpec, slices: int, reading: Reading, dtype: DTypeLike) -> LayerSums:
    """See `kinds.Kind.zeros`."""
    chosen = reading.part(reading.subset(reduces=True)).total

    def side(sizes: tuple[int, ...], dim: int, *, reduces: bool) -> tuple[Array, ...]:
        if reduces:
            return (jnp.zeros((spec.groups, chosen, dim), dtype),)
        return tuple(jnp.zeros((spec.groups, size, size), dtype) for size in sizes)

    weighted = reading.limit is not None and not spec.reduces_inputs
    squares = jnp.zeros((spec.groups, chosen, len(spec.out_blocks)), dtype)
    return LayerSums(
        side(spec.in_blocks, spec.in_dim, reduces=spec.reduces_inputs),
        side(spec.out_blocks, spec.out_dim, reduces=spec.reduces_outputs),
        jnp.zeros((slices, reading.total), dtype),
        jnp.zeros((slices,), dtype) if weighted else None,
        (squares, squares) if spec.watches_sums else None,
    )


Residuals: TypeAlias = tuple[Array, Reading]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(static: Tap, out: Array, x: Array, reading: Reading, sums: LayerSums) -> Array:
    """The output of a weighted operation, unchanged.

    Args:
        static: the layer and the call.
        out: the output.
        x: the input.
        reading: how the call's rows are read.
        sums: the layer's, groups and slices of this call.
    """
    return out


def _forward(static: Tap, out: Array, x: Array, reading: Reading, sums: LayerSums) -> tuple[Array, Residuals]:
    return out, (x, reading)


def _backward(static: Tap, residuals: Residuals, gradient: Array) -> tuple[Array, None, None, LayerSums]:
    static.on_backward(static.spec.name)
    return gradient, None, None, replicated(functools.partial(_sums, static), *residuals, gradient)


tap.defvjp(_forward, _backward)


def _sums(static: Tap, x: Array, reading: Reading, gradient: Array) -> LayerSums:
    """The sums of one call from its input and output gradient."""
    spec, call = static.spec, static.use
    assert isinstance(call, Call)
    dtypes = [t.dtype for t in (x, gradient) if jnp.issubdtype(t.dtype, jnp.floating)]
    rows = reading.rows(call.outputs(gradient.astype(static.dtype)))
    reading = reading.of_gradients(rows)
    x = call.inputs(x.astype(static.dtype))
    x = reading.rows(x) if call.conv is None else x
    inputs, taken = _input_sums(spec, call, x, reading)
    gradients, squares = gradient_sums(spec, rows, reading, float(max(jnp.finfo(t).eps for t in dtypes)))
    return LayerSums(inputs, gradients, reading.placed(reading.counts(rows))[None], taken, squares)


def _input_sums(spec: LayerSpec, call: Call, x: Array, reading: Reading) -> tuple[tuple[Array, ...], Array | None]:
    """What a call adds to the sums of inputs, and the positions in them.

    Args:
        spec: the layer.
        call: the call.
        x: its inputs, (N, R, groups, P_in); of a convolution (N, C, *in_size).
        reading: how they are read.
    """
    chosen = reading.subset(reduces=spec.reduces_inputs)
    part, x = reading.part(chosen), x[chosen.slice]
    if spec.reduces_inputs:
        sums = part.sum_positions(x) if call.conv is None else part.sum_rows(call.conv.patch_sums(x, part.mask))
        return (jnp.moveaxis(part.placed(sums), 1, 0),), None
    x = x[:, chosen.of_rows] if call.conv is None else call.conv.patches(x, chosen.thinning)
    products = outer_sums(part.expanded(x), None if spec.bias is None else part.ones(x), spec.in_blocks)
    if reading.limit is None:
        return products, None
    return tuple(chosen.weight * m for m in products), chosen.weight * part.counts(x).sum()[None]


def gradient_sums(
    spec: LayerSpec, rows: Array, reading: Reading, eps: float
) -> tuple[tuple[Array, ...], tuple[Array, Array] | None]:
    """What a call adds to the sums of output gradients, and to their squares.

    Args:
        spec: the layer.
        rows: output gradients, (N, R, groups, P_out).
        reading: how they are read.
        eps: the coarsest rounding unit among the dtypes that inputs and output gradients came in.
    """
    chosen = reading.subset(reduces=spec.reduces_outputs)
    part = reading.for_gradients().part(chosen)
    rows = part.masked(rows[chosen.slice, chosen.of_rows])
    if not spec.reduces_outputs:
        sums = outer_sums(rows.reshape(-1, *rows.shape[2:]), None, spec.out_blocks)
        return sums if chosen.weight == 1 else tuple(chosen.weight * m for m in sums), None

    def summed(t: Array) -> Array:
        return jnp.moveaxis(part.placed(part.sum_rows(t)), 1, 0)

    if not spec.watches_sums:
        return (summed(rows.sum(1)),), None
    squares = summed(block_squares(rows, spec.out_blocks))
    return (summed(rows.sum(1)),), (squares, largest_share(eps) * squares)


def product(static: Tap, x: Array, gradient: Array) -> Product:
    """G^T A of one call: of all its positions, as those that do not count have no gradient."""
    call, spec = static.use, static.spec
    assert isinstance(call, Call)
    g = call.outputs(gradient.astype(static.dtype)).reshape(-1, call.groups, spec.out_dim)
    x = call.inputs(x.astype(static.dtype))
    a = (x if call.conv is None else call.conv.patches(x)).reshape(-1, call.groups, spec.in_dim)
    if spec.bias is not None:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:2], 1), a.dtype)], 2)
    return multiplied(g, a)


def multiplied(g: Array, a: Array) -> Product:
    """The product of output gradients (M, groups, P_out) and inputs (M, groups, P_in)."""

    def sums(g: Array, a: Array) -> Array:
        return jnp.einsum("mgi,mgj->gij", g, a, precision=jax.lax.Precision.HIGHEST)

    return Product(sums(g, a), sums(jnp.abs(g), jnp.abs(a)))


def finalise(spec: LayerSpec, sums: LayerSums, reading: Reading, scale: Array | float) -> Statistics:
    """Statistics of one backward pass from the sums of all calls in it.

    Args:
        spec: the layer.
        sums: what it collected.
        reading: how its calls are read.
        scale: what output gradients are multiplied by to belong to the summed, per-example loss.
    """
    valid = (sums.counts > 0).astype(sums.counts.dtype)  # (slices, examples)
    repeat = spec.groups // valid.shape[0]
    by_sum = reading.layout.readout == "sum"

    def per_group(t: Array) -> Array:
        return jnp.repeat(t, repeat, axis=0)

    counts, seen, weights = _of_chosen(sums.counts, valid, reading)
    divisor = per_group(jnp.maximum(counts, 1))[..., None]
    if not spec.reduces_inputs:
        a = sums.inputs
        a_count = sums.counts.sum(1) if sums.taken is None else sums.taken
    else:
        inputs = sums.inputs[0]  # (groups, examples, P_in)
        ones = counts if by_sum else seen
        if not by_sum:
            inputs = inputs / divisor
        if spec.bias is not None:
            inputs = jnp.concatenate([inputs, per_group(ones)[..., None]], 2)
        a = grouped_outer_sums(_weighted(inputs, weights), spec.in_blocks)
        a_count = seen.sum(1) if weights is None else (seen * weights).sum(1)
    examples = valid.sum(1)
    share = jnp.zeros((spec.groups,), examples.dtype)
    if not spec.reduces_outputs:
        b = sums.gradients
    else:
        gradients = sums.gradients[0]  # (groups, examples, P_out)
        b = grouped_outer_sums(_weighted(gradients / divisor if by_sum else gradients, weights), spec.out_blocks)
        if sums.squares is not None:
            totals = [t / divisor**2 if by_sum else t for t in sums.squares]
            totals = [t if weights is None else t * weights[:, None] for t in totals]
            b, share = without_vanishing(b, *(t.sum(1) for t in totals))
    vanished = (share * per_group(examples)).mean()
    b = tuple(m * (scale * scale) for m in b)
    if valid.shape[0] == 1:
        return Statistics(a, b, a_count[0], examples[0], vanished)
    return Statistics(a, b, per_group(a_count), per_group(examples), vanished)


def _of_chosen(counts: Array, valid: Array, reading: Reading) -> tuple[Array, Array, np.ndarray | None]:
    """Positions and validity (slices, examples) of the examples that reduce chooses, and their weights."""
    chosen = reading.chosen()
    if chosen is None:
        return counts, valid, None
    numbers, weights = chosen
    return counts[:, numbers], valid[:, numbers], weights.astype(counts.dtype)


def _weighted(rows: Array, weights: np.ndarray | None) -> Array:
    """Rows (groups, examples, P) whose outer products have these weights."""
    return rows if weights is None else rows * np.sqrt(weights)[:, None]


Added = TypeVar("Added", Statistics, "Gathered")


def add(first: Added, second: Added) -> Added:
    """Statistics of two micro-batches or passes together, of one layer or of all.

    Of all layers they are merged by name: what one batch did not call keeps the statistics of the other.
    """
    if isinstance(first, Gathered) and isinstance(second, Gathered):
        names = {**first, **second}
        merged = {
            name: jax.tree.map(jnp.add, first[name], second[name])
            if name in first and name in second
            else (first if name in first else second)[name]
            for name in names
        }
        return Gathered(merged, [name for name in first.idle if name in second.idle])
    together: Added = jax.tree.map(jnp.add, first, second)
    return together
