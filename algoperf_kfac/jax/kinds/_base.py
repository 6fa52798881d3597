"""What capture and discovery ask of a kind of layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac.jax import statistics
from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.operations import Call, Lookup, Rule, Use, WeightView
from algoperf_kfac.jax.statistics import Product, Statistics, Tap
from algoperf_kfac.jax.types import Sizes
from algoperf_kfac.layers import LayerSpec


class Uses(NamedTuple):
    """The weighted operations that read one parameter, in order."""

    calls: dict[Key, Call]
    lookups: dict[Key, Lookup]


class Sums(Protocol):
    """What a layer collects in a backward pass: a pytree of arrays."""

    @property
    def counts(self) -> Array:
        """(slices, examples): positions that count."""


S = TypeVar("S", bound=Sums)


class Kind(Generic[S]):
    """A kind of layer, which collects sums of the type S.

    Attributes:
        names: `LayerSpec.kind` of its layers.
        rules: by primitive, operations that only this kind knows; see `operations.Rule`.
        has_bias: whether the bias that its operations add is part of the layer.
        by_row: whether a row is an example of its own by nature: with expand, how rows are put together changes
            nothing but the scale of B.
        product_in_a: whether A stands for the whole product of both factors, B being the identity.
    """

    names: frozenset[str]
    rules: Mapping[str, Rule] = {}
    has_bias = True
    by_row = False
    product_in_a = False

    def claims(self, uses: Uses) -> bool:
        """Whether a weight with these uses, at least one call among them, is of this kind."""
        return self.name_of(uses) in self.names

    def name_of(self, uses: Uses) -> str:
        """`LayerSpec.kind` of a layer with these uses."""
        return next(iter(uses.calls.values())).kind

    def slices(self, view: WeightView) -> int:
        """How many layers a weight holds whose rows are counted apart."""
        return math.prod(view.source.scanned_sizes)

    def misfit(self, view: WeightView, weight_shape: Sizes) -> str:
        """Why a weight that was claimed cannot be covered; empty if it can."""
        return ""

    def counted(self, uses: Uses) -> dict[Key, Use]:
        """The uses whose statistics count."""
        return {**uses.calls}

    def zeros(self, spec: LayerSpec, slices: int, reading: Reading, dtype: DTypeLike) -> S:
        """For a layer to collect its sums in, at the start of a backward pass.

        Args:
            spec: the layer; its groups include the slices.
            slices: number of layers that the parameter holds, 1 if none.
            reading: how its calls are read.
            dtype: at least float32.
        """
        raise NotImplementedError

    def tap(self, tap: Tap, out: Array, x: Array, reading: Reading, sums: S) -> Array:
        """The output of one use, unchanged; its backward pass adds to the layer's sums.

        Args:
            tap: the layer and the use.
            out: the output.
            x: the input, or the row numbers of a lookup.
            reading: how the rows of the use are read.
            sums: the layer's.
        """
        raise NotImplementedError

    def product(self, tap: Tap, x: Array, gradient: Array) -> Product:
        """What one use adds to the gradient of the weight, from its input and output gradient."""
        return statistics.product(tap, x, gradient)

    def finalise(self, spec: LayerSpec, sums: S, reading: Reading, scale: Array | float) -> Statistics:
        """Statistics of one backward pass from the sums of all uses in it.

        Args:
            spec: the layer.
            sums: what it collected.
            reading: how its uses are read.
            scale: what output gradients are multiplied by to belong to the summed, per-example loss.
        """
        raise NotImplementedError
