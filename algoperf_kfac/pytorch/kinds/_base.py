"""What a kind of layer is that the operations' rules do not cover: the interface, and its empty answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import FallbackSpec, LayerSpec
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.operations import Called, Operation
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.statistics import Product, Scalar, Statistics

if TYPE_CHECKING:
    import torch

    from algoperf_kfac.pytorch.observer import Observer


@dataclasses.dataclass(frozen=True)
class Site:
    """A module of the model, for a kind to look at.

    Attributes:
        path: the module's.
        module: itself.
        params: its own parameters that are to be trained, by attribute name.
        owners: by identity of a parameter: all its names in the model.
        config: the configuration.
    """

    path: str
    module: nn.Module
    params: Mapping[str, Tensor]
    owners: Mapping[int, list[str]]
    config: KFACConfig

    def name_of(self, param: Tensor) -> str:
        return self.owners[id(param)][0]

    def is_shared(self, param: Tensor) -> bool:
        """Whether several modules have the parameter."""
        return len(self.owners[id(param)]) > 1


@dataclasses.dataclass(frozen=True)
class Found:
    """What is covered of a module.

    Attributes:
        layers: its covered layers.
        reason: why its other parameters are not.
    """

    layers: list[CoveredLayer]
    reason: str = ""


class Watch:
    """What a kind does within one capture."""

    def called(self, called: Called) -> Any:
        """A function of torch is called: what it returns, or NotImplemented if this is not the kind's business."""
        return NotImplemented

    def settle(self) -> None:
        """The capture is over, its statistics are about to be collected."""


class AnyRecorder(Protocol):
    """Gathers one layer's statistics over its calls in a capture, whatever the layer's kind."""

    @property
    def uses(self) -> tuple[Recorder, ...]:
        """One for each way in which the layer is applied, where compiled graphs may take their sums; or ()."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing was missed."""

    @property
    def missed(self) -> str:
        """What did not come back, of the calls that are part of the sums; empty if all did."""

    @property
    def examples(self) -> Scalar:
        """Examples of the closed groups that count."""

    @property
    def rows(self) -> int:
        """Examples of the closed groups, whether or not any of their positions counts."""

    @property
    def product(self) -> Product | None:
        """G^T A of all calls, if it was asked for."""

    def end_pass(self) -> None:
        """Close one backward pass."""

    def end_group(self) -> None:
        """Close the calls of one forward pass and its backward passes."""

    def note_loss(self, gradient: Tensor | None) -> None:
        """The gradient that the mean of a loss function got in the latest backward pass, None if unknown."""

    def set_aside(self) -> None:
        """Leave out the calls that a gradient with respect to inputs alone went through."""

    def forget_seen(self) -> None:
        """Forget what gradients came back for, as they were cleared."""

    def statistics(self, factor: Scalar, *, by_loss: bool = False) -> Statistics:
        """The sums, output gradients squared multiplied by `factor`; see `LayerSums.statistics`."""

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come."""


class Kind:
    """A kind of layer; one object for each model, kept with the optimizer.

    Attributes:
        names: what `LayerSpec.kind` says of layers that need a recorder of this kind.
    """

    names: tuple[str, ...] = ()

    def cover(self, site: Site) -> Found | None:
        """The layers of a module; None if it is not of this kind."""
        return None

    def begin(
        self, model: nn.Module, config: KFACConfig, fallbacks: Iterable[FallbackSpec], exclude: Iterable[str]
    ) -> None:
        """The model's modules have been gone through.

        Args:
            model: the model, unwrapped.
            config: the configuration.
            fallbacks: the parameters that are not covered.
            exclude: patterns of module paths to leave to the fallback.
        """

    def output_splits(self, operation: Operation, names: Mapping[int, str]) -> dict[str, int]:
        """Into how many parts the outputs of a raw parameter are cut that an operation reads: by layer name.

        Args:
            operation: the operation.
            names: parameter names by identity, of those that may be covered.
        """
        return {}

    def watch(self, observer: Observer) -> Watch | None:
        """What the kind does within a capture that is about to begin; None for nothing."""
        return None

    def recorder(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool, checks: bool) -> AnyRecorder:
        """What gathers the statistics of a layer whose kind is one of `names`; arguments as for `Recorder`."""
        return Recorder(spec, dtype, one_pass=one_pass, checks=checks)

    def zeros(self, spec: LayerSpec, like: Tensor) -> Statistics:
        """The statistics of such a layer that saw nothing."""
        return Statistics.zeros(spec, like)
