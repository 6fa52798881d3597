"""A traced model with a tap behind every use of a covered layer: what the taps collect, and statistics of that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac import errors
from algoperf_kfac.jax.checks import Checks
from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.interpreter import Key, Visitor
from algoperf_kfac.jax.kinds import Kind, Sums, kind_of
from algoperf_kfac.jax.layer_book import CoveredLayer, Layers
from algoperf_kfac.jax.operations import Call, Lookup, Use
from algoperf_kfac.jax.readings import Readings, called_layers, read_calls
from algoperf_kfac.jax.statistics import Statistics, Tap
from algoperf_kfac.jax.tracing import TracedModel
from algoperf_kfac.jax.types import Tree
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Candidates, Layout
from algoperf_kfac.subset import RowLimit

ALL_ROWS = RowLimit()
KindOf: TypeAlias = Callable[[LayerSpec], Kind[Any]]
"""From a layer to its kind."""

AllSums: TypeAlias = Mapping[str, Sums]
"""Per layer, what it collects."""


class TappedModel:
    """A traced model with a tap behind every use of a covered layer.

    Args:
        model: the model.
        layers: from `discover`.
        positions: which positions count, from `as_candidates`.
        checks: collects the layers' products G^T A beside their statistics.
        rows: `KFACConfig.row_limit`.

    Attributes:
        model: the same.
        idle: names of the layers that it does not call.
        penalised: parameters that the loss depends on apart from what the model computes with them.

    Raises:
        MissingStatisticsError: the model calls none of them.
        ValueError: naming a layer that the positions do not fit, or that it reads in other ways than it did.
    """

    def __init__(
        self,
        model: TracedModel,
        layers: Layers,
        positions: Candidates,
        checks: Checks | None = None,
        rows: RowLimit = ALL_ROWS,
    ) -> None:
        self.model = model
        self._kind_of: KindOf = kind_of if checks is None else checks.kind_of
        notes = model.survey()
        self._layers = called_layers(layers.covered, notes)
        self.idle = tuple(layers.covered.keys() - self._layers.keys())
        self._notes = notes
        self._readings = read_calls(self._layers, notes, positions, rows)
        self.penalised = frozenset(notes.penalised)
        # How a layer's first call is read stands for all.
        self._first = {name: next(iter(calls.values())) for name, calls in self._readings.items()}
        read = {name: first for name, first in self._first.items() if self._reads_data(name)}
        self._of_batch = read or self._not_shared()  # a model that closes over its batch reads nothing else
        self._places = {name: self._places_of_data(name) for name in self._first}
        self._reached: set[str] = set()

    def _reads_data(self, name: str) -> bool:
        """Whether a layer sees examples, not only constants or one number for the whole batch (a noise level)."""
        return any(map(self._notes.reads_data, self._notes.calls[self._layers[name].spec.weight]))

    def _not_shared(self) -> dict[str, Reading]:
        """Layers but for those that see fewer rows than all outputs have (a time beside a batch that is closed
        over), of which each is for several examples; all where there are no others."""
        returned = min((shape[0] for shape in self.model.shapes_returned), default=0)
        return {name: first for name, first in self._first.items() if first.total >= returned} or self._first

    def _places_of_data(self, name: str) -> np.ndarray:
        """Which of a layer's examples are the batch's: all but those of calls on constants, as in f(x) - f(0), or
        on a tangent that is the same for all examples. All of them in a layer that reads nothing else."""
        calls = self._readings[name]
        of_data = {reading.place for key, reading in calls.items() if self._notes.reads_data(key)}
        places = np.concatenate([
            reading.place + np.arange(reading.layout.num_examples)
            for reading in {reading.place: reading for reading in calls.values()}.values()
            if not of_data or reading.place in of_data
        ])  # fmt: skip
        return places

    def zeros(self) -> dict[str, Sums]:
        """What the layers collect, at the start of a backward pass."""
        return {
            name: self._kind_of(layer.spec).zeros(layer.spec, layer.slices, self._first[name], layer.dtype)
            for name, layer in self._layers.items()
        }

    def run(self, params: Tree, args: Sequence[Tree], sums: AllSums) -> list[Array]:
        """The flat outputs; the gradient with respect to `sums`, zeros as they are, is what the layers collect."""
        tapper = _Tapper(self._layers, self._readings, sums, self._reached.add, self._kind_of)
        return self.model.run(tapper, params, args, all_uses=self._notes.all_uses)

    def statistics(self, sums: AllSums, normalizer: Array | float | None) -> dict[str, Statistics]:
        """The statistics of one backward pass.

        Args:
            sums: what the layers collected in it.
            normalizer: what the summed loss was divided by; None for the number of examples.
        """
        number = self._num_examples(sums) if normalizer is None else normalizer
        return {
            name: self._kind_of(layer.spec).finalise(
                layer.spec, sums[name], self._first[name], jnp.asarray(number, sums[name].counts.dtype)
            )
            for name, layer in self._layers.items()
        }

    def _num_examples(self, sums: AllSums) -> Array | float:
        """How many examples the batch has that count, as the layer sees them that is the first to read data.

        In layers that see other numbers (experts, windows, nodes) the loss was averaged over no other number.
        """
        number: Array | float = 1.0
        for name, first in reversed(self._of_batch.items()):
            if first.layout.ragged:
                counted = (sums[name].counts > 0).any(0)[self._places[name]].sum()
                number = jnp.where(counted > 0, counted, number)  # in a branch that is not taken there are none
            else:
                number = float(len(self._places[name]))
        return number

    def layouts(self) -> dict[Key, Layout]:
        """By operation, how many examples it sees and how many positions of each, in the layers that it calls."""
        return {key: reading.layout for calls in self._readings.values() for key, reading in calls.items()}

    def numbers(self) -> dict[str, int]:
        """How many examples each layer of data sees, whether they count or not, in the order of the first calls.

        Where that changes nothing but the scale of B (tokens of experts, with expand) a layer is left out.
        """
        free = {
            name
            for name, layer in self._layers.items()
            if layer.spec.approximation == "expand" and self._kind_of(layer.spec).by_row
        }
        return {
            name: len(self._places[name])
            for number, name in enumerate(self._of_batch)
            if not number or name not in free
        }

    def batch_second(self) -> dict[str, tuple[int, int]]:
        """Layers whose second dimension is that of all outputs over examples, and whose first is taken for it.

        By layer the sizes of the two; outputs that have both, such as time-major ones, say nothing.
        """
        shapes = self.model.shapes_returned
        seen = {}
        for name, first in self._of_batch.items():
            layer, key = self._layers[name], next(iter(self._readings[name]))
            rows = self._kind_of(layer.spec).counted(self._notes.uses(layer.spec.weight))[key].rows
            if rows.batch_first or len(rows.leading) < 2 or first.layout.ragged or first.layout.batch_dim:
                continue
            examples, second = rows.leading[:2]
            if shapes and examples != second and all(s[0] == second and examples not in s[1:2] for s in shapes):
                seen[name] = (examples, second)
        return seen

    def more_rows(self) -> tuple[str, int, int] | None:
        """Where all layers see more rows than the model returns: the first layer, its rows and those returned.

        Outputs that have as many in another dimension (time-major ones, pairs) say nothing, nor do layers whose
        rows are known to belong to examples.
        """
        shapes, seen = self.model.shapes_returned, {name: len(self._places[name]) for name in self._of_batch}
        returned = {shape[0] for shape in shapes}
        known = any(first.layout.ragged or first.layout.batch_dim for first in self._of_batch.values())
        if not seen or known or len(returned) != 1 or min(seen.values()) <= min(returned):
            return None
        name, rows = next(iter(seen.items()))
        return None if any(rows in shape for shape in shapes) else (name, rows, min(returned))

    def in_parts(self) -> dict[str, tuple[int, int]]:
        """Layers whose calls have as many rows together as all outputs, where no layer sees all of these.

        By layer, the number of calls (several) and of rows; outputs that have those of every call say nothing.
        """
        shapes = self.model.shapes_returned
        batch = {shape[0] for shape in shapes}
        found, sizes = {}, set[int]()
        for name in self._of_batch:
            layer = self._layers[name]
            uses = self._kind_of(layer.spec).counted(self._notes.uses(layer.spec.weight))
            sizes |= {n for use in uses.values() for n in (*use.rows.leading, math.prod(use.rows.leading))}
            calls = [((use.rows.leading or (1,))[0], self._notes.times(key)) for key, use in uses.items()]
            number, rows = sum(times for _, times in calls), sum(rows * times for rows, times in calls)
            elsewhere = all(not {rows for rows, _ in calls} <= set(shape[1:2]) for shape in shapes)
            if number > 1 and batch == {rows} and elsewhere and not self._first[name].layout.ragged:
                found[name] = (number, rows)
        return found if batch.isdisjoint(sizes) else {}

    def check_reached(self) -> None:
        """Raises MissingStatisticsError, naming the layers, unless backward passes came by all of them."""
        missing = {name: "its output gradients" for name in self._layers if name not in self._reached}
        if missing:
            remedy = "Their outputs do not reach the loss: leave them out with exclude=[...]"
            raise errors.missing_statistics(missing, len(self._layers), remedy)


class _Tapper(Visitor):
    """Puts a tap behind the uses of the covered layers."""

    def __init__(
        self,
        layers: Mapping[str, CoveredLayer],
        readings: Readings,
        sums: AllSums,
        on_backward: Callable[[str], None],
        kind_of: KindOf,
    ) -> None:
        self._kind_of = kind_of
        self._by_weight = {layer.spec.weight: layer for layer in layers.values()}
        self._readings = readings
        self._sums = sums
        self._on_backward = on_backward

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        return self._tapped(call.view.source.name, key, call, jax.lax.stop_gradient(x), out)

    def lookup(self, key: Key, lookup: Lookup, rows: Array, out: Array) -> Array:
        return self._tapped(lookup.source.name, key, lookup, rows, out)

    def _tapped(self, weight: str, key: Key, use: Use, x: Array, out: Array) -> Array:
        layer = self._by_weight.get(weight)
        if layer is None:
            return out
        name = layer.spec.name
        tap = Tap(layer.spec, use, layer.dtype, self._on_backward)
        return self._kind_of(layer.spec).tap(tap, out, x, self._readings[name][key], self._sums[name])

    def sliced(self, names: Sequence[str], length: int) -> AllSums:
        layers = [self._by_weight[name].spec.name for name in names if name in self._by_weight]
        return {
            name: jax.tree.map(lambda t: t.reshape(length, t.shape[0] // length, *t.shape[1:]), self._sums[name])
            for name in layers
        }

    @contextlib.contextmanager
    def slice(self, names: Sequence[str], values: AllSums) -> Iterator[None]:
        before = self._sums
        self._sums = {**before, **values}
        try:
            yield
        finally:
            self._sums = before
