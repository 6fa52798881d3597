"""Where a convolution reads its input: patches, and their sums over positions without building them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from algoperf_kfac.jax.types import Sizes

# Above so many kernel offsets, masked sums over patches build the patches instead of one window per offset.
MAX_WINDOWS = 64


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

    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    in_dilation: Sizes
    padding: tuple[tuple[int, int], ...]
    in_size: Sizes
    out_size: Sizes
    groups: int

    def patches(self, x: Array, thinning: int = 1) -> Array:
        """(N, C, *in_size) -> (N, R, groups, P): the unfolded patches, P = C/groups x kernel positions.

        Of every `thinning`-th output position, row by row, the first one first.
        """
        if thinning > 1:
            return self._thinned_patches(x, thinning)
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
        return self._window_sums(x, mask.reshape(n, 1, *self.out_size)).reshape(n, self.groups, -1)

    def _thinned_patches(self, x: Array, thinning: int) -> Array:
        """As `patches`, which would build those of all positions."""
        chosen = np.unravel_index(np.arange(0, math.prod(self.out_size), thinning), self.out_size)
        offsets = np.indices(self.kernel).reshape(len(self.kernel), -1)
        # Where in the padded input each kernel offset reads at each chosen position, (R, kernel positions) each.
        places = [
            p[:, None] * stride + dilation * o
            for p, stride, dilation, o in zip(chosen, self.stride, self.dilation, offsets, strict=True)
        ]
        read = self._padded(x)[(slice(None), slice(None), *places)]  # (N, C, R, kernel positions)
        grouped = read.reshape(len(x), self.groups, -1, *read.shape[2:])
        return jnp.moveaxis(grouped, 3, 1).reshape(len(x), len(places[0]), self.groups, -1)

    def _padded(self, x: Array) -> Array:
        """The input with zeros around and between its entries, as far as kernels read it."""
        config = [(0, 0, 0), (0, 0, 0)]
        for dim in range(len(self.kernel)):
            before, inner = self.padding[dim][0], self.in_dilation[dim] - 1
            reach = self.stride[dim] * (self.out_size[dim] - 1) + self.dilation[dim] * (self.kernel[dim] - 1) + 1
            spread = self.in_dilation[dim] * (self.in_size[dim] - 1) + 1
            config.append((before, reach - before - spread, inner))
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    def _window_sums(self, x: Array, weights: Array) -> Array:
        """(N, C, *in_size) -> (N, C, kernel positions): weighted sums of what each kernel offset reads.

        Args:
            x: the input.
            weights: (N, 1, *out_size).
        """
        padded = self._padded(x)
        dims = tuple(range(2, x.ndim))
        sums = []
        for offset in itertools.product(*(range(k) for k in self.kernel)):
            start = [d * i for d, i in zip(self.dilation, offset, strict=True)]
            stop = [s + st * (o - 1) + 1 for s, st, o in zip(start, self.stride, self.out_size, strict=True)]
            window = lax.slice(padded, (0, 0, *start), (*x.shape[:2], *stop), (1, 1, *self.stride))
            sums.append((window * weights).sum(dims))
        return jnp.stack(sums, -1)
