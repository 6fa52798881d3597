"""An embedding table that is the output layer too: one K-FAC direction from all uses of one weight.

The table W (V x d) takes part in the loss twice. As output layer s = W x, its inputs are on the d-side and its
output gradients on the V-side; as lookup y = W^T e, with e the one-hot token, it is the other way round. With the
factors of each use as in `factors`, uses taken as independent, the curvature of vec(W), V-side first, is

    B_out (x) A_out  +  F (x) B_emb,

F the factor of the one-hot inputs (expand: the diagonal of token frequencies, of trace 1). The vocabulary side is
taken as the identity, V being too large for a matrix of its own, and among all I (x) X the one closest to the sum
in the Frobenius norm is its partial trace over the vocabulary,

    X = ( tr(B_out) A_out + tr(F) B_emb ) / V.

Only traces are needed of what has V rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.jax import statistics
from algoperf_kfac.jax.factors import Layout, expand_rows, outer_sums
from algoperf_kfac.jax.statistics import Statistics, Tap
from algoperf_kfac.layers import LayerSpec


class TiedSums(NamedTuple):
    """What a tied table's probe collects.

    Attributes:
        inputs: of the output use: expand: outer products, (1, b, b) per block; reduce: one (1, examples, d).
        outputs: of its output gradients: expand: their squares summed, (); reduce: (1, examples, V).
        counts: (1, examples): positions of the output use that count.
        tokens: of the lookups: expand: nothing, (); reduce: how often each token occurs, (examples, V).
        gradients: of the lookups' output gradients, as `inputs`.
        lookups: (1, examples): positions of the lookups that count.
    """

    inputs: tuple[Array, ...]
    outputs: Array
    counts: Array
    tokens: Array
    gradients: tuple[Array, ...]
    lookups: Array


def probe(spec: LayerSpec, examples: int, dtype: Any) -> TiedSums:
    """Zeros for a tied table to collect its sums in; arguments as for `statistics.probe`."""
    counts = jnp.zeros((1, examples), dtype)
    if spec.approximation == "reduce":
        rows = (jnp.zeros((1, examples, spec.in_dim), dtype),)
        vocabulary = jnp.zeros((examples, spec.out_dim), dtype)
        return TiedSums(rows, vocabulary[None], counts, vocabulary, rows, counts)
    blocks = tuple(jnp.zeros((1, size, size), dtype) for size in spec.in_blocks)
    return TiedSums(blocks, jnp.zeros((), dtype), counts, jnp.zeros((), dtype), blocks, counts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_output(static: Tap, out: Array, x: Array, mask: Any, segment_ids: Any, sums: TiedSums) -> Array:
    """The table's output as output layer, unchanged; arguments as for `statistics.tap`."""
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_lookup(static: Tap, out: Array, tokens: Array, mask: Any, segment_ids: Any, sums: TiedSums) -> Array:
    """Rows of the table, unchanged; `tokens` are their numbers, the other arguments as for `statistics.tap`."""
    return out


def _forward(static: Tap, out: Array, x: Array, mask: Any, segment_ids: Any, sums: TiedSums) -> tuple[Array, Any]:
    return out, (x, mask, segment_ids, sums)


def _output_backward(static: Tap, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    x, mask, ids, sums = residuals
    static.on_backward(static.spec.name)
    spec, layout, call = static.spec, static.layout, static.call
    assert call is not None
    rows, mask = _rows(call.outputs(gradient.astype(static.dtype)), layout, len(call.leading), mask)
    x = layout.batch_first(call.inputs(x.astype(static.dtype)), len(call.leading))
    x = x.reshape(rows.shape[0], -1, 1, spec.in_dim)
    if spec.approximation == "reduce":
        inputs: tuple[Array, ...] = (jnp.moveaxis(layout.sum_positions(x, mask, ids), 1, 0),)
        outputs = jnp.moveaxis(layout.sum_positions(rows, mask, ids), 1, 0)
    else:
        inputs = outer_sums(expand_rows(x, mask), None, spec.in_blocks)
        outputs = jnp.square(expand_rows(rows, mask)).sum()
    counts = layout.counts(rows.shape[0], mask, ids, static.dtype)[None]
    zeros = jax.tree.map(jnp.zeros_like, sums)
    return gradient, None, None, None, zeros._replace(inputs=inputs, outputs=outputs, counts=counts)


def _lookup_backward(static: Tap, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    tokens, mask, ids, sums = residuals
    spec, layout = static.spec, static.layout
    leading = gradient.ndim - 1
    rows, mask = _rows(gradient.astype(static.dtype)[..., None, :], layout, leading, mask)
    zeros = jax.tree.map(jnp.zeros_like, sums)
    counts = layout.counts(rows.shape[0], mask, ids, static.dtype)[None]
    if spec.approximation == "expand":
        gradients = outer_sums(expand_rows(rows, mask), None, spec.in_blocks)
        return gradient, None, None, None, zeros._replace(gradients=gradients, lookups=counts)
    gradients = (jnp.moveaxis(layout.sum_positions(rows, mask, ids), 1, 0),)
    numbers = layout.batch_first(tokens, leading).reshape(rows.shape[0], -1)
    example = jnp.arange(rows.shape[0]) if ids is None else ids
    weights = jnp.ones(numbers.shape, static.dtype) if mask is None else mask
    occurrences = sums.tokens * 0
    occurrences = occurrences.at[jnp.broadcast_to(example[:, None], numbers.shape), numbers].add(weights)
    return gradient, None, None, None, zeros._replace(gradients=gradients, tokens=occurrences, lookups=counts)


tap_output.defvjp(_forward, _output_backward)
tap_lookup.defvjp(_forward, _lookup_backward)


def _rows(g: Array, layout: Layout, leading: int, mask: Array | None) -> tuple[Array, Array | None]:
    """Output gradients (leading..., 1, P) as (N, R, 1, P), and the mask they decide where they do."""
    g = layout.batch_first(g, leading)
    rows = g.reshape(g.shape[0] if leading else 1, -1, 1, g.shape[-1])
    if layout.by_gradient:
        mask = (rows != 0).any((2, 3)).astype(rows.dtype)
    return rows, mask


def finalise(spec: LayerSpec, sums: TiedSums, layout: Layout, scale: Array | float) -> Statistics:
    """X in place of A, B being the identity; arguments as for `statistics.finalise`."""
    scale = jnp.asarray(scale, sums.counts.dtype)
    squared = scale * scale
    used = sums.lookups > 0
    seen, looked_up = (sums.counts > 0).sum(), used.sum()
    examples, readers = (jnp.maximum(n, 1).astype(sums.counts.dtype) for n in (seen, looked_up))
    if spec.approximation == "expand":
        positions = jnp.maximum(sums.counts.sum(), 1)
        a_out = tuple(m / positions for m in sums.inputs)
        trace_out = sums.outputs * squared / examples
        b_emb = tuple(m * squared / readers for m in sums.gradients)
        trace_tokens = (looked_up > 0).astype(scale.dtype)
    else:
        by_sum = layout.readout == "sum"
        divisor, lookup_divisor = (jnp.maximum(n, 1)[..., None] for n in (sums.counts, sums.lookups))
        inputs, outputs = sums.inputs[0], sums.outputs
        gradients, tokens = sums.gradients[0], sums.tokens[None]
        if by_sum:
            outputs, gradients = outputs / divisor, gradients / lookup_divisor
        else:
            inputs, tokens = inputs / divisor, tokens / lookup_divisor
        a_out = tuple(m / examples for m in statistics.outer(inputs, spec.in_blocks))
        trace_out = jnp.square(outputs).sum() * squared / examples
        b_emb = tuple(m * squared / readers for m in statistics.outer(gradients, spec.in_blocks))
        trace_tokens = jnp.square(tokens).sum() / readers
    x = tuple((trace_out * a + trace_tokens * b) / spec.out_dim for a, b in zip(a_out, b_emb, strict=True))
    return Statistics(x, (), jnp.ones((), scale.dtype), seen.astype(scale.dtype))
