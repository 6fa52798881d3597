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
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Layout, Positions, Rows
from algoperf_kfac.pytorch.geometry import MAX_PATCH_ELEMENTS, ConvGeometry
from algoperf_kfac.subset import Subset

# Up to so many rows for each feature, one product with the homogeneous coordinate among them is the cheapest.
FEW_ROWS = 4
HALVED = 512  # features from which on half of a symmetric product is computed in its own right


@dataclasses.dataclass(frozen=True)
class MaskedLayout(Layout):
    """A `Layout` with its tensors.

    Attributes:
        mask: (N, R) of zeros and ones in the factors' dtype, or None. Follows when the output gradients are
            known where they decide it.
        segment_ids: (N,) or None.
    """

    mask: Tensor | None = None
    segment_ids: Tensor | None = None

    @classmethod
    def fitted(cls, positions: Positions | None, rows: Rows, name: str, dtype: torch.dtype) -> MaskedLayout:
        """Fit `positions` to a call.

        Raises:
            ValueError: naming the layer, if a mask or the segment ids do not fit.
        """
        layout = cls.of(positions, rows, name)
        if positions is None:
            return layout
        mask, sizes = positions.array_mask, rows.sizes(positions)
        for array in (mask, positions.segment_ids):
            if not isinstance(array, Tensor | None):
                raise ValueError(f"layer {name}: positions are given by a {type(array).__name__}, not by a tensor")
        if mask is not None:
            assert isinstance(mask, Tensor)
            if positions.examples_dim < mask.dim():
                mask = mask.movedim(positions.examples_dim, 0)
            mask = mask.reshape(*mask.shape, *[1] * (len(sizes) - mask.dim())).expand(sizes)
            mask = (mask.reshape(sizes[0], -1) != 0).to(dtype)  # weights of a loss count where they are not zero
        assert positions.segment_ids is None or isinstance(positions.segment_ids, Tensor)
        return dataclasses.replace(layout, mask=mask, segment_ids=positions.segment_ids)

    def subset(self, limit: int | None, *, reduces: bool, thins: bool) -> Subset:
        """The rows that a factor is formed of.

        Args:
            limit: from `RowLimit`.
            reduces: whether the factor has one row per example, and not one per position.
            thins: whether some positions of an example may be taken.
        """
        each = 1 if reduces else self.positions
        return Subset.of(limit, self.num_examples, each, thins=thins)

    def part(self, chosen: Subset) -> MaskedLayout:
        """The layout of some of the rows."""
        if chosen.every == chosen.thinning == 1:
            return self
        mask = None if self.mask is None else self.mask[chosen.slice, chosen.of_rows]
        positions = self.positions if chosen.thinning == 1 else chosen.rows
        return dataclasses.replace(self, num_examples=chosen.size, positions=positions, mask=mask)

    def batch_first(self, t: Tensor) -> Tensor:
        """A tensor of the call with its dimension over examples first."""
        return t.movedim(self.batch_dim, 0) if self.batch_dim else t

    def sum_positions(self, t: Tensor) -> Tensor:
        """(N, R, groups, P) -> (examples, groups, P): sums over the positions of each example."""
        if self.mask is None:
            return self.sum_rows(t.squeeze(1) if self.positions == 1 else t.sum(1))
        if self.positions == 1:  # rows of segments: a product of 1 x 1 matrices for each would take its time
            return self.sum_rows(t.squeeze(1) * self.mask.unsqueeze(2))
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


def input_chunks(
    x: Tensor, groups: int, conv: ConvGeometry | None, thinning: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """The layer's input in weight-sharing format, in chunks of examples that bound the memory.

    Args:
        x: (N, *positions, P_in) for linear layers, (N, C, *in_size) for convolutions.
        groups: channel groups.
        conv: the geometry, None for linear layers.
        thinning: of so many positions one is taken.

    Yields:
        The slice of examples, and their (n, R, groups, P) inputs.
    """
    if conv is None:
        yield slice(0, len(x)), x.reshape(len(x), -1, 1, x.shape[-1])[:, ::thinning]
        return
    per_example = x.shape[1] * math.prod(conv.kernel) * math.prod(conv.out_size) // thinning
    step = max(1, MAX_PATCH_ELEMENTS // max(1, per_example))
    for start in range(0, len(x), step):
        chunk = slice(start, start + step)
        yield chunk, conv.patches(conv.padded(x[chunk]), groups, thinning)


def input_sums(x: Tensor, groups: int, conv: ConvGeometry | None, layout: MaskedLayout) -> Tensor:
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
    # Magnitudes cannot cancel; their sum takes a quarter of the time of the largest and the least entry.
    return rows.flatten(2).abs().sum(-1) != 0


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
        if homogeneous and ones is not None and len(ones) <= FEW_ROWS * size:
            part = _with_column(part, ones)
            homogeneous = False
        outer = gram(part)
        if homogeneous:
            assert ones is not None
            column = (ones @ part).unsqueeze(-1)
            corner = (ones @ ones).expand(len(outer), 1, 1)
            outer = torch.cat([torch.cat([outer, column], 2), torch.cat([column.transpose(1, 2), corner], 2)], 1)
        sums.append(outer)
        start += size
    return sums


def gram(rows: Tensor) -> Tensor:
    """(groups, M, P) -> (groups, P, P): rows^T rows, the same numbers on both sides of the diagonal.

    Of large ones the lower left quarter is not computed: a quarter of the products less.
    """
    half = rows.shape[2] // 2
    columns = rows.transpose(1, 2)
    if 2 * half < HALVED:
        return columns @ rows
    first = columns[:, :half] @ rows
    last = columns[:, half:] @ rows[..., half:]
    return torch.cat([first, torch.cat([first[..., half:].transpose(1, 2), last], 2)], 1)


def _with_column(part: Tensor, ones: Tensor) -> Tensor:
    """(groups, M, P), (M,) -> (groups, M, P + 1), in memory as `part` lies: features or rows first."""
    if part.stride(1) == 1 < part.stride(2):
        return torch.cat([part.transpose(1, 2), ones.expand(len(part), 1, -1)], 1).transpose(1, 2)
    return torch.cat([part, ones[:, None].expand(len(part), -1, 1)], 2)


def expand_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(N, R, groups, P) -> (N R, groups, P), masked positions zeroed."""
    if mask is not None:
        rows = rows * mask[:, :, None, None]
    return rows.reshape(-1, *rows.shape[2:])


def part_of(weight: Tensor, spec: LayerSpec) -> Tensor:
    """The layer's elements in a tensor of its weight's shape, in the order of its matrix; a view if it can be."""
    if not spec.layout:
        return weight
    sizes, strides, (offset,) = spec.layout
    flat = weight.contiguous()
    return flat.as_strided(sizes, strides, flat.storage_offset() + offset)


def bias_part(bias: Tensor, spec: LayerSpec) -> Tensor:
    """(groups P_out,): the layer's elements in a tensor of its bias' shape."""
    flat = bias.reshape(-1)
    return flat if spec.bias_start is None else flat.narrow(0, spec.bias_start, spec.groups * spec.out_dim)


def weight_matrix(weight: Tensor, spec: LayerSpec) -> Tensor:
    """What a layer has of a tensor of its weight's shape as (groups, P_out, P_in), without the bias."""
    if spec.kind == "conv_transpose":  # stored as (C_in, C_out / groups, *kernel)
        grouped = weight.reshape(spec.groups, -1, spec.out_dim, math.prod(weight.shape[2:]))
        return grouped.transpose(1, 2).reshape(spec.groups, spec.out_dim, spec.in_dim)
    return part_of(weight, spec).reshape(spec.groups, spec.out_dim, spec.in_dim)


def matrix_weight(matrix: Tensor, spec: LayerSpec) -> Tensor:
    """The inverse of `weight_matrix`: as the framework stores the weight; a part of one as `part_of` gives it."""
    if spec.kind == "conv_transpose":
        kernel = math.prod(spec.weight_shape[2:])
        matrix = matrix.reshape(spec.groups, spec.out_dim, -1, kernel).transpose(1, 2)
    if not spec.layout:
        return matrix.reshape(spec.weight_shape)
    sizes, strides, (offset,) = spec.layout
    if spec.is_part:
        return matrix.reshape(sizes)
    weight = matrix.new_empty(spec.weight_shape)
    weight.as_strided(sizes, strides, offset).copy_(matrix.reshape(sizes))
    return weight


def to_matrix(weight: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """A layer's parameters (or gradients) as (groups, P_out, P_in [+ 1]), the bias as last column."""
    matrix = weight_matrix(weight, spec)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias_part(bias, spec).reshape(spec.groups, spec.out_dim, 1)], 2)


def from_matrix(matrix: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """The inverse of `to_matrix`: weight and bias as the framework stores them; parts as `part_of` gives them."""
    if spec.bias is None:
        return matrix_weight(matrix, spec), None
    return matrix_weight(matrix[..., :-1], spec), matrix[..., -1].reshape(-1)
