"""Capture: gradient and curvature statistics of one batch from one forward and one backward pass.

The model is not edited: it is traced to JAX's primitives and evaluated again with a tap behind every weighted
operation of the covered layers (see `interpreter.py`, `statistics.py`). In order: `trace` gives the program,
`read_calls` fits positions to every call in it, `ForwardPass` runs it with taps, and its backward pass collects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var
from jax.typing import DTypeLike

from algoperf_kfac import errors
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import fisher
from algoperf_kfac.jax.checks import Checks, Compared, compare, in_short, is_known
from algoperf_kfac.jax.factors import Reading
from algoperf_kfac.jax.interpreter import Key, Visitor
from algoperf_kfac.jax.kinds import Kind, Sums, kind_of
from algoperf_kfac.jax.layer_book import CoveredLayer, Layers, check_params, paths
from algoperf_kfac.jax.mistakes import Mistakes
from algoperf_kfac.jax.operations import Call, Lookup, Use
from algoperf_kfac.jax.statistics import Gathered, Product, Statistics, Tap
from algoperf_kfac.jax.tracing import Survey, TracedModel, arrays_of, is_array, trace
from algoperf_kfac.jax.trained import put_back, trained
from algoperf_kfac.jax.types import ApplyFn, Loss, LossFn, LossTypeLike, Tree
from algoperf_kfac.layers import LayerSpec, also_read_by
from algoperf_kfac.positions import (
    Candidates,
    PositionsLike,
    Rows,
    as_candidates,
    candidates_for,
    check_fits,
    choose,
)
from algoperf_kfac.subset import limit_for

NOT_CALLED = "The model does not call them with these arguments: leave them out with exclude=[...]"

Readings: TypeAlias = dict[str, dict[Key, Reading]]
"""Per layer, how each of its calls is read."""

KindOf: TypeAlias = Callable[[LayerSpec], Kind[Any]]
"""From a layer to its kind."""

AllSums: TypeAlias = Mapping[str, Sums]
"""Per layer, what it collects."""


ValueGradAndStatistics: TypeAlias = Callable[..., tuple[Tree, Tree, Gathered]]
"""What `value_grad_and_statistics` returns."""


def value_grad_and_statistics(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    layers: Layers,
    config: KFACConfig,
    *,
    has_aux: bool = False,
    loss_type: LossTypeLike | None = None,
    class_dim: int = -1,
    mistakes: Mistakes | None = None,
) -> ValueGradAndStatistics:
    """Like `jax.value_and_grad`, with the statistics of every covered layer.

    Args:
        apply_fn: function of (params, *args) to the model's outputs, or to (outputs, aux) with `has_aux`.
        loss_fn: function of (outputs, *args) to a scalar, the loss averaged over examples; or to a mapping with
            "summed" and "n_valid_examples", as AlgoPerf's loss functions return, whose quotient is the loss.
        layers: from `discover`.
        config: the configuration; `fisher` says whose output gradients make B.
        has_aux: see `apply_fn`.
        loss_type: see `losses.LossType`; needed for fisher="mc" and "exact".
        class_dim: dimension of the outputs over classes, for these; 1 for (N, C, H, W).
        mistakes: what warnings were given so far, if others share them.

    Returns:
        A function of (params, *args, positions=None, loss_normalizer=None, rng=None, loss_mask=None) to
        (loss, gradient, statistics), the loss being (loss, aux) with `has_aux`, and the statistics those of the
        layers that were called, which know the names of the others. `positions` says which positions
        count and to which example they belong: a mask, "gradient", a `Positions`, a sequence of them of which a
        layer takes the first that fits, or a mapping from patterns of layer names to one of those.
        `loss_normalizer` is what the summed loss was divided by, by default the "n_valid_examples" of a mapping or
        else the number of examples, as the layer sees them that is called first. `rng` is the key for fisher="mc",
        `loss_mask` the mask of its labels.

    Raises:
        MissingStatisticsError: (the function) naming layers whose output does not reach the loss, or that ten
            traces did not call; or if none is called.
        ValueError: (the function) for parameters that are not those of `layers`, or positions that do not fit.
    """
    if config.fisher != "empirical" and loss_type is None:
        raise ValueError(f"fisher={config.fisher!r} needs loss_type, e.g. loss_type='softmax_cross_entropy'")

    said = mistakes or Mistakes()

    def run(
        params: Tree,
        *args: Tree,
        positions: PositionsLike | Mapping[str, PositionsLike] | None = None,
        loss_normalizer: Array | float | None = None,
        rng: Array | None = None,
        loss_mask: Array | None = None,
        **named: Tree,
    ) -> tuple[Tree, Tree, Gathered]:
        if named:
            raise TypeError(f"{next(iter(named))}=: arguments of apply_fn are given by position, after params")
        check_params(layers, params)
        model = trace(apply_fn, params, args, has_aux=has_aux)
        # Within a program nothing can be looked at: there `check_gradients` does it, when it is asked.
        wanted = not said.checked and config.fisher == "empirical" and is_known((params, args))
        checks = Checks(kind_of) if wanted else None
        tapped = TappedModel(model, layers, as_candidates(positions), checks, config.statistics_rows)
        said.statistics()
        forward = ForwardPass(tapped, params, args, lambda outputs: loss_fn(outputs, *args), has_aux=has_aux)
        value, n_valid, cotangent = forward.loss()
        said.layers(layers.covered, tapped.idle)
        said.batch_second(tapped.batch_second())
        said.rows(tapped.numbers(), scaled=loss_normalizer is not None or n_valid is not None)
        gradient, sums = forward.backward(cotangent)
        if config.fisher == "empirical":
            normalizer = n_valid if loss_normalizer is None else loss_normalizer
            statistics = tapped.statistics(sums, normalizer)
        else:
            assert loss_type is not None
            draws = fisher.cotangents(config, forward.outputs, forward.floats, loss_type, loss_mask, rng, class_dim)
            # The exact Fisher is the sum over its columns, a sampled one the mean over the draws.
            scale = draws.passes**0.5 if config.fisher == "exact" else 1.0
            statistics = fisher.sweep(
                draws.passes, lambda number: tapped.statistics(forward.backward(draws.cotangent(number))[1], scale)
            )
        tapped.check_reached()
        gradient = put_back(trained(gradient, params), params)
        if checks is not None and is_known((gradient, checks.products)):
            said.gradients(*in_short(checks.compare(layers, gradient, tapped.penalised)))
        return ((value, forward.aux) if has_aux else value), gradient, Gathered(statistics, tapped.idle)

    return run


def check_gradients(
    apply_fn: ApplyFn, loss_fn: LossFn, layers: Layers, params: Tree, *args: Tree, has_aux: bool = False
) -> dict[str, Compared]:
    """G^T A of each layer that the model calls beside its weight's gradient; computed, outside of any program.

    Args:
        apply_fn, loss_fn, layers, has_aux: as for `value_grad_and_statistics`.
        params: parameters.
        *args: the other arguments.

    Raises:
        MissingStatisticsError: as `value_grad_and_statistics`.
    """
    check_params(layers, params)
    checks = Checks(kind_of)
    tapped = TappedModel(trace(apply_fn, params, args, has_aux=has_aux), layers, [], checks)
    leaves, tree = jax.tree.flatten(args)

    @jax.jit
    def run(params: Tree, arrays: list[Array]) -> tuple[Tree, dict[str, Product]]:
        given = iter(arrays)
        args = jax.tree.unflatten(tree, [next(given) if is_array(t) else t for t in leaves])
        forward = ForwardPass(tapped, params, args, lambda outputs: loss_fn(outputs, *args), has_aux=has_aux)
        gradient, sums = forward.backward(forward.loss()[2])
        return put_back(trained(gradient, params), params), checks.products_of(sums)

    gradient, products = run(params, arrays_of(args))
    tapped.check_reached()
    return compare(layers, gradient, products, checks.eps, tapped.penalised)


class TappedModel:
    """A traced model with a tap behind every use of a covered layer.

    Args:
        model: the model.
        layers: from `discover`.
        positions: which positions count, from `as_candidates`.
        checks: collects the layers' products G^T A beside their statistics.
        rows: `KFACConfig.statistics_rows`.

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
        rows: int | None = None,
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
        self._reached: set[str] = set()

    def zeros(self) -> dict[str, Sums]:
        """What the layers collect, at the start of a backward pass."""
        return {
            name: self._kind_of(layer.spec).zeros(layer.spec, layer.slices, self._first[name], layer.dtype)
            for name, layer in self._layers.items()
        }

    def run(self, params: Tree, args: Sequence[Tree], sums: AllSums) -> list[Array]:
        """The flat outputs; the gradient with respect to `sums`, zeros as they are, is what the layers collect."""
        return self.model.run(
            _Tapper(self._layers, self._readings, sums, self._reached.add, self._kind_of), params, args
        )

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
        """How many examples the batch has that count, as the layer sees them that is called first.

        In layers that see other numbers (experts, windows, nodes) the loss was averaged over no other number.
        """
        number: Array | float = 1.0
        for name in reversed(self._layers):
            first = self._first[name]
            if first.layout.ragged:
                counted = (sums[name].counts > 0).any(0).sum()
                number = jnp.where(counted > 0, counted, number)  # in a branch that is not taken there are none
            else:
                number = float(first.total)
        return number

    def numbers(self) -> dict[str, int]:
        """How many examples each layer sees, whether they count or not, in the order of the first calls.

        Where that changes nothing but the scale of B (tokens of experts, with expand) a layer is left out.
        """
        free = {
            name
            for name, layer in self._layers.items()
            if layer.spec.approximation == "expand" and self._kind_of(layer.spec).by_row
        }
        return {
            name: first.total
            for number, (name, first) in enumerate(self._first.items())
            if not number or name not in free
        }

    def batch_second(self) -> dict[str, tuple[int, int]]:
        """Layers whose second dimension is that of all outputs over examples, and whose first is taken for it.

        By layer the sizes of the two; outputs that have both, such as time-major ones, say nothing.
        """
        outputs = zip(self.model.program.out_avals, self.model.returned, strict=True)
        shapes = [tuple(out.shape) for out, returned in outputs if returned and out.shape]
        seen = {}
        for name, layer in self._layers.items():
            key, first = next(iter(self._readings[name].items()))
            rows = self._kind_of(layer.spec).counted(self._notes.uses(layer.spec.weight))[key].rows
            if rows.batch_first or len(rows.leading) < 2 or first.layout.ragged or first.layout.batch_dim:
                continue
            examples, second = rows.leading[:2]
            if shapes and examples != second and all(s[0] == second and examples not in s[1:2] for s in shapes):
                seen[name] = (examples, second)
        return seen

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


class ForwardPass:
    """The forward pass of a statistics step.

    Args:
        tapped: the model.
        params: its parameters.
        args: its other arguments.
        loss_of: from the outputs to the loss.
        has_aux: whether the model returns something beside the outputs.

    Attributes:
        floats: the leaves of the outputs that the loss is differentiated by.
        backward: from their cotangents to the gradient and what the layers collect.
        aux: what the model returns beside its outputs; None for nothing.
    """

    def __init__(
        self,
        tapped: TappedModel,
        params: Tree,
        args: Sequence[Tree],
        loss_of: Callable[[Tree], Loss],
        *,
        has_aux: bool,
    ) -> None:
        shapes = tapped.model.outputs[0] if has_aux else tapped.model.outputs
        # Outputs that the loss does not read have no gradient: nor do the layers behind them.
        used = used_outputs(loss_of, shapes)

        def forward(params: Tree, sums: AllSums) -> tuple[list[Array], tuple[list[Array | None], Tree]]:
            flat = tapped.run(params, args, sums)
            returned = jax.tree.unflatten(jax.tree.structure(tapped.model.outputs), flat)
            outputs, aux = returned if has_aux else (returned, None)
            leaves = jax.tree.leaves(outputs)
            floats = [t for t, is_used in zip(leaves, used, strict=True) if is_used]
            others = [None if is_used else t for t, is_used in zip(leaves, used, strict=True)]
            return floats, (others, aux)

        self._loss_of = loss_of
        self._tree = jax.tree.structure(shapes)
        self.floats, self.backward, (self._others, self.aux) = jax.vjp(
            forward, params, tapped.zeros(), has_aux=True
        )

    def outputs(self, floats: list[Array]) -> Tree:
        """The outputs, with `floats` in the place of the leaves that the loss is differentiated by."""
        values = iter(floats)
        return jax.tree.unflatten(self._tree, [next(values) if t is None else t for t in self._others])

    def loss(self) -> tuple[Array, Array | None, list[Array]]:
        """The loss, the number of examples that count where it is told, and the cotangents of `floats`."""

        def loss(floats: list[Array]) -> tuple[Array, Array | None]:
            return scalar(self._loss_of(self.outputs(floats)))

        (value, n_valid), cotangent = jax.value_and_grad(loss, has_aux=True)(self.floats)
        return value, n_valid, cotangent


def scalar(loss: Loss) -> tuple[Array, Array | None]:
    """The loss, and the number of examples that count where it is told.

    Raises:
        ValueError: it is neither a scalar nor what AlgoPerf's loss functions return.
    """
    if isinstance(loss, Mapping) and {"summed", "n_valid_examples"} <= loss.keys():
        return loss["summed"] / loss["n_valid_examples"], loss["n_valid_examples"]
    shape = getattr(loss, "shape", None)
    if shape != ():
        what = f"an array of shape {shape}" if shape is not None else f"a {type(loss).__name__}"
        raise ValueError(
            f"loss_fn returned {what}: it must return a scalar, the loss averaged over examples, or a mapping with "
            "'summed' and 'n_valid_examples'. Metrics are computed from the outputs, or returned by apply_fn as aux"
            " (has_aux=True)"
        )
    return cast("Array", loss), None


def used_outputs(loss_of: Callable[[Tree], Loss], shapes: Tree) -> list[bool]:
    """Which leaves of the outputs are floating and go into the loss."""
    jaxpr = jax.make_jaxpr(lambda outputs: scalar(loss_of(outputs)))(shapes).jaxpr
    needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    return [v in needed and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in jaxpr.invars]


def called_layers(layers: Mapping[str, CoveredLayer], notes: Survey) -> dict[str, CoveredLayer]:
    """The layers that the model calls with these arguments, in the order of `layers`.

    Raises:
        MissingStatisticsError: it calls none of them.
        ValueError: naming a layer that it reads in ways that it did not when K-FAC was made.
    """
    called = {name: layer for name, layer in layers.items() if layer.spec.weight in notes.calls}
    for name, layer in layers.items():
        weight, bias = layer.spec.weight, layer.spec.bias
        reader = next((next(iter(notes.other_uses[p])) for p in (weight, bias) if p in notes.other_uses), None)
        if name not in called and weight in notes.lookups:
            reader = reader or "lookups alone"
        for key, call in notes.calls.get(weight, {}).items():
            source = notes.biases.get(key)
            if bias is not None and (source is None or source.name != bias):
                reader = reader or "a call without its bias"
            if (call.view.groups, call.view.out_dim) != (layer.view.groups, layer.view.out_dim):
                reader = reader or "a call in another layout"
        if reader is not None:
            raise ValueError(
                f"layer {name} is {also_read_by(reader)}. It was not when K-FAC was made: make it with arguments "
                f"like these, or with exclude=[{name!r}]"
            )
    if layers and not called:
        raise errors.missing_statistics(dict.fromkeys(layers, "inputs"), len(layers), NOT_CALLED)
    return called


def idle_layers(
    apply_fn: ApplyFn, layers: Layers, params: Tree, *args: Tree, has_aux: bool = False
) -> tuple[str, ...]:
    """The layers that the model does not call with these arguments; it is traced, not run.

    Raises:
        MissingStatisticsError: it calls none of them.
        ValueError: naming a layer that it reads in ways that it did not when K-FAC was made.
    """
    check_params(layers, params)
    called = called_layers(layers.covered, trace(apply_fn, params, args, has_aux=has_aux).survey())
    return tuple(name for name in layers.covered if name not in called)


def read_calls(
    layers: Mapping[str, CoveredLayer], notes: Survey, positions: Candidates, limit: int | None
) -> Readings:
    """Fit the positions to every call of every layer.

    Calls with equal numbers of examples see the same examples, others see others.

    Args:
        layers: the layers.
        notes: what the model does with them.
        positions: which positions count.
        limit: `KFACConfig.statistics_rows`.

    Raises:
        ValueError: naming a layer that the positions do not fit, or positions that fit no layer.
    """
    uses = {name: kind_of(layer.spec).counted(notes.uses(layer.spec.weight)) for name, layer in layers.items()}
    rows = {name: [use.rows for use in of_layer.values()] for name, of_layer in uses.items()}
    check_fits(positions, rows, {path for name in notes.names for path in paths(name)})
    readings: Readings = {}
    for name, layer in layers.items():
        of_calls = {key: _read(name, positions, use.rows, layer.dtype) for key, use in uses[name].items()}
        sizes = tuple(dict.fromkeys(reading.layout.num_examples for reading in of_calls.values()))
        # Of the rows of experts some may have few: all are taken.
        own = None if kind_of(layer.spec).by_row else limit_for(limit, candidates_for(name, positions))
        readings[name] = {key: reading.among(sizes, own) for key, reading in of_calls.items()}
    return readings


def _read(name: str, positions: Candidates, rows: Rows, dtype: DTypeLike) -> Reading:
    """Fit the positions to one call of a layer, segment ids of several dimensions first."""
    for one in candidates_for(name, positions):
        reading = Reading.of_segments(one, rows, name, dtype)
        if reading is not None:
            return reading
    return Reading.of(choose(name, positions, rows), rows, name, dtype)
