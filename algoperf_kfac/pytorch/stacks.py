"""Layers of equal shape as one: what a step multiplies their momenta by lies in one tensor, as groups of one state.

A batched product then serves all of them. States keep views of it in place of tensors of their own, so that nothing
is there twice; what a refresh puts into a state is taken over at the next step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.factors import bias_part, matrix_weight, weight_matrix
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling

LISTS = ("a_basis", "b_basis", "a_values", "b_values", "a_operator", "b_operator")
# A layer with more entries than this, of its weight or of what multiplies it, keeps a device busy by itself.
LARGE = 2**20


class Stack:
    """Layers of equal shape, and with them one state.

    Args:
        members: name, layer and state of each.
        reads: the lists of the states that are laid together; of a single layer they stay where they are.
        beta2: decay of their second moments.

    Attributes:
        names, layers: of the members.
        state: theirs, the layers' groups one after the other; of lists only those that are read.
        refreshed: whether it has a preconditioner.
    """

    def __init__(
        self, members: Sequence[tuple[str, CoveredLayer, LayerState]], reads: Sequence[str], beta2: float
    ) -> None:
        self.names = [name for name, _, _ in members]
        self.layers = [layer for _, layer, _ in members]
        self.beta2 = beta2
        self._states = [state for _, _, state in members]
        self._lists: dict[str, list[list[Tensor]]] = {}
        self.state = self._states[0]
        self.refreshed = self.state.refreshes > 0
        spec = self.layers[0].spec
        # Stored in the order of its matrix.
        self._plain = not spec.layout and spec.kind != "conv_transpose"
        if len(members) > 1 and self.refreshed:
            lists: dict[str, Any] = {field: [] for field in LISTS}
            lists |= {field: self._laid_together(field) for field in reads}
            self.state = dataclasses.replace(self.state, a=[], b=[], kept={}, **lists)

    def _laid_together(self, field: str) -> list[Tensor]:
        parts = [getattr(state, field) for state in self._states]
        groups = self.layers[0].spec.groups
        stacked = [torch.cat(blocks) for blocks in zip(*parts, strict=True)]
        self._lists[field] = [
            [block.narrow(0, number * groups, groups) for block in stacked] for number in range(len(parts))
        ]
        for state, views in zip(self._states, self._lists[field], strict=True):
            setattr(state, field, views)
        return stacked

    def renew(self) -> bool:
        """Take over what was put into the states since; False if its shape is another."""
        for field, lists in self._lists.items():
            for state, views in zip(self._states, lists, strict=True):
                new = getattr(state, field)
                if new is views:
                    continue
                if [_form(t) for t in new] != [_form(t) for t in views]:
                    return False
                for view, tensor in zip(views, new, strict=True):
                    view.copy_(tensor)
                setattr(state, field, views)
        return True

    def weights(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the weights' shapes as (layers groups, P_out, P_in)."""
        spec = self.layers[0].spec
        if not self._plain:
            tensors = [weight_matrix(t, layer.spec) for t, layer in zip(tensors, self.layers, strict=True)]
        return _stacked(tensors).reshape(-1, spec.out_dim, spec.in_dim)

    def biases(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the biases' shapes as (layers groups, P_out, 1)."""
        spec = self.layers[0].spec
        if spec.bias_start is not None:
            tensors = [bias_part(t, layer.spec) for t, layer in zip(tensors, self.layers, strict=True)]
        return _stacked(tensors).reshape(-1, spec.out_dim, 1)

    def matrices(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """Both as (layers groups, P_out, P_in [+ 1]), biases as last column, in the factors' dtype."""
        matrices = self.weights(weights)
        if biases:
            matrices = torch.cat([matrices, self.biases(biases)], 2)
        return matrices.to(self.layers[0].factor_dtype)

    def gradients(self) -> Tensor:
        """Of their parameters, as `matrices`."""
        weights = [layer.weight.grad for layer in self.layers if layer.weight.grad is not None]
        biases = [la.bias.grad for la in self.layers if la.bias is not None and la.bias.grad is not None]
        return self.matrices(weights, biases)

    def directions(self, scaling: Scaling, momentum: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """K-FAC's directions of the layers, or of some that stand side by side.

        Args:
            scaling: the optimizer's.
            momentum: of all layers, (layers groups, P_out, P_in), with biases P_in + 1.
            start, stop: the first of the layers, and the first that is none of them; all by default.
        """
        gradient = self.gradients() if scaling.uses_gradient else momentum
        if start == 0 and stop in (None, len(self.layers)):
            return scaling.precondition(self.state, momentum, gradient, self.beta2)
        groups = self.layers[0].spec.groups
        rows = slice(start * groups, None if stop is None else stop * groups)
        lists: dict[str, Any] = {field: [m[rows] for m in getattr(self.state, field)] for field in self._lists}
        state = dataclasses.replace(self.state, **lists)
        return scaling.precondition(state, momentum[rows], gradient[rows], self.beta2)

    def spread(self, numbers: Tensor) -> Tensor:
        """(layers,) -> (layers groups, 1, 1)."""
        groups = self.layers[0].spec.groups
        return numbers[:, None].expand(-1, groups).reshape(-1, 1, 1)

    def apart(self, matrices: Tensor) -> Sequence[Tensor]:
        """(layers groups, P_out, P_in) -> of each layer, as `factors.matrix_weight` gives them."""
        spec = self.layers[0].spec
        if self._plain:
            return matrices.reshape(-1, *spec.weight_shape).unbind()
        return [
            matrix_weight(matrix, layer.spec)
            for matrix, layer in zip(matrices.split(spec.groups), self.layers, strict=True)
        ]


class Stacks:
    """The covered layers by shape, laid together anew only when layers come or go.

    Args:
        scaling: the optimizer's; one whose `precondition` is not `by_group` gets its layers one by one.
    """

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self._reads: tuple[str, ...] | None = getattr(scaling.precondition, "reads", None)
        self._members: list[Hashable] = []
        self._stacks: list[Stack] = []

    def of(
        self, layers: Mapping[str, CoveredLayer], states: Mapping[str, LayerState], beta2s: Mapping[int, float]
    ) -> list[Stack]:
        """The stacks of a step's layers, with what the latest refreshes made of them.

        Args:
            layers: by name, those that take part in the step.
            states: by name; their lists are replaced by views.
            beta2s: by identity of the weight.
        """
        members: list[Hashable] = [
            (id(layer), id(states[name]), states[name].refreshes > 0, layer.weight.dtype, beta2s[id(layer.weight)])
            for name, layer in layers.items()
        ]
        if members != self._members or not all(stack.renew() for stack in self._stacks):
            alike: dict[Hashable, list[str]] = {}
            for name, layer in layers.items():
                alike.setdefault(self._shape(layer, states[name], beta2s[id(layer.weight)]), []).append(name)
            self._stacks = [
                Stack(
                    [(name, layers[name], states[name]) for name in names],
                    self._reads or (),
                    beta2s[id(layers[names[0]].weight)],
                )
                for names in alike.values()
            ]
            self._members = members
        return self._stacks

    def _shape(self, layer: CoveredLayer, state: LayerState, beta2: float) -> Hashable:
        """What layers of one stack have in common; a layer's own identity where it stays alone."""
        spec = layer.spec
        lists = [getattr(state, field) for field in self._reads or ()] if state.refreshes else []
        entries = [
            spec.groups * spec.out_dim * spec.in_dim,
            *(math.prod(t.shape) for blocks in lists for t in blocks),
        ]
        together = all(t.shape[:1] == (spec.groups,) for blocks in lists for t in blocks)
        if self._reads is None or not together or max(entries) > LARGE:
            return id(layer)
        biased = (layer.bias is not None, None if layer.bias is None else layer.bias.dtype, spec.bias_start is None)
        return (
            *(
                spec.kind,
                spec.weight_shape,
                spec.groups,
                spec.out_dim,
                spec.in_dim,
                bool(spec.layout),
                spec.is_part,
            ),
            *(biased, layer.weight.dtype, layer.weight.device, state.refreshes > 0, beta2),
            tuple(tuple(_form(t) for t in blocks) for blocks in lists),
        )

    def __getstate__(self) -> Scaling:
        """For deepcopy and pickle: what is laid together is so again at the next step."""
        return self.scaling

    def __setstate__(self, scaling: Scaling) -> None:
        self.__init__(scaling)  # type: ignore[misc]


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """With a leading dimension; of one tensor without a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
