"""From captured inputs and output gradients to the Kronecker factors A and B (arXiv 2311.00636, sections 3.2, 3.3).

Everything here works on the weight-sharing format [N, R, groups, P]: N examples, R positions that share the
weight, channel groups (1 except for grouped convolutions and stacked layers), P features. Two approximations turn
it into factors:

    expand:  A = 1/(N R)  sum_n sum_r a a^T                B = sum_n sum_r g g^T
    reduce:  A = 1/N  sum_n (mean_r a)(mean_r a)^T         B = sum_n (sum_r g)(sum_r g)^T

with the per-example gradient g. Functions return the sums, and the caller divides. A bias is the homogeneous
coordinate 1 of a. Masked positions count in neither sum nor R.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Above so many kernel offsets, masked sums over patches build the patches instead of one window per offset.
MAX_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Positions:
    """How the leading dimensions of a layer's input and output are to be read; a pytree of its arrays.

    Attributes:
        mask: shape of the leading dimensions (or of the first few of them), 1 where a position counts; or the
            string "gradient": a position counts if its output gradient is not zero, that is, if the loss depends
            on it. None: all positions count.
        segment_ids: shape (rows,): example index of each row of dimension 0, for graphs and packed batches.
        num_segments: number of examples in `segment_ids`; needed with it (shapes are static).
        batch_dim: which leading dimension runs over examples, e.g. 1 for (length, batch, features).
        readout: "mean" if positions are averaged before the loss, "sum" if they are summed; decides which of
            reduce's factors takes the 1/R where R varies between examples.

    Raises:
        ValueError: for another readout, a mask that is another string, or segment_ids without num_segments.
    """

    mask: Array | str | None = None
    segment_ids: Array | None = None
    num_segments: int | None = None
    batch_dim: int = 0
    readout: str = "mean"

    def __post_init__(self) -> None:
        if self.readout not in ("mean", "sum"):
            raise ValueError(f"readout={self.readout!r}: allowed is 'mean' or 'sum'")
        if isinstance(self.mask, str) and self.mask != "gradient":
            raise ValueError(f"mask={self.mask!r}: allowed is an array, None or 'gradient'")
        if (self.segment_ids is None) != (self.num_segments is None):
            raise ValueError("segment_ids and num_segments go together")


def _flatten(positions: Positions) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    mask, by_gradient = positions.mask, isinstance(positions.mask, str)
    static = (by_gradient, positions.num_segments, positions.batch_dim, positions.readout)
    return (None if by_gradient else mask, positions.segment_ids), static


def _unflatten(static: tuple[Any, ...], children: tuple[Any, Any]) -> Positions:
    # Not through __init__: jax also unflattens with stand-ins that are no arrays.
    positions = object.__new__(Positions)
    by_gradient, num_segments, batch_dim, readout = static
    values = ("gradient" if by_gradient else children[0], children[1], num_segments, batch_dim, readout)
    for field, value in zip(dataclasses.fields(Positions), values, strict=True):
        object.__setattr__(positions, field.name, value)
    return positions


jax.tree_util.register_pytree_node(Positions, _flatten, _unflatten)


@dataclasses.dataclass(frozen=True)
class Layout:
    """`Positions` resolved for one call of a layer with N x R positions; the static half.

    Attributes:
        num_examples: number of examples: N, or the number of segments.
        positions: R.
        batch_dim: see `Positions`.
        readout: see `Positions`.
        by_gradient: whether the output gradient says which positions count.
        ragged: whether examples may differ in the number of positions that count.
    """

    num_examples: int
    positions: int
    batch_dim: int = 0
    readout: str = "mean"
    by_gradient: bool = False
    ragged: bool = False

    def batch_first(self, t: Array, leading: int) -> Array:
        """Dimension `batch_dim` of the first `leading` ones moved to the front."""
        return jnp.moveaxis(t, self.batch_dim, 0) if self.batch_dim and leading > 1 else t

    def sum_positions(self, t: Array, mask: Array | None, segment_ids: Array | None) -> Array:
        """(N, R, groups, P) -> (examples, groups, P): sums over the positions of each example."""
        summed = t.sum(1) if mask is None else jnp.einsum("nrgp,nr->ngp", t, mask)
        return self.sum_rows(summed, segment_ids)

    def sum_rows(self, t: Array, segment_ids: Array | None) -> Array:
        """(N, ...) -> (examples, ...): sums over the rows of each segment, where there are segments."""
        if segment_ids is None:
            return t
        return jax.ops.segment_sum(t, segment_ids, num_segments=self.num_examples)

    def counts(self, rows: int, mask: Array | None, segment_ids: Array | None, dtype: Any) -> Array:
        """(examples,): the number R_n of positions that count."""
        counts = jnp.full((rows,), float(self.positions), dtype) if mask is None else mask.sum(1)
        return self.sum_rows(counts, segment_ids)


def resolve_positions(
    positions: Positions | None, leading: Sequence[int], name: str, dtype: Any
) -> tuple[Layout, Array | None, Array | None]:
    """Fit `positions` to a call whose input has the leading dimensions `leading`, in the order of the input.

    Returns:
        The layout, the mask as (N, R) zeros and ones in `dtype` or None, the segment ids (N,) or None.

    Raises:
        ValueError: naming the layer, if a mask or the segment ids do not fit.
    """
    leading = tuple(leading) or (1,)
    if positions is None:
        return Layout(leading[0], math.prod(leading[1:])), None, None
    dim = positions.batch_dim
    sizes = to_front(leading, dim)
    rows, count = sizes[0], math.prod(sizes[1:])
    by_gradient = isinstance(positions.mask, str)
    mask = None
    if positions.mask is not None and not isinstance(positions.mask, str):
        mask = jnp.asarray(positions.mask)
        if mask.ndim > 1 and dim:
            mask = jnp.moveaxis(mask, dim, 0)
        if mask.shape != sizes[: mask.ndim]:
            raise ValueError(f"layer {name}: a mask of shape {mask.shape} does not fit positions {sizes}")
        mask = mask.reshape(*mask.shape, *[1] * (len(sizes) - mask.ndim))
        mask = jnp.broadcast_to(mask, sizes).reshape(rows, count).astype(dtype)
    ids = positions.segment_ids
    ragged = by_gradient or mask is not None or ids is not None
    if ids is not None and ids.shape != (rows,):
        raise ValueError(f"layer {name}: segment_ids of shape {ids.shape} do not fit {rows} rows in dimension 0")
    examples = rows if ids is None else int(positions.num_segments or 0)
    layout = Layout(examples, count, dim if len(leading) > 1 else 0, positions.readout, by_gradient, ragged)
    return layout, mask, ids


def to_front(sizes: Sequence[int], dim: int) -> tuple[int, ...]:
    """Sizes with dimension `dim` first, where there are several."""
    sizes = tuple(sizes)
    return (sizes[dim], *sizes[:dim], *sizes[dim + 1 :]) if len(sizes) > 1 else sizes


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Where each kernel offset of a convolution reads, per spatial dimension; transposed ones dilate their input.

    Kernel offset i of output p reads the padded, dilated input at stride p + dilation i, where input h lies at
    padding + in_dilation h.

    Attributes:
        kernel, stride, dilation, in_dilation: one entry per spatial dimension.
        padding: (before, after) per spatial dimension; negative values crop.
        in_size, out_size: extents of input and output.
        groups: channel groups.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    in_dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    groups: int

    def patches(self, x: Array) -> Array:
        """(N, C, *in_size) -> (N, R, groups, P): the unfolded patches, P = C/groups x kernel positions."""
        patches = lax.conv_general_dilated_patches(
            x,
            filter_shape=self.kernel,
            window_strides=self.stride,
            padding=self.padding,
            lhs_dilation=self.in_dilation,
            rhs_dilation=self.dilation,
            precision=lax.Precision.HIGHEST,
        )
        n = x.shape[0]
        return jnp.moveaxis(patches.reshape(n, self.groups, -1, math.prod(self.out_size)), 3, 1)

    def indicator(self, dim: int) -> np.ndarray:
        """(kernel, in_size): entry (i, h) counts the outputs at which kernel offset i reads input index h."""
        h = np.arange(self.in_size[dim]) * self.in_dilation[dim] + self.padding[dim][0]
        distance = h - np.arange(self.kernel[dim])[:, None] * self.dilation[dim]
        p = distance // self.stride[dim]
        return (distance % self.stride[dim] == 0) & (p >= 0) & (p < self.out_size[dim])

    def patch_sums(self, x: Array, mask: Array | None) -> Array:
        """(N, C, *in_size) -> (N, groups, P): sums over positions of the patches, which are never built.

        Without a mask the set of inputs a kernel offset reads is a product over dimensions, so the sums are
        one small matrix product per dimension. A mask (N, R) breaks the product: one window per offset then.
        """
        n = x.shape[0]
        if mask is None:
            for dim in range(len(self.kernel)):
                # The contracted dimension leaves, the kernel's goes behind the others.
                x = jnp.tensordot(x, jnp.asarray(self.indicator(dim), x.dtype), axes=((2,), (1,)))
            return x.reshape(n, self.groups, -1)
        if math.prod(self.kernel) > MAX_WINDOWS:
            return jnp.einsum("nrgp,nr->ngp", self.patches(x), mask)
        config = [(0, 0, 0), (0, 0, 0)]
        for dim in range(len(self.kernel)):
            before, inner = self.padding[dim][0], self.in_dilation[dim] - 1
            reach = self.stride[dim] * (self.out_size[dim] - 1) + self.dilation[dim] * (self.kernel[dim] - 1) + 1
            spread = self.in_dilation[dim] * (self.in_size[dim] - 1) + 1
            config.append((before, reach - before - spread, inner))
        padded = lax.pad(x, jnp.zeros((), x.dtype), config)
        weights = mask.reshape(n, 1, *self.out_size)
        dims = tuple(range(2, x.ndim))
        sums = []
        for offset in itertools.product(*(range(k) for k in self.kernel)):
            start = [d * i for d, i in zip(self.dilation, offset, strict=True)]
            stop = [s + st * (o - 1) + 1 for s, st, o in zip(start, self.stride, self.out_size, strict=True)]
            window = lax.slice(padded, (0, 0, *start), (*x.shape[:2], *stop), (1, 1, *self.stride))
            sums.append((window * weights).sum(dims))
        return jnp.stack(sums, -1).reshape(n, self.groups, -1)


def outer_sums(rows: Array, ones: Array | None, blocks: Sequence[int]) -> tuple[Array, ...]:
    """Sums of outer products, block by block of the feature dimension.

    Args:
        rows: (M, groups, P).
        ones: (M,) homogeneous coordinate of the bias, appended as the last feature; None without bias.
        blocks: sizes of the diagonal blocks; their sum is P, plus one with a bias.

    Returns:
        One (groups, b, b) matrix per block.
    """
    if ones is not None:
        column = jnp.broadcast_to(ones[:, None, None], (*rows.shape[:2], 1))
        rows = jnp.concatenate([rows, column], 2)
    sums = []
    start = 0
    for size in blocks:
        part = rows[..., start : start + size]
        sums.append(jnp.einsum("mgi,mgj->gij", part, part))
        start += size
    return tuple(sums)


def expand_rows(rows: Array, mask: Array | None) -> Array:
    """(N, R, groups, P) -> (N R, groups, P), masked positions zeroed."""
    if mask is not None:
        rows = rows * mask[:, :, None, None]
    return rows.reshape(-1, *rows.shape[2:])
