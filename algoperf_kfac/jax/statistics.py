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
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax.factors import Reading, grouped_outer_sums, outer_sums
from algoperf_kfac.jax.operations import Call, Use
from algoperf_kfac.jax.sharding import replicated
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Layout


class Statistics(NamedTuple):
    """What one or more backward passes gathered for one layer, as sums.

    Attributes:
        a: sums of input outer products, a (groups, b, b) matrix per block of A.
        b: sums of output-gradient outer products of the per-example loss, per block of B.
        a_count: what `a` is divided by: valid positions (expand) or examples (reduce), a scalar or (groups,).
        examples: what `b` is divided by, a scalar or (groups,).
    """

    a: tuple[Array, ...]
    b: tuple[Array, ...]
    a_count: Array
    examples: Array


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
        inputs: expand: outer products, (groups, b, b) per block; reduce: one (groups, examples, P_in).
        gradients: the same of the output gradients.
        counts: (slices, examples): positions that count; slices is the number of scanned layers.
    """

    inputs: tuple[Array, ...]
    gradients: tuple[Array, ...]
    counts: Array


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


def zeros(spec: LayerSpec, slices: int, examples: int, dtype: DTypeLike) -> LayerSums:
    """See `kinds.Kind.zeros`."""

    def side(sizes: tuple[int, ...], dim: int) -> tuple[Array, ...]:
        if spec.approximation == "reduce":
            return (jnp.zeros((spec.groups, examples, dim), dtype),)
        return tuple(jnp.zeros((spec.groups, size, size), dtype) for size in sizes)

    return LayerSums(
        side(spec.in_blocks, spec.in_dim), side(spec.out_blocks, spec.out_dim), jnp.zeros((slices, examples), dtype)
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
    rows = reading.rows(call.outputs(gradient.astype(static.dtype)))
    reading = reading.of_gradients(rows)
    x = call.inputs(x.astype(static.dtype))
    counts = reading.placed(reading.counts(rows))[None]
    if spec.approximation == "reduce":
        if call.conv is None:
            inputs = reading.sum_positions(reading.rows(x))
        else:
            inputs = reading.sum_rows(call.conv.patch_sums(x, reading.mask))
        inputs, gradients = reading.placed(inputs), reading.placed(reading.sum_positions(rows))
        return LayerSums((jnp.moveaxis(inputs, 1, 0),), (jnp.moveaxis(gradients, 1, 0),), counts)
    x = reading.rows(x) if call.conv is None else call.conv.patches(x)
    return LayerSums(
        outer_sums(reading.expanded(x), None if spec.bias is None else reading.ones(rows), spec.in_blocks),
        outer_sums(reading.expanded(rows), None, spec.out_blocks),
        counts,
    )


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


def finalise(spec: LayerSpec, sums: LayerSums, layout: Layout, scale: Array | float) -> Statistics:
    """Statistics of one backward pass from the sums of all calls in it.

    Args:
        spec: the layer.
        sums: what it collected.
        layout: of its calls.
        scale: what output gradients are multiplied by to belong to the summed, per-example loss.
    """
    valid = (sums.counts > 0).astype(sums.counts.dtype)  # (slices, examples)
    repeat = spec.groups // valid.shape[0]

    def per_group(t: Array) -> Array:
        return jnp.repeat(t, repeat, axis=0)

    if spec.approximation == "expand":
        a, b = sums.inputs, sums.gradients
        a_count = sums.counts.sum(1)
    else:
        inputs, gradients = sums.inputs[0], sums.gradients[0]  # (groups, examples, P)
        divisor = per_group(jnp.maximum(sums.counts, 1))[..., None]
        ones = sums.counts if layout.readout == "sum" else valid
        if layout.readout == "sum":
            gradients = gradients / divisor
        else:
            inputs = inputs / divisor
        if spec.bias is not None:
            inputs = jnp.concatenate([inputs, per_group(ones)[..., None]], 2)
        a = grouped_outer_sums(inputs, spec.in_blocks)
        b = grouped_outer_sums(gradients, spec.out_blocks)
        a_count = valid.sum(1)
    examples = valid.sum(1)
    b = tuple(m * (scale * scale) for m in b)
    if valid.shape[0] == 1:
        return Statistics(a, b, a_count[0], examples[0])
    return Statistics(a, b, per_group(a_count), per_group(examples))


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
