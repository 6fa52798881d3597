"""The operations that take a parameter as weight, found at the level of JAX's primitives, and how to read them.

A parameter is followed through changes of shape (`sources.py`), so that Dense, DenseGeneral, einsum, attention
projections, flax or raw convolutions, and transposed tables all come down to two primitives: dot_general and
conv_general_dilated. What a primitive is to its weight is told by a rule; kinds of layers may bring rules of their
own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn, Literal, Var
from jax.lax import GatherScatterMode

from algoperf_kfac.jax.geometry import ConvGeometry
from algoperf_kfac.jax.sources import Fused, Source, as_source, inverse_permutation, is_data
from algoperf_kfac.jax.types import Sizes
from algoperf_kfac.positions import Rows


@dataclasses.dataclass(frozen=True)
class WeightView:
    """How a stored weight becomes the matrices (groups, P_out, P_in) that act on [N, R, groups, P].

    Attributes:
        source: the weight as the operation reads it.
        permutation: of the operand's dimensions (those of scans included): scans, groups, output, input.
        groups, out_dim, in_dim: sizes; `groups` counts scanned layers and channel groups.
    """

    source: Source
    permutation: Sizes
    groups: int
    out_dim: int
    in_dim: int

    def to_matrix(self, weight: Array, bias: Array | None) -> Array:
        """A layer's parameters (or gradients) as (groups, P_out, P_in [+ 1]), the bias as last column."""
        matrix = jnp.transpose(self.source.apply(weight), self.permutation)
        matrix = matrix.reshape(self.groups, self.out_dim, self.in_dim)
        if bias is None:
            return matrix
        return jnp.concatenate([matrix, bias.reshape(self.groups, self.out_dim, 1)], 2)

    def from_matrix(self, matrix: Array, bias_shape: Sizes | None) -> tuple[Array, Array | None]:
        """The inverse of `to_matrix`: weight and bias in the shapes the model stores."""
        bias = None
        if bias_shape is not None:
            bias = matrix[..., -1].reshape(bias_shape)
            matrix = matrix[..., :-1]
        operand = self.source.seen_shape
        permuted = matrix.reshape([operand[i] for i in self.permutation])
        return self.source.invert(jnp.transpose(permuted, inverse_permutation(self.permutation))), bias


@dataclasses.dataclass(frozen=True)
class Call:
    """One weighted operation; everything about it that is static.

    Attributes:
        kind: layer kind: "linear", "conv", "conv_transpose", or that of a rule in `kinds`.
        view: the weight's matrices; its groups include scanned layers, `groups` here does not.
        leading: sizes of the input's dimensions over examples and positions, in the input's order.
        groups: groups of this one call.
        in_permutation: input dimensions: leading, groups, features; for convolutions N, C, spatial.
        out_permutation: output dimensions: leading, groups, features; for convolutions N, C_out, spatial.
        conv: the geometry of a convolution, None for linear operations.
        out_slice: the output features that belong to this weight, where it is a part of a fused one.
    """

    kind: str
    view: WeightView
    leading: Sizes
    groups: int
    in_permutation: Sizes
    out_permutation: Sizes
    conv: ConvGeometry | None = None
    out_slice: tuple[int, int] | None = None

    @property
    def rows(self) -> Rows:
        """What `positions` are fitted to."""
        return Rows(self.leading, batch_first=self.conv is not None)

    @property
    def out_dims(self) -> Sizes:
        """The output dimensions that run over groups and output features, in the order of the weight's matrix."""
        if self.conv is not None:
            return (self.out_permutation[1],)
        return self.out_permutation[len(self.leading) :]

    def inputs(self, x: Array) -> Array:
        """The input in the order (leading..., groups, P), for convolutions (N, C, *in_size)."""
        x = jnp.transpose(x, self.in_permutation)
        return x if self.conv is not None else x.reshape(*self.leading, self.groups, self.view.in_dim)

    def outputs(self, g: Array) -> Array:
        """An output gradient in the order (leading..., groups, P_out)."""
        g = jnp.transpose(g, self.out_permutation)
        if self.out_slice is not None:
            g = g[..., slice(*self.out_slice)]
        if self.conv is None:
            return g.reshape(*self.leading, self.groups, self.view.out_dim)
        g = g.reshape(g.shape[0], self.groups, self.view.out_dim, *self.conv.out_size)
        return jnp.moveaxis(g, (1, 2), (-2, -1))


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a parameter, gathered: an embedding.

    Attributes:
        source: the table, (V, P).
        leading: sizes of the dimensions over examples and positions.
        filled: whether numbers that the table does not have (V, as taps see them) stand for rows of a constant.
    """

    source: Source
    leading: Sizes
    filled: bool = False

    @property
    def rows(self) -> Rows:
        """What `positions` are fitted to."""
        return Rows(self.leading)


Use: TypeAlias = Call | Lookup
"""One operation that reads a parameter as a weight."""


class Read(NamedTuple):
    """What a rule makes of a primitive.

    Attributes:
        use: the operation.
        operand: which operand is its input, or the row numbers of a lookup in a last dimension of 1.
        parts: the operations of a fused weight's parts; empty for a weight that is one parameter.
        prepare: from all operands to what stands for the input, where one alone does not tell.
    """

    use: Use
    operand: int
    parts: tuple[Call, ...] = ()
    prepare: Callable[[Sequence[Array]], Array] | None = None


Rule: TypeAlias = Callable[[JaxprEqn, Sequence[object]], Read | None]
"""From a primitive and the tags of its operands to what it is to its weight; None where it is nothing known."""


def shape_of(value: Var | Literal) -> Sizes:
    """The shape of a value of a program."""
    aval = value.aval
    assert isinstance(aval, ShapedArray)
    return tuple(aval.shape)


def read_dot_general(eqn: JaxprEqn, tags: Sequence[object]) -> Read | None:
    """A product with a parameter, or several side by side, as one operand."""
    for position in (1, 0):
        tag, other = tags[position], 1 - position
        weight = as_source(tag)
        if weight is None or not is_data(tags[other]):
            continue
        call = _linear(
            weight, shape_of(eqn.invars[position]), shape_of(eqn.invars[other]), eqn, weight_is_rhs=position == 1
        )
        if call is None:
            continue
        if not isinstance(tag, Fused):
            return Read(call, other)
        parts = split_call(call, tag)
        return None if parts is None else Read(call, other, parts)
    return None


def _linear(
    weight: Source, weight_shape: Sizes, x_shape: Sizes, eqn: JaxprEqn, *, weight_is_rhs: bool
) -> Call | None:
    """The product as a linear layer; None where the weight is repeated, but for once per example.

    What runs over repetitions of the weight beside the input's own dimension (a batch of the product) is examples.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    if weight_is_rhs:
        x_contract, w_contract, x_batch, w_batch = lhs_contract, rhs_contract, lhs_batch, rhs_batch
    else:
        x_contract, w_contract, x_batch, w_batch = rhs_contract, lhs_contract, rhs_batch, lhs_batch
    # In the weight's order, so that features are numbered as the weight stores them.
    pairs = sorted(zip(w_contract, x_contract, strict=True))
    w_contract, x_contract = tuple(w for w, _ in pairs), tuple(x for _, x in pairs)
    dims = tuple(range(len(weight_shape)))
    if weight.is_broadcast:
        once = weight.once()
        if once is None:
            return None
        weight, dims = once
        if any(d not in (*dims, *w_batch) for d in range(len(weight_shape))):
            return None
    repeated = tuple(x for x, w in zip(x_batch, w_batch, strict=True) if w not in dims)
    x_rows = tuple(d for d in range(len(x_shape)) if d not in (*x_contract, *x_batch) or d in repeated)
    x_free = tuple(d for d in x_rows if d not in repeated)
    x_groups, w_batch = (
        tuple(d for d in x_batch if d not in repeated),
        tuple(d for d in w_batch if d in dims),
    )
    w_free = tuple(d for d in sorted(dims) if d not in (*w_contract, *w_batch))
    groups = math.prod(weight_shape[d] for d in w_batch)
    view = WeightView(
        weight,
        (*range(weight.scans), *(weight.scans + dims.index(d) for d in (*w_batch, *w_free, *w_contract))),
        groups * math.prod(weight.scanned_sizes),
        math.prod(weight_shape[d] for d in w_free),
        math.prod(weight_shape[d] for d in w_contract),
    )
    # The output has the batch dimensions, then the free ones of either operand, the left one's first.
    first, second = len(x_batch), len(x_batch) + (len(x_free) if weight_is_rhs else len(w_free))
    x_start, w_start = (first, second) if weight_is_rhs else (second, first)
    places = dict(zip((*x_batch, *x_free), (*range(first), *range(x_start, x_start + len(x_free))), strict=True))
    return Call(
        "linear",
        view,
        tuple(x_shape[d] for d in x_rows),
        groups,
        (*x_rows, *x_groups, *x_contract),
        (*(places[d] for d in (*x_rows, *x_groups)), *range(w_start, w_start + len(w_free))),
    )


def read_conv(eqn: JaxprEqn, tags: Sequence[object]) -> Read | None:
    """A convolution with a parameter as kernel; None for groups over the batch."""
    weight, params = tags[1], eqn.params
    if not isinstance(weight, Source) or not is_data(tags[0]) or weight.is_broadcast:
        return None
    if params["batch_group_count"] != 1:
        return None
    x_shape, weight_shape, out_shape = map(shape_of, (*eqn.invars, *eqn.outvars))
    numbers = params["dimension_numbers"]
    x_spec, w_spec, out_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    groups = params["feature_group_count"]
    geometry = ConvGeometry(
        kernel=tuple(weight_shape[d] for d in w_spec[2:]),
        stride=tuple(params["window_strides"]),
        dilation=tuple(params["rhs_dilation"]),
        in_dilation=tuple(params["lhs_dilation"]),
        padding=tuple(tuple(p) for p in params["padding"]),
        in_size=tuple(x_shape[d] for d in x_spec[2:]),
        out_size=tuple(out_shape[d] for d in out_spec[2:]),
        groups=groups,
    )
    view = WeightView(
        weight,
        (*range(weight.scans), *(weight.scans + d for d in w_spec)),
        groups * math.prod(weight.scanned_sizes),
        weight_shape[w_spec[0]] // groups,
        math.prod(weight_shape) // weight_shape[w_spec[0]],
    )
    kind = "conv_transpose" if any(d > 1 for d in geometry.in_dilation) else "conv"
    leading = (x_shape[x_spec[0]], *geometry.out_size)
    return Read(Call(kind, view, leading, groups, tuple(x_spec), tuple(out_spec), geometry), 0)


def read_gather(eqn: JaxprEqn, tags: Sequence[object]) -> Read | None:
    """Whole rows of a table that is read as it is stored, also one by one under `jax.vmap`: those keep a dimension
    of size 1 each, and have a second number that says where in the row they begin."""
    source, table, numbers = tags[0], shape_of(eqn.invars[0]), eqn.params["dimension_numbers"]
    if not isinstance(source, Source) or source.moves or source.scans:
        return None
    out, mode = shape_of(eqn.outvars[0]), eqn.params["mode"]
    kept = 2 - len(numbers.collapsed_slice_dims)
    whole_rows = len(table) == 2 and tuple(eqn.params["slice_sizes"]) == (1, table[1])
    rows_last = tuple(numbers.offset_dims) == tuple(range(len(out) - kept, len(out)))
    if not whole_rows or not rows_last or numbers.operand_batching_dims:
        return None
    # Of one number a row, as an array without a dimension for it (`table[ids, 0]`); tables of such are not covered.
    leading = out[:-1] if kept else out
    # A whole row begins nowhere else than at 0, where it is not filled in place of that.
    starts = tuple(numbers.start_index_map)
    if starts != (0,) and (starts != (0, 1) or mode == GatherScatterMode.FILL_OR_DROP):
        return None

    def read_numbers(ins: Sequence[Array]) -> Array:
        rows = jnp.asarray(ins[1])[..., 0]
        if rows.dtype.itemsize < 4:  # in which the table's size may have no place
            rows = rows.astype(jnp.int32)
        if mode == GatherScatterMode.CLIP:
            rows = jnp.clip(rows, 0, table[0] - 1)
        elif mode == GatherScatterMode.FILL_OR_DROP:
            rows = jnp.where((rows >= 0) & (rows < table[0]), rows, table[0])
        else:  # derivatives leave out what was promised not to come; indexing by taps would count from the end
            rows = jnp.where(rows >= 0, rows, table[0])
        return rows.reshape(*leading, 1)

    fill = eqn.params["fill_value"]
    filled = mode == GatherScatterMode.FILL_OR_DROP and fill is not None and bool(np.isfinite(fill))
    return Read(Lookup(source, leading, filled), 1, prepare=read_numbers)


RULES: Mapping[str, Rule] = {
    "dot_general": read_dot_general,
    "conv_general_dilated": read_conv,
    "gather": read_gather,
}


def split_call(call: Call, fused: Fused) -> tuple[Call, ...] | None:
    """The calls of a fused weight's parts; None unless they follow each other along its one output dimension."""
    view = call.view
    if fused.whole.moves or call.conv is not None or view.permutation != (fused.axis, 1 - fused.axis):
        return None
    calls, start = [], 0
    for part in fused.parts:
        size = part.shape[fused.axis]
        part_view = dataclasses.replace(view, source=part, out_dim=size)
        calls.append(dataclasses.replace(call, view=part_view, out_slice=(start, start + size)))
        start += size
    return tuple(calls)


def bias_of(source: Source, call: Call, dims: Sizes, shape: Sizes) -> Source | None:
    """How a bias is stored: as what its entries are the layer's output features in order, groups first.

    None unless adding `source` to the output of `call` adds each of them to one output feature.

    Args:
        source: the other summand.
        call: the weighted operation.
        dims: the sum's dimensions over groups and output features, in the order of the weight's matrix.
        shape: of the sum.
    """
    size, scans = math.prod(source.shape), source.scans
    if size != call.view.groups * call.view.out_dim:
        return None
    value = source.apply(np.arange(size).reshape(source.shape))
    if scans != call.view.source.scans or value.ndim not in (scans, scans + len(shape)):
        return None
    # As additions do of themselves, with single numbers too; a batch without examples has the biases of others.
    value = value.reshape(*value.shape, *[1] * (scans + len(shape) - value.ndim))
    value = np.broadcast_to(value, (*value.shape[:scans], *(max(size, 1) for size in shape)))
    dims = tuple(scans + d for d in dims)
    others = [d for d in range(scans, value.ndim) if d not in dims]
    if any(value.strides[d] != 0 and value.shape[d] != 1 for d in others):
        return None
    corner = value.transpose(*range(scans), *dims, *others)
    for _ in others:
        corner = corner[..., 0]
    # As it lies, or in the order in which its groups or layers are taken from it (`jax.vmap` and scans of axis 1).
    for stored in (dataclasses.replace(source, moves=()), source.once_only()):
        order = stored.apply(np.arange(size).reshape(source.shape)).reshape(-1)
        if (corner.reshape(-1) == order).all():
            return stored
    return None
