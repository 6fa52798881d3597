"""Patches of convolutions of every geometry."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import Array, lax

from algoperf_kfac.jax.geometry import ConvGeometry
from tests.jax import naive
from tests.jax.support import examples


@st.composite
def geometries(draw: st.DrawFn) -> ConvGeometry:
    dims = draw(st.sampled_from([1, 1, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, in_dilation = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(1, 3)
    in_size = sizes(1, 4)
    padding = tuple((draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in range(dims))
    out = []
    for k, s, d, i, n, (before, after) in zip(kernel, stride, dilation, in_dilation, in_size, padding, strict=True):
        extent = (n - 1) * i + 1 + before + after - (d * (k - 1) + 1)
        assume(extent >= 0 and (n - 1) * i + 1 + min(before, 0) + min(after, 0) > 0)
        out.append(extent // s + 1)
    return ConvGeometry(
        kernel, stride, dilation, in_dilation, padding, in_size, tuple(out), draw(st.integers(1, 3))
    )


@examples(15)
@given(geometries(), st.integers(0, 9), st.integers(2, 5))
def test_patches(conv: ConvGeometry, seed: int, thinning: int) -> None:
    """Unfolded patches, all and some, and their sums, with and without a mask, against one entry at a time; and the
    geometry against JAX's own convolution."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 2 * conv.groups, *conv.in_size))
    expected = naive.patches(conv, x)
    mask = rng.integers(0, 2, expected.shape[:2]).astype(float)
    weight = rng.standard_normal((conv.groups, 3, expected.shape[-1]))

    @jax.jit
    def compute(x: Array, mask: Array, weight: Array) -> tuple[Array, Array, Array, Array, Array]:
        out = lax.conv_general_dilated(
            x, weight.reshape(conv.groups * 3, 2, *conv.kernel), conv.stride, conv.padding, conv.in_dilation,
            conv.dilation, feature_group_count=conv.groups,
        )  # fmt: skip
        return conv.patches(x), conv.patches(x, thinning), conv.patch_sums(x, None), conv.patch_sums(x, mask), out

    patches, thinned, sums, masked_sums, out = compute(x, mask, weight)
    np.testing.assert_allclose(patches, expected, atol=1e-14)
    np.testing.assert_array_equal(thinned, expected[:, ::thinning])
    np.testing.assert_allclose(sums, expected.sum(1), atol=1e-12)
    np.testing.assert_allclose(masked_sums, np.einsum("nrgp,nr->ngp", expected, mask), atol=1e-12)
    product = np.einsum("nrgp,gop->ngor", expected, weight).reshape(out.shape)
    np.testing.assert_allclose(out, product, atol=1e-12)
