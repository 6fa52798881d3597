"""The directions of one step: K-FAC's in place of NadamW's for covered layers, with its length.

Nothing here waits for the device: whether a K-FAC direction is usable is selected on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.jax.preconditioner import LayerState
from algoperf_kfac.jax.scalings import Scaling
from algoperf_kfac.jax.stacks import Stack, broadcast, select
from algoperf_kfac.jax.tracing import named_leaves
from algoperf_kfac.jax.types import Tree


class SecondOrder(NamedTuple):
    """The outcome of a step.

    Attributes:
        directions: of all parameters.
        states: by stack.
        stand_ins: how many K-FAC directions were of no use, ().
    """

    directions: Tree
    states: dict[str, LayerState]
    stand_ins: Array


def second_order(
    stacks: Mapping[str, Stack],
    scaling: Scaling,
    gradients: Tree,
    momenta: Tree,
    directions: Tree,
    states: Mapping[str, LayerState],
    *,
    monitor: bool,
    idle: Collection[str] = (),
    absent: Mapping[str, Array] | None = None,
) -> SecondOrder:
    """The directions with those of covered layers replaced.

    Args:
        stacks: the layers.
        scaling: what is applied to momenta.
        gradients: of this step.
        momenta: what is preconditioned.
        directions: first-order ones.
        states: by stack.
        monitor: whether to note ratio and cosine in the states.
        idle: layers that the step did not call: their states stay, their directions mean nothing.
        absent: of layers in branches, whether the step went by without them, () each: as idle ones then.
    """
    absent = absent or {}
    leaves, tree = jax.tree.flatten(directions)
    momentum_leaves, gradient_leaves = jax.tree.leaves(momenta), jax.tree.leaves(gradients)
    number = {name: i for i, name in enumerate(named_leaves(directions))}
    new_states = {}
    failed = jnp.zeros((), jnp.int32)
    for key, stack in stacks.items():
        called = [name not in idle for name in stack.names]
        if not any(called):
            new_states[key] = states[key]
            continue
        # Which of them the step called, (layers,), where it did not call them all.
        part = None if all(called) else jnp.array(called)
        for i, name in enumerate(stack.names):
            if called[i] and name in absent:
                part = (jnp.array(called) if part is None else part).at[i].set(~absent[name])
        places = _Places(stack, number)
        momentum, first_order = places.matrices(momentum_leaves), places.matrices(leaves)
        direction, kept = jax.vmap(scaling.precondition)(states[key], momentum, places.matrices(gradient_leaves))
        state = dataclasses.replace(states[key], kept=kept)
        norm = _long_norms(direction)
        ratio, usable = _graft(norm, first_order, grafting=scaling.config.grafting)
        useless = ~usable if part is None else ~usable & part
        failed = failed + useless.sum(dtype=jnp.int32)
        if monitor:
            cosine = (momentum * direction).sum((1, 2, 3)) / (_norms(momentum) * norm)
            state = dataclasses.replace(state, graft_ratio=ratio, cosine=cosine)
        new_states[key] = state if part is None else select(part, state, states[key])
        steps = jnp.where(broadcast(usable, direction), direction * broadcast(ratio, direction), first_order)
        places.put_back(steps, leaves)
    return SecondOrder(jax.tree.unflatten(tree, leaves), new_states, failed)


class _Places:
    """Where the parameters of a stack's layers stand among the leaves of a tree.

    Args:
        stack: the layers.
        number: of each leaf, by the parameter's name.
    """

    def __init__(self, stack: Stack, number: Mapping[str, int]) -> None:
        self._layers = stack.layers
        self._places = [
            (number[layer.spec.weight], None if layer.spec.bias is None else number[layer.spec.bias])
            for layer in stack.layers
        ]

    def matrices(self, leaves: Sequence[Array]) -> Array:
        """(layers, groups, P_out, P_in)."""
        return jnp.stack(
            [
                layer.matrix(leaves[weight], None if bias is None else leaves[bias])
                for layer, (weight, bias) in zip(self._layers, self._places, strict=True)
            ]
        )

    def put_back(self, matrices: Array, leaves: list[Array]) -> None:
        """Write matrices (layers, groups, P_out, P_in) into the leaves."""
        for layer, place, matrix in zip(self._layers, self._places, matrices, strict=True):
            for position, part in zip(place, layer.view.from_matrix(matrix, layer.bias_shape), strict=True):
                if position is not None and part is not None:
                    leaves[position] = part.astype(leaves[position].dtype)


def _graft(norm: Array, first_order: Array, *, grafting: bool) -> tuple[Array, Array]:
    """What K-FAC directions are multiplied by, and which of them are of use, (layers,) each.

    Args:
        norm: their lengths, (layers,).
        first_order: the first-order directions, (layers, groups, P_out, P_in).
        grafting: whether they take the lengths of those.
    """
    ratio = jnp.ones_like(norm)
    if grafting:
        length = _norms(first_order)
        # A layer without gradient (all zero) has no direction of either kind, and is not in need of a stand-in.
        ratio = jnp.where(length == 0, length, length / norm)
    # Where factors are all but singular a direction may vanish or overflow: the first-order one then stands.
    usable = jnp.isfinite(ratio) & jnp.isfinite(norm)
    return jnp.where(usable, ratio, 1.0), usable


def _norms(matrices: Array) -> Array:
    """(layers,): Frobenius norms of (layers, groups, P_out, P_in)."""
    return jnp.sqrt(jnp.square(matrices).sum((1, 2, 3)))


def _long_norms(matrices: Array) -> Array:
    """As `_norms`, of matrices so long that the squares of their entries may overflow in float32.

    They are: reduce's B of a layer before an instance norm, whose output gradients sum to zero, is rounding alone.
    """
    largest = jnp.abs(matrices).max((1, 2, 3), keepdims=True)
    largest = jnp.maximum(largest, jnp.finfo(matrices.dtype).tiny)
    return largest[:, 0, 0, 0] * _norms(matrices / largest)
