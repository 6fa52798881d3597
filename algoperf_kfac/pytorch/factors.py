"""From captured inputs and output gradients to the Kronecker factors A and B (arXiv 2311.00636, sections 3.2, 3.3).

Everything here works on the weight-sharing format [N, R, groups, P]: N examples, R positions that share the
weight, channel groups (1 except for grouped convolutions), P features. Two approximations turn it into factors:

    expand:  A = 1/(N R)  sum_n sum_r a a^T                B = sum_n sum_r g g^T
    reduce:  A = 1/N  sum_n (mean_r a)(mean_r a)^T         B = sum_n (sum_r g)(sum_r g)^T

with the per-example gradient g. Functions return the sums, and the caller divides, because a statistic may be
gathered over several calls and micro-batches. A bias is the homogeneous coordinate 1 of a. Masked positions
count in neither sum nor R.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.layers import LayerSpec

# Elements of a patch matrix built at once by expand; bounds the peak memory, not the result.
MAX_PATCH_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class Positions:
    """How the leading dimensions of a layer's input and output are to be read.

    Attributes:
        mask: shape of the leading dimensions (or of the first few of them), 1 where a position counts; or
            "gradient": a position counts where its output gradient is not exactly zero in every channel. These
            are the positions b[n, r] = 0 that the loss does not depend on (padding, positions without target),
            found layer by layer from the data. Over several backward passes a position counts if any pass
            reaches it.
        segment_ids: shape (rows,): example index of each row of dimension 0, for graphs and packed batches.
        num_segments: number of examples in `segment_ids`; needed with it (reading it off would cost a
            host synchronisation).
        batch_dim: which leading dimension runs over examples, e.g. 1 for (length, batch, features).
        readout: "mean" if positions are averaged before the loss, "sum" if they are summed; decides which of
            reduce's factors takes the 1/R where R varies between examples.
    """

    mask: Tensor | str | None = None
    segment_ids: Tensor | None = None
    num_segments: int | None = None
    batch_dim: int = 0
    readout: str = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.mask, str) and self.mask != "gradient":
            raise ValueError(f"mask={self.mask!r}: allowed is a tensor or 'gradient'")
        if self.readout not in ("mean", "sum"):
            raise ValueError(f"readout={self.readout!r}: allowed is 'mean' or 'sum'")
        if (self.segment_ids is None) != (self.num_segments is None):
            raise ValueError("segment_ids and num_segments go together")

    @property
    def by_gradient(self) -> bool:
        return isinstance(self.mask, str)

    def fits(self, leading: Sequence[int]) -> bool:
        """Whether mask and segment ids have the sizes of a layer's leading dimensions, in the layer's own order."""
        sizes = to_front(leading, self.batch_dim)
        if self.segment_ids is not None and sizes[:1] != tuple(self.segment_ids.shape):
            return False
        if not isinstance(self.mask, Tensor):
            return True
        return sizes[: self.mask.dim()] == to_front(self.mask.shape, self.batch_dim)


def to_front(sizes: Sequence[int], dim: int) -> tuple[int, ...]:
    """Sizes with dimension `dim` first, where there are several."""
    return (sizes[dim], *sizes[:dim], *sizes[dim + 1 :]) if len(sizes) > 1 else tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """`Positions` resolved for one call of a layer with N x R positions.

    Attributes:
        mask: (N, R) of zeros and ones in the factors' dtype, or None. Follows when the output gradients are
            known where they decide it.
        segment_ids: (N,) or None.
        num_examples: number of examples: N, or the number of segments.
        positions: R.
        readout: see `Positions`.
        by_gradient: whether the output gradients decide the mask.
    """

    mask: Tensor | None
    segment_ids: Tensor | None
    num_examples: int
    positions: int
    readout: str
    by_gradient: bool = False

    @property
    def ragged(self) -> bool:
        """Whether examples may differ in the number of positions that count."""
        return self.by_gradient or self.mask is not None or self.segment_ids is not None

    def sum_positions(self, t: Tensor) -> Tensor:
        """(N, R, groups, P) -> (examples, groups, P): sums over the positions of each example."""
        if self.mask is None:
            return self.sum_rows(t.sum(1))
        summed = self.mask.unsqueeze(1) @ t.flatten(2)
        return self.sum_rows(summed.reshape(len(t), *t.shape[2:]))

    def sum_rows(self, t: Tensor) -> Tensor:
        """(N, ...) -> (examples, ...): sums over the rows of each segment, where there are segments."""
        if self.segment_ids is None:
            return t
        return t.new_zeros(self.num_examples, *t.shape[1:]).index_add_(0, self.segment_ids, t)

    def counts(self, like: Tensor) -> Tensor:
        """(examples,): the number R_n of positions that count."""
        if self.mask is not None:
            return self.sum_rows(self.mask.sum(1))
        rows = self.num_examples if self.segment_ids is None else len(self.segment_ids)
        return self.sum_rows(torch.full((rows,), float(self.positions), dtype=like.dtype, device=like.device))


def resolve_positions(positions: Positions | None, leading: Sequence[int], name: str, dtype: torch.dtype) -> Layout:
    """Fit `positions` to a call whose input has the leading dimensions `leading`, batch first.

    Raises:
        ValueError: naming the layer, if a mask or the segment ids do not fit.
    """
    rows = leading[0]
    count = 1
    for size in leading[1:]:
        count *= size
    if positions is None:
        return Layout(None, None, rows, count, "mean")
    mask = positions.mask if isinstance(positions.mask, Tensor) else None
    if mask is not None:
        if mask.dim() > 1 and positions.batch_dim:
            mask = mask.movedim(positions.batch_dim, 0)
        if tuple(mask.shape) != tuple(leading[: mask.dim()]):
            raise ValueError(
                f"layer {name}: a mask of shape {tuple(mask.shape)} does not fit positions {tuple(leading)}"
            )
        missing = len(leading) - mask.dim()
        mask = mask.reshape(*mask.shape, *[1] * missing).expand(*leading).reshape(rows, count).to(dtype)
    ids = positions.segment_ids
    if ids is None:
        return Layout(mask, None, rows, count, positions.readout, positions.by_gradient)
    if tuple(ids.shape) != (rows,):
        raise ValueError(
            f"layer {name}: segment_ids of shape {tuple(ids.shape)} do not fit {rows} rows in dimension 0"
        )
    assert positions.num_segments is not None
    return Layout(mask, ids, positions.num_segments, count, positions.readout, positions.by_gradient)


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Where each kernel offset of a convolution reads, per spatial dimension.

    Attributes:
        kernel, stride, dilation: one entry per spatial dimension.
        padding: zeros added in front, per spatial dimension.
        in_size, out_size: extents of input and output.
        transposed: output p = stride h + dilation i - padding instead of h = stride p + dilation i - padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    transposed: bool

    def padded(self, x: Tensor) -> Tensor:
        """The input as an ordinary, unpadded convolution of the same outputs would read it.

        (N, C, *in_size) -> (N, C, *padded). A transposed convolution becomes an ordinary one of stride 1 over
        the input with zeros inserted between its entries, its kernel reversed.
        """
        if self.transposed and any(s > 1 for s in self.stride):
            spread = [s * (n - 1) + 1 for s, n in zip(self.stride, self.in_size, strict=True)]
            inserted = x.new_zeros(*x.shape[:2], *spread)
            every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in self.stride))
            inserted[every] = x
            x = inserted
        pads: list[int] = []
        for dim in range(len(self.kernel)):
            span = self.dilation[dim] * (self.kernel[dim] - 1)
            front = span - self.padding[dim] if self.transposed else self.padding[dim]
            reach = self._read_stride(dim) * (self.out_size[dim] - 1) + span + 1
            pads = [front, reach - front - x.shape[2 + dim], *pads]
        # Negative entries crop, which is what an oversized padding of a transposed convolution means.
        return F.pad(x, pads) if any(pads) else x

    def _read_stride(self, dim: int) -> int:
        return 1 if self.transposed else self.stride[dim]

    def window(self, padded: Tensor, offset: Sequence[int]) -> Tensor:
        """(N, C, *out_size): what kernel offset `offset` reads at each output position."""
        slices: list[Any] = [...]
        for dim, i in enumerate(offset):
            i = self.kernel[dim] - 1 - i if self.transposed else i
            start, stride = self.dilation[dim] * i, self._read_stride(dim)
            slices.append(slice(start, start + stride * (self.out_size[dim] - 1) + 1, stride))
        return padded[tuple(slices)]

    def patches(self, padded: Tensor, groups: int) -> Tensor:
        """(N, C, *padded) -> (N, R, groups, P): the unfolded patches, P = C/groups x kernel positions."""
        windows = padded
        dims = len(self.kernel)
        for dim in range(dims):
            span = self.dilation[dim] * (self.kernel[dim] - 1) + 1
            windows = windows.unfold(2 + dim, span, self._read_stride(dim))[..., :: self.dilation[dim]]
        if self.transposed:
            windows = windows.flip(tuple(range(2 + dims, 2 + 2 * dims)))
        n, channels = padded.shape[:2]
        grouped = windows.reshape(n, groups, channels // groups, *self.out_size, *self.kernel)
        order = (0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
        return grouped.permute(order).reshape(n, _product(self.out_size), groups, -1)

    def indicator(self, dim: int, like: Tensor) -> Tensor:
        """(kernel, in_size): entry (i, h) counts the outputs at which kernel offset i reads input index h."""
        h = torch.arange(self.in_size[dim], device=like.device)
        offset = torch.arange(self.kernel[dim], device=like.device)[:, None] * self.dilation[dim]
        if self.transposed:
            p = self.stride[dim] * h + offset - self.padding[dim]
            valid = (p >= 0) & (p < self.out_size[dim])
        else:
            distance = h - offset + self.padding[dim]
            p = distance.div(self.stride[dim], rounding_mode="floor")
            valid = (distance % self.stride[dim] == 0) & (p >= 0) & (p < self.out_size[dim])
        return valid.to(like.dtype)

    def patch_sums(self, x: Tensor, groups: int, mask: Tensor | None) -> Tensor:
        """(N, C, *in_size) -> (N, groups, P): sums over positions of the patches, which are never built.

        Without a mask the set of inputs a kernel offset reads is a product over dimensions, so the sums are
        one small matrix product per dimension. A mask (N, R) breaks the product. Laid out over the inputs that
        each kernel offset reads, it makes the sums one matrix product per example instead; where that is larger
        than the patches (few channels, large strides), they are built offset by offset.
        """
        n = len(x)
        if mask is None:
            for dim in range(len(self.kernel)):
                x = torch.tensordot(x, self.indicator(dim, x), dims=([2], [1]))
            return x.reshape(n, groups, -1)
        padded = self.padded(x)
        offsets = list(itertools.product(*(range(k) for k in self.kernel)))
        if x.shape[1] * _product(self.out_size) <= _product(padded.shape[2:]):
            weight = mask.unsqueeze(-1)
            windows = [self.window(padded, offset).flatten(2) @ weight for offset in offsets]
            return torch.cat(windows, -1).reshape(n, groups, -1)
        step = max(1, MAX_PATCH_ELEMENTS // (len(offsets) * _product(padded.shape[2:])))
        sums = []
        for rows, weights in zip(padded.split(step), mask.split(step), strict=True):
            reads = rows.new_zeros(len(rows), len(offsets), *rows.shape[2:])
            for i, offset in enumerate(offsets):
                self.window(reads[:, i : i + 1], offset).copy_(weights.reshape(len(rows), 1, *self.out_size))
            sums.append(rows.flatten(2) @ reads.flatten(2).transpose(1, 2))
        return torch.cat(sums).reshape(n, groups, -1)


def input_chunks(x: Tensor, groups: int, conv: ConvGeometry | None) -> Iterator[tuple[slice, Tensor]]:
    """The layer's input in weight-sharing format, in chunks of examples that bound the memory.

    Args:
        x: (N, *positions, P_in) for linear layers, (N, C, *in_size) for convolutions.
        groups: channel groups.
        conv: the geometry, None for linear layers.

    Yields:
        The slice of examples, and their (n, R, groups, P) inputs.
    """
    if conv is None:
        yield slice(0, len(x)), x.reshape(len(x), -1, 1, x.shape[-1])
        return
    per_example = x.shape[1] * _product(conv.kernel) * _product(conv.out_size)
    step = max(1, MAX_PATCH_ELEMENTS // max(1, per_example))
    for start in range(0, len(x), step):
        chunk = slice(start, start + step)
        yield chunk, conv.patches(conv.padded(x[chunk]), groups)


def input_sums(x: Tensor, groups: int, conv: ConvGeometry | None, layout: Layout) -> Tensor:
    """(examples, groups, P): sums of the layer's inputs over the positions of each example."""
    if conv is None:
        return layout.sum_positions(x.reshape(len(x), -1, 1, x.shape[-1]))
    return layout.sum_rows(conv.patch_sums(x, groups, layout.mask))


def output_rows(grad: Tensor, groups: int, conv: ConvGeometry | None) -> Tensor:
    """Output gradients in weight-sharing format.

    Args:
        grad: (N, *positions, P_out) for linear layers, (N, C_out, *out_size) for convolutions.

    Returns:
        (N, R, groups, P_out / groups).
    """
    if conv is None:
        return grad.reshape(len(grad), -1, 1, grad.shape[-1])
    return grad.reshape(len(grad), groups, grad.shape[1] // groups, -1).permute(0, 3, 1, 2)


def nonzero_positions(rows: Tensor) -> Tensor:
    """(N, R, groups, P) output gradients -> (N, R) booleans: where any of them is not zero (NaN counts)."""
    flat = rows.flatten(2)
    return (flat.amax(-1) != 0) | (flat.amin(-1) != 0)


def outer_sums(rows: Tensor, ones: Tensor | None, blocks: Sequence[int]) -> list[Tensor]:
    """Sums of outer products, block by block of the feature dimension.

    Args:
        rows: (M, groups, P).
        ones: (M,) homogeneous coordinate of the bias, appended as the last feature; None without bias.
        blocks: sizes of the diagonal blocks; their sum is P, plus one with a bias.

    Returns:
        One (groups, b, b) matrix per block.
    """
    by_group = rows.transpose(0, 1)
    sums = []
    start = 0
    for i, size in enumerate(blocks):
        homogeneous = ones is not None and i == len(blocks) - 1
        part = by_group[..., start : start + size - homogeneous]
        outer = part.transpose(1, 2) @ part
        if homogeneous:
            assert ones is not None
            column = (ones @ part).unsqueeze(-1)
            corner = (ones @ ones).expand(len(outer), 1, 1)
            outer = torch.cat([torch.cat([outer, column], 2), torch.cat([column.transpose(1, 2), corner], 2)], 1)
        sums.append(outer)
        start += size
    return sums


def tied_factor(a: Sequence[Tensor], b: Sequence[Tensor], vocabulary: int) -> list[Tensor]:
    """The blocks of X = (tr(B_out) A_out + tr(F) B_emb) / V of a tied table (see `tied`).

    Args:
        a: blocks of A_out.
        b: tr(B_out) and tr(F), (1, 1, 1) each, then the blocks of B_emb.
        vocabulary: V.
    """
    trace, share, *blocks = b
    return [(trace * x + share * y) / vocabulary for x, y in zip(a, blocks, strict=True)]


def expand_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(N, R, groups, P) -> (N R, groups, P), masked positions zeroed."""
    if mask is not None:
        rows = rows * mask[:, :, None, None]
    return rows.reshape(-1, *rows.shape[2:])


def to_matrix(weight: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """A layer's parameters (or gradients) as (groups, P_out, P_in [+ 1]), the bias as last column."""
    if spec.kind == "conv_transpose":  # stored as (C_in, C_out / groups, *kernel)
        grouped = weight.reshape(spec.groups, -1, spec.out_dim, _product(weight.shape[2:]))
        matrix = grouped.transpose(1, 2).reshape(spec.groups, spec.out_dim, spec.in_dim)
    else:
        matrix = weight.reshape(spec.groups, spec.out_dim, spec.in_dim)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(spec.groups, spec.out_dim, 1)], 2)


def from_matrix(matrix: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """The inverse of `to_matrix`: weight and bias in the shapes the framework stores."""
    bias = None
    if spec.bias is not None:
        bias = matrix[..., -1].reshape(-1)
        matrix = matrix[..., :-1]
    if spec.kind == "conv_transpose":
        kernel = _product(spec.weight_shape[2:])
        matrix = matrix.reshape(spec.groups, spec.out_dim, -1, kernel).transpose(1, 2)
    return matrix.reshape(spec.weight_shape), bias


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
