"""One layer's statistics, gathered in the backward pass: no activation is kept that the gradient does not need.

A weighted operation's output goes through `tap`, the identity, whose backward pass sees input and output gradient
together. What it makes of them leaves the backward pass as the gradient of a probe, a zero that nothing depends on:
gradients add up over calls, micro-batches and loop turns, and so do the probe's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.jax import factors
from algoperf_kfac.jax.factors import Layout
from algoperf_kfac.jax.operations import Call
from algoperf_kfac.layers import LayerSpec


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


class Sums(NamedTuple):
    """What a layer's probe collects, `groups` over stacked layers and channel groups.

    Attributes:
        inputs: expand: outer products, (groups, b, b) per block; reduce: one (groups, examples, P_in).
        gradients: the same of the output gradients.
        counts: (stack, examples): positions that count; stack is the number of stacked layers.
    """

    inputs: tuple[Array, ...]
    gradients: tuple[Array, ...]
    counts: Array


@dataclasses.dataclass(frozen=True)
class Tap:
    """The static half of a tapped call; `call` is None for a lookup."""

    spec: LayerSpec
    call: Call | None
    layout: Layout
    dtype: Any
    on_backward: Callable[[str], None]

    def __hash__(self) -> int:
        return id(self)


def probe(spec: LayerSpec, stack: int, examples: int, dtype: Any) -> Sums:
    """Zeros for a layer to collect its sums in.

    Args:
        spec: the layer; its groups include the stacked layers.
        stack: number of stacked layers, 1 if none.
        examples: number of examples of a call.
        dtype: at least float32.
    """

    def zeros(sizes: tuple[int, ...], dim: int) -> tuple[Array, ...]:
        if spec.approximation == "reduce":
            return (jnp.zeros((spec.groups, examples, dim), dtype),)
        return tuple(jnp.zeros((spec.groups, size, size), dtype) for size in sizes)

    inputs = zeros(spec.in_blocks, spec.in_dim)
    return Sums(inputs, zeros(spec.out_blocks, spec.out_dim), jnp.zeros((stack, examples), dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(static: Tap, out: Array, x: Array, mask: Array | None, segment_ids: Array | None, sums: Sums) -> Array:
    """The output of a weighted operation, unchanged.

    Args:
        static: the layer, the call and its layout.
        out: the output.
        x: the input.
        mask: (N, R) or None.
        segment_ids: (N,) or None.
        sums: the layer's probe, groups and stack of this call.
    """
    return out


def _forward(static: Tap, out: Array, x: Array, mask: Any, segment_ids: Any, sums: Sums) -> tuple[Array, Any]:
    return out, (x, mask, segment_ids)


def _backward(static: Tap, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    x, mask, segment_ids = residuals
    static.on_backward(static.spec.name)
    return gradient, None, None, None, _sums(static, x, gradient, mask, segment_ids)


tap.defvjp(_forward, _backward)


def _sums(static: Tap, x: Array, gradient: Array, mask: Array | None, segment_ids: Array | None) -> Sums:
    spec, call, layout = static.spec, static.call, static.layout
    assert call is not None
    leading = len(call.leading)
    g = call.outputs(gradient.astype(static.dtype))
    g = layout.batch_first(g, leading)
    rows = g.reshape(g.shape[0] if leading else 1, -1, call.groups, call.view.out_dim)
    if layout.by_gradient:
        mask = (rows != 0).any((2, 3)).astype(static.dtype)
    x = call.inputs(x.astype(static.dtype))
    if call.conv is None:
        x = layout.batch_first(x, leading)
        x = x.reshape(rows.shape[0], -1, call.groups, call.view.in_dim)
    counts = layout.counts(rows.shape[0], mask, segment_ids, static.dtype)
    if spec.approximation == "reduce":
        if call.conv is None:
            inputs = layout.sum_positions(x, mask, segment_ids)
        else:
            inputs = layout.sum_rows(call.conv.patch_sums(x, mask), segment_ids)
        gradients = layout.sum_positions(rows, mask, segment_ids)
        return Sums((jnp.moveaxis(inputs, 1, 0),), (jnp.moveaxis(gradients, 1, 0),), counts[None])
    if call.conv is not None:
        x = call.conv.patches(x)
    ones = None
    if spec.bias is not None:
        ones = jnp.ones(rows.shape[:2], static.dtype) if mask is None else mask
        ones = ones.reshape(-1)
    return Sums(
        factors.outer_sums(factors.expand_rows(x, mask), ones, spec.in_blocks),
        factors.outer_sums(factors.expand_rows(rows, mask), None, spec.out_blocks),
        counts[None],
    )


def finalise(spec: LayerSpec, sums: Sums, layout: Layout, scale: Array | float) -> Statistics:
    """Statistics of one backward pass from the sums of all calls in it.

    Args:
        spec: the layer.
        sums: what its probe collected.
        layout: of its calls.
        scale: what output gradients are multiplied by to belong to the summed, per-example loss.
    """
    valid = (sums.counts > 0).astype(sums.counts.dtype)  # (stack, examples)
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
        a = outer(inputs, spec.in_blocks)
        b = outer(gradients, spec.out_blocks)
        a_count = valid.sum(1)
    examples = valid.sum(1)
    b = tuple(m * (scale * scale) for m in b)
    if valid.shape[0] == 1:
        return Statistics(a, b, a_count[0], examples[0])
    return Statistics(a, b, per_group(a_count), per_group(examples))


def outer(rows: Array, blocks: tuple[int, ...]) -> tuple[Array, ...]:
    """(groups, M, P) -> a (groups, b, b) sum of outer products per block."""
    matrices, start = [], 0
    for size in blocks:
        part = rows[..., start : start + size]
        matrices.append(jnp.einsum("gmi,gmj->gij", part, part))
        start += size
    return tuple(matrices)


def add(first: Statistics, second: Statistics) -> Statistics:
    """Statistics of two micro-batches or passes together."""
    return jax.tree.map(jnp.add, first, second)
