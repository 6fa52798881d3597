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
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.config import TABLE
from algoperf_kfac.jax.factors import Reading, grouped_outer_sums, outer_sums
from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.kinds._base import Kind, Uses
from algoperf_kfac.jax.operations import Call, Lookup, Use, WeightView
from algoperf_kfac.jax.reductions import squares
from algoperf_kfac.jax.sharding import replicated
from algoperf_kfac.jax.statistics import Product, Statistics, Tap
from algoperf_kfac.jax.types import Sizes
from algoperf_kfac.layers import LayerSpec


class TiedSums(NamedTuple):
    """What a tied table collects in a backward pass.

    Attributes:
        inputs: of the output use: expand: outer products, (1, b, b) per block; reduce: one (1, examples, d), of the
            examples that it chooses.
        outputs: of its output gradients: expand: their squares summed, (); reduce: (1, examples, V).
        counts: (1, examples): positions of the output use that count.
        tokens: of the lookups: expand: nothing, (); reduce: how often each token occurs, (examples, V).
        gradients: of the lookups' output gradients, as `inputs`.
        lookups: (1, examples): positions of the lookups that count.
        taken: (): of expand, positions that count in `inputs`, times the weight of their examples.
    """

    inputs: tuple[Array, ...]
    outputs: Array
    counts: Array
    tokens: Array
    gradients: tuple[Array, ...]
    lookups: Array
    taken: Array


class TiedTable(Kind[TiedSums]):
    """A table that is looked up in, and the weight of an output layer."""

    names = frozenset({TABLE})
    has_bias = False
    product_in_a = True

    def claims(self, uses: Uses) -> bool:
        return bool(uses.lookups)

    def name_of(self, uses: Uses) -> str:
        return TABLE

    def misfit(self, view: WeightView, weight_shape: Sizes) -> str:
        if view.groups == 1 and (view.out_dim, view.in_dim) == weight_shape and not _is_transposed(view):
            return ""
        return "tied weight: an embedding reads it too, in another layout than that of an output layer"

    def counted(self, uses: Uses) -> dict[Key, Use]:
        return {**uses.calls, **uses.lookups}

    def zeros(self, spec: LayerSpec, slices: int, reading: Reading, dtype: DTypeLike) -> TiedSums:
        counts, zero = jnp.zeros((1, reading.total), dtype), jnp.zeros((), dtype)
        if spec.approximation == "reduce":
            examples = reading.part(reading.subset(reduces=True)).total
            rows = (jnp.zeros((1, examples, spec.in_dim), dtype),)
            vocabulary = jnp.zeros((examples, spec.out_dim), dtype)
            return TiedSums(rows, vocabulary[None], counts, vocabulary, rows, counts, zero)
        blocks = tuple(jnp.zeros((1, size, size), dtype) for size in spec.in_blocks)
        return TiedSums(blocks, zero, counts, zero, blocks, counts, zero)

    def tap(self, tap: Tap, out: Array, x: Array, reading: Reading, sums: TiedSums) -> Array:
        chosen = tap_lookup if isinstance(tap.use, Lookup) else tap_output
        return chosen(tap, out, x, reading, sums)

    def product(self, tap: Tap, x: Array, gradient: Array) -> Product:
        if not isinstance(tap.use, Lookup):
            return super().product(tap, x, gradient)
        rows, spec = gradient.astype(tap.dtype).reshape(-1, tap.spec.in_dim), tap.spec
        nothing = jnp.zeros((1, spec.out_dim, spec.in_dim), tap.dtype).at[0, x.reshape(-1)]
        return Product(nothing.add(rows), nothing.add(jnp.abs(rows)))

    def finalise(self, spec: LayerSpec, sums: TiedSums, reading: Reading, scale: Array | float) -> Statistics:
        return finalise(spec, sums, reading, scale)


def _is_transposed(view: WeightView) -> bool:
    """Whether a square table may be read with rows and columns exchanged; its shape does not tell."""
    if view.out_dim != view.in_dim:
        return False
    order = (0, 1)
    for move in view.source.moves:
        if move.kind != "transpose" or len(move.argument) != len(order):
            return True
        order = (order[move.argument[0]], order[move.argument[1]])
    return tuple(order[i] for i in view.permutation) != (0, 1)


Residuals: TypeAlias = tuple[Array, Reading, TiedSums]
Cotangents: TypeAlias = tuple[Array, None, None, TiedSums]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_output(static: Tap, out: Array, x: Array, reading: Reading, sums: TiedSums) -> Array:
    """The table's output as output layer, unchanged; arguments as for `statistics.tap`."""
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_lookup(static: Tap, out: Array, tokens: Array, reading: Reading, sums: TiedSums) -> Array:
    """Rows of the table, unchanged; `tokens` are their numbers, the other arguments as for `statistics.tap`."""
    return out


def _forward(static: Tap, out: Array, x: Array, reading: Reading, sums: TiedSums) -> tuple[Array, Residuals]:
    return out, (x, reading, sums)


def _output_backward(static: Tap, residuals: Residuals, gradient: Array) -> Cotangents:
    static.on_backward(static.spec.name)
    return gradient, None, None, replicated(functools.partial(_output_sums, static), *residuals, gradient)


def _output_sums(static: Tap, x: Array, reading: Reading, sums: TiedSums, gradient: Array) -> TiedSums:
    spec, call = static.spec, static.use
    assert isinstance(call, Call)
    rows = reading.rows(call.outputs(gradient.astype(static.dtype)))
    reading = reading.of_gradients(rows)
    counts = reading.placed(reading.counts(rows))[None]
    chosen = reading.subset(reduces=spec.approximation == "reduce", thins=False)
    part, x = reading.part(chosen), reading.rows(call.inputs(x))[chosen.slice]
    x = x.astype(static.dtype)
    zeros = jax.tree.map(jnp.zeros_like, sums)
    if spec.approximation == "reduce":
        inputs = (jnp.moveaxis(part.placed(part.sum_positions(x)), 1, 0),)
        outputs = jnp.moveaxis(part.placed(part.for_gradients().sum_positions(rows[chosen.slice])), 1, 0)
        return zeros._replace(inputs=inputs, outputs=outputs, counts=counts)
    products = outer_sums(part.expanded(x), None, spec.in_blocks)
    # Of all examples: what has a vocabulary of features is read where it is, a choice would be a copy.
    squared = squares(reading.for_gradients().masked(rows))
    return zeros._replace(
        inputs=tuple(chosen.weight * m for m in products),
        outputs=chosen.weight * squared[chosen.slice].sum(),
        counts=counts,
        taken=chosen.weight * part.counts(rows[chosen.slice]).sum(),
    )


def _lookup_backward(static: Tap, residuals: Residuals, gradient: Array) -> Cotangents:
    static.on_backward(static.spec.name)
    return gradient, None, None, replicated(functools.partial(_lookup_sums, static), *residuals, gradient)


def _lookup_sums(static: Tap, tokens: Array, reading: Reading, sums: TiedSums, gradient: Array) -> TiedSums:
    spec, lookup = static.spec, static.use
    assert isinstance(lookup, Lookup)
    inside = (tokens < spec.out_dim)[..., None, None]
    rows = gradient.astype(static.dtype)[..., None, :]
    if lookup.filled:  # by a constant, whose gradient is none of the table's
        rows = jnp.where(inside, rows, 0)
    rows = reading.rows(rows)
    reading = reading.of_gradients(rows)
    if lookup.filled and not reading.layout.by_gradient:
        reading = reading.where(reading.rows(inside)[:, :, 0, 0].astype(static.dtype))
    zeros = jax.tree.map(jnp.zeros_like, sums)
    counts = reading.placed(reading.counts(rows))[None]
    numbers = reading.batch_first(tokens, tokens.ndim).reshape(rows.shape[0], -1)
    chosen = reading.subset(reduces=spec.approximation == "reduce", thins=False)
    reading, rows, numbers = reading.part(chosen), rows[chosen.slice], numbers[chosen.slice]
    if spec.approximation == "expand":
        products = outer_sums(reading.for_gradients().expanded(rows), None, spec.in_blocks)
        return zeros._replace(gradients=tuple(chosen.weight * m for m in products), lookups=counts)
    gradients = (jnp.moveaxis(reading.placed(reading.for_gradients().sum_positions(rows)), 1, 0),)
    ids = reading.segment_ids
    example = reading.place + (jnp.arange(rows.shape[0]) if ids is None else ids)
    weights = jnp.ones(numbers.shape, static.dtype) if reading.mask is None else reading.mask
    occurrences = sums.tokens * 0
    occurrences = occurrences.at[jnp.broadcast_to(example[:, None], numbers.shape), numbers].add(weights)
    return zeros._replace(gradients=gradients, tokens=occurrences, lookups=counts)


tap_output.defvjp(_forward, _output_backward)
tap_lookup.defvjp(_forward, _lookup_backward)


def finalise(spec: LayerSpec, sums: TiedSums, reading: Reading, scale: Array | float) -> Statistics:
    """X in place of A, B being the identity; arguments as for `statistics.finalise`."""
    scale = jnp.asarray(scale, sums.counts.dtype)
    squared = scale * scale
    used = sums.lookups > 0
    seen, looked_up = (sums.counts > 0).sum(), used.sum()
    examples, readers = (jnp.maximum(n, 1).astype(sums.counts.dtype) for n in (seen, looked_up))
    if spec.approximation == "expand":
        positions = jnp.maximum(sums.taken, 1)
        a_out = tuple(m / positions for m in sums.inputs)
        trace_out = sums.outputs * squared / examples
        b_emb = tuple(m * squared / readers for m in sums.gradients)
        trace_tokens = (looked_up > 0).astype(scale.dtype)
    else:
        by_sum = reading.layout.readout == "sum"
        chosen = reading.chosen()
        root = 1.0 if chosen is None else np.sqrt(chosen[1]).astype(sums.counts.dtype)[:, None]
        counted = [n if chosen is None else n[:, chosen[0]] for n in (sums.counts, sums.lookups)]
        divisor, lookup_divisor = (jnp.maximum(n, 1)[..., None] for n in counted)
        inputs, outputs = sums.inputs[0], sums.outputs
        gradients, tokens = sums.gradients[0], sums.tokens[None]
        if by_sum:
            outputs, gradients = outputs / divisor, gradients / lookup_divisor
        else:
            inputs, tokens = inputs / divisor, tokens / lookup_divisor
        inputs, outputs, gradients, tokens = (t * root for t in (inputs, outputs, gradients, tokens))
        taken = examples if chosen is None else (counted[0] > 0) @ chosen[1].astype(sums.counts.dtype)
        a_out = tuple(m / jnp.maximum(taken, 1) for m in grouped_outer_sums(inputs, spec.in_blocks))
        trace_out = jnp.square(outputs).sum() * squared / examples
        b_emb = tuple(m * squared / readers for m in grouped_outer_sums(gradients, spec.in_blocks))
        trace_tokens = jnp.square(tokens).sum() / readers
    x = tuple((trace_out * a + trace_tokens * b) / spec.out_dim for a, b in zip(a_out, b_emb, strict=True))
    one = (seen + looked_up > 0).astype(scale.dtype)
    return Statistics(x, (), one, seen.astype(scale.dtype), jnp.zeros((), scale.dtype))
