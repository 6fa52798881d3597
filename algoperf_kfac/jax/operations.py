"""The operations that take a parameter as weight, found at the level of JAX's primitives, and how to read them.

A parameter is followed through changes of shape (`Source`), so that Dense, DenseGeneral, einsum, attention
projections, flax or raw convolutions, and transposed tables all come down to two primitives: dot_general and
conv_general_dilated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac.jax.factors import ConvGeometry

# Primitives that read a weight as a weight without a rule for it. Others (norms, penalties, scalings by
# themselves) leave the layer's statistics complete.
WEIGHT_READS = frozenset(
    """
    dot_general conv_general_dilated ragged_dot gather dynamic_slice slice concatenate scatter scatter-add select_n
    while scan cond custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr shard_map pallas_call sort
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A value that is a parameter, up to changes of shape.

    Attributes:
        name: of the parameter.
        shape: as the parameter is stored.
        moves: what was done to it, in order: ("reshape", shape), ("transpose", permutation), ("rev", dimensions),
            ("broadcast", (shape, dimensions)); shapes and dimensions include the stacked ones.
        stack: leading dimensions over which enclosing scans run; the value at hand is a slice of them.
    """

    name: str
    shape: tuple[int, ...]
    moves: tuple[tuple[str, Any], ...] = ()
    stack: int = 0

    def moved(self, kind: str, argument: Any) -> Source:
        return dataclasses.replace(self, moves=(*self.moves, (kind, argument)))

    def apply(self, value: Any) -> Any:
        """The parameter (a NumPy or JAX array of shape `shape`) as the operation sees it, stack included."""
        module = np if isinstance(value, np.ndarray) else jnp
        for kind, argument in self.moves:
            if kind == "reshape":
                value = value.reshape(argument)
            elif kind == "transpose":
                value = module.transpose(value, argument)
            elif kind == "rev":
                value = module.flip(value, argument)
            else:
                shape, dims = argument
                sizes = [1] * len(shape)
                for size, dim in zip(value.shape, dims, strict=True):
                    sizes[dim] = size
                value = module.broadcast_to(value.reshape(sizes), shape)
        return value

    def invert(self, value: Array) -> Array:
        """The inverse of `apply`, for sources that were not broadcast."""
        shapes = [self.shape]
        probe = np.broadcast_to(np.zeros((), np.int8), self.shape)
        for i in range(len(self.moves)):
            shapes.append(dataclasses.replace(self, moves=self.moves[: i + 1]).apply(probe).shape)
        for (kind, argument), before in zip(reversed(self.moves), reversed(shapes[:-1]), strict=True):
            if kind == "reshape":
                value = value.reshape(before)
            elif kind == "transpose":
                value = jnp.transpose(value, _inverse(argument))
            else:
                value = jnp.flip(value, argument)
        return value

    @property
    def is_broadcast(self) -> bool:
        return any(kind == "broadcast" for kind, _ in self.moves)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Parameters concatenated into one weight or bias, as LSTM cells do with their gates.

    Attributes:
        whole: the concatenation, as if it were a parameter.
        parts: the parameters, without changes of shape.
        axis: the dimension along which they follow each other.
    """

    whole: Source
    parts: tuple[Source, ...]
    axis: int

    def moved(self, kind: str, argument: Any) -> Fused:
        return dataclasses.replace(self, whole=self.whole.moved(kind, argument))


def fuse(sources: Sequence[Any], axis: int) -> Fused | None:
    """The concatenation of values; None unless all are parameters as they are stored."""
    if not all(isinstance(s, Source) and not s.moves and not s.stack for s in sources):
        return None
    shape = list(sources[0].shape)
    shape[axis] = sum(s.shape[axis] for s in sources)
    return Fused(Source(" + ".join(s.name for s in sources), tuple(shape)), tuple(sources), axis)


@dataclasses.dataclass(frozen=True)
class WeightView:
    """How a stored weight becomes the matrices (groups, P_out, P_in) that act on [N, R, groups, P].

    Attributes:
        source: the weight as the operation reads it.
        permutation: of the operand's dimensions (stack included): stack, groups, output, input.
        groups, out_dim, in_dim: sizes; `groups` counts stacked layers and channel groups.
    """

    source: Source
    permutation: tuple[int, ...]
    groups: int
    out_dim: int
    in_dim: int

    def to_matrix(self, weight: Any, bias: Any | None) -> Array:
        """A layer's parameters (or gradients) as (groups, P_out, P_in [+ 1]), the bias as last column."""
        matrix = jnp.transpose(self.source.apply(weight), self.permutation)
        matrix = matrix.reshape(self.groups, self.out_dim, self.in_dim)
        if bias is None:
            return matrix
        return jnp.concatenate([matrix, bias.reshape(self.groups, self.out_dim, 1)], 2)

    def from_matrix(self, matrix: Array, bias_shape: tuple[int, ...] | None) -> tuple[Array, Array | None]:
        """The inverse of `to_matrix`: weight and bias in the shapes the model stores."""
        bias = None
        if bias_shape is not None:
            bias = matrix[..., -1].reshape(bias_shape)
            matrix = matrix[..., :-1]
        operand = self.source.apply(np.broadcast_to(np.zeros((), np.int8), self.source.shape)).shape
        permuted = matrix.reshape([operand[i] for i in self.permutation])
        return self.source.invert(jnp.transpose(permuted, _inverse(self.permutation))), bias


@dataclasses.dataclass(frozen=True)
class Call:
    """One weighted operation; everything about it that is static.

    Attributes:
        kind: layer kind: "linear", "conv" or "conv_transpose".
        view: the weight's matrices; its groups include stacked layers, `groups` here does not.
        leading: sizes of the input's dimensions over examples and positions, in the input's order.
        groups: groups of this one call.
        in_permutation: input dimensions: leading, groups, features; for convolutions N, C, spatial.
        out_permutation: output dimensions: leading, groups, features; for convolutions N, C_out, spatial.
        conv: the geometry of a convolution, None for linear operations.
        out_slice: the output features that belong to this weight, where it is a part of a fused one.
    """

    kind: str
    view: WeightView
    leading: tuple[int, ...]
    groups: int
    in_permutation: tuple[int, ...]
    out_permutation: tuple[int, ...]
    conv: ConvGeometry | None
    out_slice: tuple[int, int] | None = None

    @property
    def out_dims(self) -> tuple[int, ...]:
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


def read_dot_general(
    weight: Source,
    weight_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    weight_is_rhs: bool,
    params: dict[str, Any],
) -> Call:
    """A dot_general with a parameter as one operand."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    if weight_is_rhs:
        x_contract, w_contract, x_batch, w_batch = lhs_contract, rhs_contract, lhs_batch, rhs_batch
    else:
        x_contract, w_contract, x_batch, w_batch = rhs_contract, lhs_contract, rhs_batch, lhs_batch
    # In the weight's order, so that features are numbered as the weight stores them.
    pairs = sorted(zip(w_contract, x_contract, strict=True))
    w_contract, x_contract = tuple(w for w, _ in pairs), tuple(x for _, x in pairs)
    x_free = tuple(d for d in range(len(x_shape)) if d not in (*x_contract, *x_batch))
    w_free = tuple(d for d in range(len(weight_shape)) if d not in (*w_contract, *w_batch))
    stack = tuple(range(weight.stack))
    sizes = weight.apply(np.broadcast_to(np.zeros((), np.int8), weight.shape)).shape
    groups = math.prod(weight_shape[d] for d in w_batch)
    view = WeightView(
        weight,
        (*stack, *(weight.stack + d for d in (*w_batch, *w_free, *w_contract))),
        groups * math.prod(sizes[: weight.stack]),
        math.prod(weight_shape[d] for d in w_free),
        math.prod(weight_shape[d] for d in w_contract),
    )
    batch = tuple(range(len(x_batch)))
    first, second = len(batch), len(batch) + (len(x_free) if weight_is_rhs else len(w_free))
    x_out = range(first, first + len(x_free)) if weight_is_rhs else range(second, second + len(x_free))
    w_out = range(second, second + len(w_free)) if weight_is_rhs else range(first, first + len(w_free))
    return Call(
        "linear",
        view,
        tuple(x_shape[d] for d in x_free),
        groups,
        (*x_free, *x_batch, *x_contract),
        (*x_out, *batch, *w_out),
        None,
    )


def read_conv(
    weight: Source,
    weight_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    params: dict[str, Any],
) -> Call | None:
    """A convolution with a parameter as kernel; None for groups over the batch."""
    if params["batch_group_count"] != 1:
        return None
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
    sizes = weight.apply(np.broadcast_to(np.zeros((), np.int8), weight.shape)).shape
    view = WeightView(
        weight,
        (*range(weight.stack), *(weight.stack + d for d in w_spec)),
        groups * math.prod(sizes[: weight.stack]),
        weight_shape[w_spec[0]] // groups,
        math.prod(weight_shape) // weight_shape[w_spec[0]],
    )
    kind = "conv_transpose" if any(d > 1 for d in geometry.in_dilation) else "conv"
    leading = (x_shape[x_spec[0]], *geometry.out_size)
    return Call(kind, view, leading, groups, tuple(x_spec), tuple(out_spec), geometry)


def split_call(call: Call, fused: Fused) -> list[Call] | None:
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
    return calls


def is_bias(source: Source, call: Call, dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether adding `source` to the output of `call` adds its entries to the layer's output features in order.

    Args:
        source: the other summand.
        call: the weighted operation.
        dims: the sum's dimensions over groups and output features, in the order of the weight's matrix.
        shape: of the sum.
    """
    size = math.prod(source.shape)
    if size != call.view.groups * call.view.out_dim:
        return False
    value = source.apply(np.arange(size).reshape(source.shape))
    stack = source.stack
    if stack != call.view.source.stack or value.ndim != stack + len(shape):
        return False
    value = np.broadcast_to(value, (*value.shape[:stack], *shape))  # as additions do of themselves
    dims = tuple(stack + d for d in dims)
    others = [d for d in range(stack, value.ndim) if d not in dims]
    if any(value.strides[d] != 0 and value.shape[d] != 1 for d in others):
        return False
    corner = value.transpose(*range(stack), *dims, *others)
    for _ in others:
        corner = corner[..., 0]
    return bool((corner.reshape(-1) == np.arange(size)).all())


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(permutation))
