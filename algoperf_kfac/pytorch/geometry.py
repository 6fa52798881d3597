"""Where a convolution reads: patches, and sums over them that never build them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a patch matrix built at once by expand; bounds the peak memory, not the result.
MAX_PATCH_ELEMENTS = 2**24


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
            every: tuple[EllipsisType | slice, ...] = (..., *(slice(None, None, s) for s in self.stride))
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
        slices: list[EllipsisType | slice] = [...]
        for dim, i in enumerate(offset):
            i = self.kernel[dim] - 1 - i if self.transposed else i
            start, stride = self.dilation[dim] * i, self._read_stride(dim)
            slices.append(slice(start, start + stride * (self.out_size[dim] - 1) + 1, stride))
        return padded[tuple(slices)]

    def patches(self, padded: Tensor, groups: int, thinning: int = 1) -> Tensor:
        """(N, C, *padded) -> (N, R, groups, P): the unfolded patches, P = C/groups x kernel positions.

        Of every `thinning`-th output position, row by row, the first one first.

        In memory features come first and positions last, whose neighbours are neighbours in the input, too: rows
        of an image are copied whole, where patches one after the other would be copied a kernel's width at a time.
        """
        windows = padded
        dims = len(self.kernel)
        for dim in range(dims):
            span = self.dilation[dim] * (self.kernel[dim] - 1) + 1
            windows = windows.unfold(2 + dim, span, self._read_stride(dim))[..., :: self.dilation[dim]]
        if thinning > 1:
            numbers = torch.arange(0, math.prod(self.out_size), thinning, device=padded.device)
            behind = [math.prod(self.out_size[dim + 1 :]) for dim in range(dims)]
            places = [numbers // step % size for step, size in zip(behind, self.out_size, strict=True)]
            chosen: tuple[slice | Tensor, ...] = (slice(None), slice(None), *places)
            windows = windows[chosen]
        # Positions are the dimensions behind the channels, all of them or one.
        last = windows.dim() - dims
        laid = windows.permute(1, *range(last, last + dims), 0, *range(2, last)).contiguous()
        if self.transposed:
            laid = laid.flip(tuple(range(1, 1 + dims)))
        by_feature = laid.reshape(groups, -1, len(padded), -(-math.prod(self.out_size) // thinning))
        return by_feature.permute(2, 3, 0, 1)

    def weight_gradient(self, x: Tensor, grad: Tensor, groups: int) -> Tensor:
        """(N, C, *in_size), (N, C_out, *out_size) -> (groups, P_out, P): the weight's gradient as a matrix.

        From input and output gradient, by the convolution's own backward pass: patches are not built.
        """
        padded, dims = self.padded(x), len(self.kernel)
        zeros, stride = [0] * dims, [self._read_stride(dim) for dim in range(dims)]
        like = padded.new_empty(grad.shape[1], x.shape[1] // groups, *self.kernel)
        _, weight, _ = torch.ops.aten.convolution_backward(
            grad, padded, like, None, stride, zeros, self.dilation, False, zeros, groups, (False, True, False)
        )
        if self.transposed:
            weight = weight.flip(tuple(range(2, 2 + dims)))
        return weight.reshape(groups, grad.shape[1] // groups, -1)

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
        if mask is None and math.prod(self.kernel) == 1:
            return self.window(self.padded(x), [0] * len(self.kernel)).flatten(2).sum(2).reshape(n, groups, -1)
        if mask is None:
            for dim in range(len(self.kernel)):
                x = torch.tensordot(x, self.indicator(dim, x), dims=([2], [1]))
            return x.reshape(n, groups, -1)
        padded = self.padded(x)
        offsets = list(itertools.product(*(range(k) for k in self.kernel)))
        if x.shape[1] * math.prod(self.out_size) <= math.prod(padded.shape[2:]):
            weight = mask.unsqueeze(-1)
            windows = [self.window(padded, offset).flatten(2) @ weight for offset in offsets]
            return torch.cat(windows, -1).reshape(n, groups, -1)
        step = max(1, MAX_PATCH_ELEMENTS // (len(offsets) * math.prod(padded.shape[2:])))
        sums = []
        for rows, weights in zip(padded.split(step), mask.split(step), strict=True):
            reads = rows.new_zeros(len(rows), len(offsets), *rows.shape[2:])
            for i, offset in enumerate(offsets):
                self.window(reads[:, i : i + 1], offset).copy_(weights.reshape(len(rows), 1, *self.out_size))
            sums.append(rows.flatten(2) @ reads.flatten(2).transpose(1, 2))
        return torch.cat(sums).reshape(n, groups, -1)
