"""Which layers K-FAC covers: they join (raw parameters, tied tables) and leave (missed statistics) in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import listed, warn
from algoperf_kfac.layers import (
    BIAS_APART,
    RAW,
    REST,
    UNREAD,
    Coverage,
    FallbackSpec,
    LayerSpec,
    Layout,
    computed_before,
    missed_statistics,
    no_rule,
    split_blocks,
)
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.discovery import discover, part_name, spec_of_operation
from algoperf_kfac.pytorch.kinds import KINDS, AnyRecorder, Kind, Watch
from algoperf_kfac.pytorch.kinds.attention import sequence_first
from algoperf_kfac.pytorch.operations import RULES, Operation
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling
from algoperf_kfac.pytorch.statistics import Statistics
from algoperf_kfac.pytorch.views import overlap

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.observer import Observer


_PLAIN = Kind()
_RULED = {function.__name__ for function in RULES}


class Layers:
    """What K-FAC knows of a model; unlike its namesake in JAX it changes, and holds the states of the layers.

    Attributes:
        params: the parameters to train, by name in the model.
        covered: the covered layers by name, in the order in which refreshes take turns.
        states: by the same names.
        by_weight: the layers' specs, by identity of the weight and by layout: parts of a weight are layers.
        fallbacks: every other trainable parameter, with the reason.
        missed: what the layers that left had missed, by name.
        left: names of the layers that left for the fallback.
        left_parameters: names of their parameters.
        seen: names of the layers that some statistics step has seen.
        missed_steps: the statistics steps in a row that went by without a layer, by name.
        sequence_first: names of parameters whose modules say that their inputs are (T, N, features).

    Args:
        model: the bare model.
        config: the configuration.
        scaling: what decides which tensors a layer keeps.
        params: the parameters to train, by name in the model.
        exclude: patterns of module paths to leave to the fallback.
        output_splits: patterns of module paths -> into how many parts their outputs are cut.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KFACConfig,
        scaling: Scaling,
        params: Mapping[str, Tensor],
        exclude: Iterable[str],
        output_splits: Mapping[str, int],
    ) -> None:
        self._exclude = list(exclude)
        self._config, self._scaling, self._output_splits = config, scaling, dict(output_splits)
        self._kinds = [kind() for kind in KINDS]
        config.check_kinds(name for kind in self._kinds for name in kind.names)
        self.params: dict[str, Tensor] = {}
        self.fallbacks: list[FallbackSpec] = []
        self._raw: set[str] = set()  # parameters that an operation with a rule may prove to read
        self.left_parameters: set[str] = set()
        self.missed: dict[str, str] = {}
        self.left: set[str] = set()
        self.seen: set[str] = set()
        self.missed_steps: dict[str, int] = {}
        self.covered: dict[str, CoveredLayer] = {}
        self.states: dict[str, LayerState] = {}
        self.by_weight: dict[int, dict[Layout, LayerSpec]] = {}
        self.extend(model, params)

    def extend(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        """Take in the parameters that are new; what is known stays as it is."""
        new = {name: p for name, p in params.items() if name not in self.params}
        self.params = dict(params)
        self._identities = {id(p) for p in params.values()}
        self.sequence_first = sequence_first(model)
        again = self._waiting({name.rpartition(".")[0] for name in new})
        self.fallbacks = [f for f in self.fallbacks if f.name not in again]
        wanted = [p for name, p in params.items() if name in new or name in again]
        found, fallbacks = discover(model, self._config, wanted, self._exclude, self._output_splits, self._kinds)
        self.fallbacks += fallbacks
        self._raw |= {f.name for f in fallbacks if f.reason == RAW}
        for kind in self._kinds:
            kind.begin(model, self._config, self.fallbacks, self._exclude)
        for layer in found:
            self._add(layer)

    def _waiting(self, modules: Set[str]) -> set[str]:
        """Parameters of these modules that may be covered now that others of their modules are there: biases that
        were trained ahead of their weights."""
        settled = self._raw | self.left_parameters
        return {
            f.name
            for f in self.fallbacks
            if f.name.rpartition(".")[0] in modules and f.name not in settled and f.reason not in (REST, BIAS_APART)
        }

    def let_go(self, names: Iterable[str]) -> None:
        """Forget parameters that the model no longer has, and the layers they were of, of which the rest is new."""
        gone = set(names)
        for name, layer in list(self.covered.items()):
            own = {layer.spec.weight, *([layer.spec.bias] if layer.spec.bias else [])}
            if own & gone:
                gone |= own
                self._drop(name)
                self.seen.discard(name)
        self.fallbacks = [f for f in self.fallbacks if f.name not in gone]
        self._raw -= gone
        self.left_parameters -= gone
        self.params = {name: p for name, p in self.params.items() if name not in gone}

    def names(self) -> set[str]:
        """What a pattern may mean: covered layers, other parameters and the modules they are of."""
        others = {f.name for f in self.fallbacks}
        return {*self.covered, *others, *(name.rpartition(".")[0] for name in others)}

    def coverage(self) -> Coverage:
        """The covered layers, and every other trainable parameter with the reason why it is not covered."""
        return Coverage(tuple(layer.spec for layer in self.covered.values()), tuple(self.fallbacks))

    def idle(self, names: Iterable[str]) -> dict[str, int]:
        """Count a statistics step that saw these layers.

        Returns:
            The layers that no step has seen yet, and how many there were.
        """
        names = set(names)
        self.seen |= names
        for name in self.covered:
            self.missed_steps[name] = 0 if name in names else self.missed_steps.get(name, 0) + 1
        return {name: count for name, count in self.missed_steps.items() if name not in self.seen}

    def order(self, names: Iterable[str]) -> None:
        """Let these layers come first, in this order."""
        self.covered = {name: self.covered[name] for name in dict.fromkeys([*names, *self.covered])}

    # Capture.

    def watches(self, observer: Observer) -> list[Watch]:
        """What the kinds of layers have to do within a capture."""
        return [watch for kind in self._kinds if (watch := kind.watch(observer)) is not None]

    def recorder(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool, checks: bool) -> AnyRecorder:
        """What gathers the statistics of a layer; arguments as for `Recorder`."""
        return self._kind_of(spec).recorder(spec, dtype, one_pass=one_pass, checks=checks)

    def no_statistics(self, name: str) -> Statistics:
        """The statistics of a covered layer that saw nothing."""
        layer = self.covered[name]
        return self._kind_of(layer.spec).zeros(layer.spec, layer.factor_like)

    def _kind_of(self, spec: LayerSpec) -> Kind:
        """What knows how a layer is recorded; the base class for all that is linear."""
        return next((kind for kind in self._kinds if spec.kind in kind.names), _PLAIN)

    def note_readers(self, readers: Mapping[int, str]) -> None:
        """Say of parameters that operations with a rule might have read what did, or that nothing did.

        Args:
            readers: by identity of a parameter: the operation without a rule in which it met data.
        """
        revised = []
        for f in self.fallbacks:
            if f.name in self._raw and f.reason in (RAW, UNREAD):
                reader = readers.get(id(self.params[f.name]))
                f = dataclasses.replace(f, reason=_of_reader(reader))
            revised.append(f)
        self.fallbacks = revised

    def knows(self, weight: Tensor) -> bool:
        """Whether a parameter is one of those to train."""
        return id(weight) in self._identities

    # Joining.

    def promote(self, operation: Operation) -> LayerSpec | None:
        """Cover a raw parameter, or a part of it, that an operation with a rule reads."""
        candidates = self._raw & {f.name for f in self.fallbacks} - self.left_parameters
        names = {id(p): n for n, p in self.params.items() if n in candidates}
        splits = self._output_splits
        for kind in self._kinds:
            known = kind.output_splits(operation, names)
            splits = splits | {pattern: parts for pattern, parts in known.items() if pattern not in splits}
        spec = spec_of_operation(operation, names, self._config, splits)
        if spec is None or any(
            overlap(spec, other) for other in self.by_weight.get(id(operation.weight), {}).values()
        ):
            return None
        spec = dataclasses.replace(spec, name=self._name_of(spec))
        self.adopt(spec)
        return spec

    def _name_of(self, spec: LayerSpec) -> str:
        """The name of a layer that joins: its module's where this is the module's only matrix, else its weight's.

        It depends on what the module has, not on what was used so far, which may differ between processes.
        """
        if spec.is_part:
            # Parts of other sizes may have the same number.
            return spec.name if spec.name not in self.covered else part_name(spec, numbered=False)
        module, own = spec.weight.rpartition(".")[0], self.params[spec.weight]
        others = (p for n, p in self.params.items() if n.rpartition(".")[0] == module and p is not own)
        alone = not any(_is_matrix(p) or not _is_matrix(own) for p in others)
        return spec.name if alone and spec.name not in self.covered else spec.weight

    def take(self, spec: LayerSpec) -> None:
        """Cover a layer as another process does, which was the first to use it."""
        old = self.covered.get(spec.name)
        if old is not None:
            if old.spec == spec:
                return
            del self.by_weight[id(old.weight)][old.spec.layout]
        self.adopt(spec)
        if old is not None and old.spec.bias is not None and spec.bias is None:
            self._leave_rest(old.spec.bias, BIAS_APART)

    def adopt(self, spec: LayerSpec) -> None:
        """Cover a layer that took the fallback."""
        bias = None if spec.bias is None else self.params[spec.bias]
        self._add(CoveredLayer(spec, self.params[spec.weight], bias))
        for name in (spec.weight, spec.bias):
            if name is not None:
                self._leave_rest(name, REST)

    def give_way(self, spec: LayerSpec) -> None:
        """A module's layer that nothing called yet: its weight is read in parts, which may be layers."""
        if spec.name in self.seen or self.states[spec.name].refreshes:
            return
        layer = self._drop(spec.name)
        for name, param in ((spec.weight, layer.weight), (spec.bias, layer.bias)):
            if name is not None and param is not None:
                self._raw.add(name)
                self.fallbacks.append(FallbackSpec(name, tuple(param.shape), RAW))

    def without_bias(self, spec: LayerSpec) -> LayerSpec:
        """A layer that is called without its bias, which is read apart from it: without, if it is still new."""
        if spec.name in self.seen or self.states[spec.name].refreshes or spec.bias is None:
            return spec
        bias, old = spec.bias, self.covered[spec.name]
        in_blocks = split_blocks(spec.in_dim, self._config.max_factor_dim, self._config.large_factor)
        spec = dataclasses.replace(spec, bias=None, bias_start=None, in_blocks=in_blocks)
        self._add(dataclasses.replace(old, spec=spec, bias=None))
        self._leave_rest(bias, BIAS_APART)
        return spec

    def _leave_rest(self, name: str, reason: str) -> None:
        """List what no layer has of a parameter among the fallbacks, and nothing else of it."""
        self.fallbacks = [f for f in self.fallbacks if f.name != name]
        param = self.params[name]
        rest = param.numel()
        for spec in (layer.spec for layer in self.covered.values()):
            if name == spec.weight:
                rest -= spec.groups * spec.out_dim * spec.in_dim
            elif name == spec.bias:
                rest -= spec.groups * spec.out_dim
        if rest:
            self.fallbacks.append(
                FallbackSpec(name, tuple(param.shape) if rest == param.numel() else (rest,), reason)
            )

    def _add(self, layer: CoveredLayer) -> None:
        name = layer.spec.name
        self.covered[name] = layer
        self.states[name] = self.zero_state(layer)
        self.by_weight.setdefault(id(layer.weight), {})[layer.spec.layout] = layer.spec

    def zero_state(self, layer: CoveredLayer) -> LayerState:
        """A layer's state before its first statistics."""
        return LayerState.zeros(layer.spec, layer.factor_like, self._scaling.keeps(layer.spec, layer.factor_like))

    # Leaving.

    def leave_out(self, missing: Mapping[str, str]) -> None:
        """Move layers that missed something to the fallback."""
        self.missed |= missing
        self._leave({name: missed_statistics(what) for name, what in missing.items()})

    def give_up(self, reasons: Mapping[str, str]) -> None:
        """Move layers to the fallback whose statistics would not be the whole of them."""
        self._leave(reasons)

    def _leave(self, reasons: Mapping[str, str]) -> None:
        self.left |= set(reasons)
        alike: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            self._demote(name, reason)
            alike.setdefault(reason, []).append(name)
        for reason, names in alike.items():
            text = f"layer {names[0]} takes" if len(names) == 1 else f"layers {listed(names)} take"
            warn(f"{text} the fallback from now on: {reason}")

    def _demote(self, name: str, reason: str) -> None:
        layer = self._drop(name)
        for param_name in (layer.spec.weight, layer.spec.bias):
            if param_name is not None:
                self._leave_rest(param_name, reason)
                self.left_parameters.add(param_name)

    def _drop(self, name: str) -> CoveredLayer:
        """Cover a layer no longer; its parameters have no place."""
        layer = self.covered.pop(name)
        del self.states[name], self.by_weight[id(layer.weight)][layer.spec.layout]
        self.missed_steps.pop(name, None)
        return layer

    # State.

    def restore(
        self, specs: Mapping[str, LayerSpec], fallbacks: Iterable[FallbackSpec], missed: Mapping[str, str]
    ) -> None:
        """Cover exactly these layers, in this order, with states as at the beginning."""
        self.fallbacks, self.missed = list(fallbacks), dict(missed)
        # Whatever was given up or left out stays so.
        open_to = {RAW, UNREAD, REST}
        self.left_parameters = {f.name for f in self.fallbacks if f.name in self._raw and f.reason not in open_to}
        old = self.covered
        self.covered, self.states, self.by_weight = {}, {}, {}
        for name, spec in specs.items():
            if name in old and old[name].spec == spec:
                self._add(old[name])
            else:
                self.adopt(spec)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: all but what hangs on identities."""
        return {name: value for name, value in vars(self).items() if name not in ("by_weight", "_identities")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.by_weight = {}
        for layer in self.covered.values():
            self.by_weight.setdefault(id(layer.weight), {})[layer.spec.layout] = layer.spec
        self._identities = {id(p) for p in self.params.values()}


def _is_matrix(param: Tensor) -> bool:
    """Whether a parameter is no vector: class tokens are (1, 1, features)."""
    return sum(size > 1 for size in param.shape) > 1


def _of_reader(reader: str | None) -> str:
    """The reason of a raw parameter that is not covered, from the operation in which it met data."""
    if reader is None:
        return UNREAD
    # An operation with a rule would have covered the parameter itself.
    return computed_before(reader) if reader in _RULED else no_rule(reader)
