"""The usual layer: a weight that linear operations or convolutions share over positions, as in `statistics`."""

from __future__ import annotations

from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax import statistics
from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.kinds._base import Kind
from algoperf_kfac.jax.statistics import LayerSums, Statistics, Tap
from algoperf_kfac.layers import LayerSpec


class SharedWeight(Kind[LayerSums]):
    """Expand or reduce, from inputs and output gradients."""

    names = frozenset({"linear", "conv", "conv_transpose"})

    def zeros(self, spec: LayerSpec, slices: int, reading: Reading, dtype: DTypeLike) -> LayerSums:
        return statistics.zeros(spec, slices, reading, dtype)

    def tap(self, tap: Tap, out: Array, x: Array, reading: Reading, sums: LayerSums) -> Array:
        return statistics.tap(tap, out, x, reading, sums)

    def finalise(self, spec: LayerSpec, sums: LayerSums, reading: Reading, scale: Array | float) -> Statistics:
        return statistics.finalise(spec, sums, reading, scale)
