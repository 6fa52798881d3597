"""Which layers K-FAC covers: they join (raw parameters, tied tables) and leave (missed statistics) in use."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import Coverage, FallbackSpec, LayerSpec, also_read_by, missed_statistics
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.discovery import RAW, discover, spec_of_operation
from algoperf_kfac.pytorch.kinds import KINDS, Watch
from algoperf_kfac.pytorch.operations import Operation
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling
from algoperf_kfac.pytorch.statistics import AnyRecorder, Recorder

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.capture import Capture


class Layers:
    """What K-FAC knows of a model; unlike its namesake in JAX it changes, and holds the states of the layers.

    Attributes:
        params: the parameters to train, by name in the model.
        covered: the covered layers by name, in the order in which refreshes take turns.
        states: by the same names.
        by_weight: the layers' specs, by identity of the weight.
        fallbacks: every other trainable parameter, with the reason.
        missed: what the layers that left had missed, by name.

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
        exclude = list(exclude)
        self.params = dict(params)
        self._config, self._scaling, self._output_splits = config, scaling, dict(output_splits)
        self._kinds = [kind() for kind in KINDS]
        found, self.fallbacks = discover(
            model, config, list(params.values()), exclude, self._output_splits, self._kinds
        )
        for kind in self._kinds:
            kind.begin(model, config, self.fallbacks, exclude)
        self.missed: dict[str, str] = {}
        self.covered: dict[str, CoveredLayer] = {}
        self.states: dict[str, LayerState] = {}
        self.by_weight: dict[int, LayerSpec] = {}
        for layer in found:
            self._add(layer)

    def coverage(self) -> Coverage:
        """The covered layers, and every other trainable parameter with the reason why it is not covered."""
        return Coverage(tuple(layer.spec for layer in self.covered.values()), tuple(self.fallbacks))

    def order(self, names: Iterable[str]) -> None:
        """Let these layers come first, in this order."""
        self.covered = {name: self.covered[name] for name in dict.fromkeys([*names, *self.covered])}

    # Capture.

    def watches(self, capture: Capture) -> list[Watch]:
        """What the kinds of layers have to do within a capture."""
        return [watch for kind in self._kinds if (watch := kind.watch(capture)) is not None]

    def recorder(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool) -> AnyRecorder:
        """What gathers the statistics of a layer; arguments as for `Recorder`."""
        for kind in self._kinds:
            if spec.kind in kind.names:
                return kind.recorder(spec, dtype, one_pass=one_pass)
        return Recorder(spec, dtype, one_pass=one_pass)

    # Joining.

    def promote(self, operation: Operation) -> LayerSpec | None:
        """Cover a raw parameter that an operation with a rule reads."""
        candidates = {f.name for f in self.fallbacks if f.reason == RAW}
        names = {id(p): n for n, p in self.params.items() if n in candidates}
        spec = spec_of_operation(operation, names, self._config, self._output_splits)
        if spec is None:
            return None
        if spec.name in self.covered:  # two raw weights in one module
            spec = dataclasses.replace(spec, name=spec.weight)
        self.adopt(spec)
        return spec

    def adopt(self, spec: LayerSpec) -> None:
        """Cover a layer that took the fallback."""
        joining = {spec.weight, spec.bias}
        self.fallbacks = [f for f in self.fallbacks if f.name not in joining]
        bias = None if spec.bias is None else self.params[spec.bias]
        self._add(CoveredLayer(spec, self.params[spec.weight], bias))

    def _add(self, layer: CoveredLayer) -> None:
        name = layer.spec.name
        self.covered[name] = layer
        self.states[name] = self.zero_state(layer)
        self.by_weight[id(layer.weight)] = layer.spec

    def zero_state(self, layer: CoveredLayer) -> LayerState:
        """A layer's state before its first statistics."""
        return LayerState.zeros(layer.spec, layer.factor_like, self._scaling.keeps(layer.spec, layer.factor_like))

    # Leaving. Warnings name the line that ended the capture.

    def leave_out(self, name: str, what: str) -> None:
        """Move a layer that missed something to the fallback."""
        self.missed[name] = what
        self._demote(name, missed_statistics(what))
        warnings.warn(f"K-FAC: layer {name} missed {what}; it takes the fallback from now on", stacklevel=5)

    def give_up(self, name: str, operation: str) -> None:
        """Move a layer whose weight an operation without a rule reads, too, to the fallback."""
        self._demote(name, also_read_by(operation))
        warnings.warn(
            f"K-FAC: the weight of {name} is also read by {operation}; it takes the fallback", stacklevel=5
        )

    def _demote(self, name: str, reason: str) -> None:
        layer = self.covered.pop(name)
        del self.states[name], self.by_weight[id(layer.weight)]
        for param_name in (layer.spec.weight, layer.spec.bias):
            if param_name is not None:
                shape = tuple(self.params[param_name].shape)
                self.fallbacks.append(FallbackSpec(param_name, shape, reason))

    # State.

    def restore(
        self, specs: Mapping[str, LayerSpec], fallbacks: Iterable[FallbackSpec], missed: Mapping[str, str]
    ) -> None:
        """Cover exactly these layers, in this order, with states as at the beginning."""
        self.fallbacks, self.missed = list(fallbacks), dict(missed)
        old = self.covered
        self.covered, self.states, self.by_weight = {}, {}, {}
        for name, spec in specs.items():
            if name in old:
                self._add(old[name])
            else:
                self.adopt(spec)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: all but what hangs on identities."""
        return {name: value for name, value in vars(self).items() if name != "by_weight"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.by_weight = {id(layer.weight): layer.spec for layer in self.covered.values()}
