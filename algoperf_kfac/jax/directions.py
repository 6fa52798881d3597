"""The directions of one step: NadamW's for every parameter, K-FAC's in place of it for covered layers.

Nothing here waits for the device: whether a K-FAC direction is usable is selected on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.nadamw import nadamw_directions
from algoperf_kfac.jax.preconditioner import LayerState
from algoperf_kfac.jax.reductions import dots, long_norms, nonzero, norms
from algoperf_kfac.jax.scalings import Scaling
from algoperf_kfac.jax.sharding import by_layers
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


def first_order(
    gradients: Sequence[Array],
    momenta: Sequence[Array],
    nu: Sequence[Array],
    plain: Sequence[bool],
    count: Array,
    config: KFACConfig,
) -> tuple[list[Array], list[Array]]:
    """The new second moments and NadamW's directions, parameter by parameter.

    Args:
        gradients: of this step.
        momenta: bias-corrected.
        nu: second moments; of plain parameters a zero in the place of one.
        plain: which parameters do without: covered ones, whose directions `second_order` makes of the momenta
            alone, which stand in for them here.
        count: number of this update, from 1.
        config: the configuration.
    """
    new, directions = list(nu), list(momenta)
    own = [i for i, is_plain in enumerate(plain) if not is_plain]
    some, looking_ahead, old = ([values[i] for i in own] for values in (gradients, momenta, nu))
    moved = nadamw_directions(some, looking_ahead, old, count, config.beta2, config.eps)
    for i, moment, direction in zip(own, *moved, strict=True):
        new[i], directions[i] = moment, direction
    return new, directions


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
    mesh: Mesh | None = None,
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
        absent: of layers in branches, whether the step went by without them, or without which of their slices: as
            idle ones then, if without all.
        mesh: a one-dimensional mesh whose devices share the work; None to do it where the states lie.
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
                part = (jnp.array(called) if part is None else part).at[i].set(~absent[name].all())
        places = _Places(stack, number)
        momentum = places.matrices(momentum_leaves)
        gradient = places.matrices(gradient_leaves)
        direction, kept = by_layers(jax.vmap(scaling.precondition), mesh, states[key], momentum, gradient)
        state = dataclasses.replace(states[key], kept=kept)
        norm = long_norms(direction)
        stand_in = _first_order(momentum, places.matrices(leaves), scaling.config)
        ratio, usable = _lengthened(norm, stand_in, scaling.config)
        useless = ~usable if part is None else ~usable & part
        failed = failed + useless.sum(dtype=jnp.int32)
        if monitor:
            cosine = dots(momentum, direction) / nonzero(norms(momentum) * norm)
            state = dataclasses.replace(state, cosine=cosine)
            if scaling.config.length_rule == "graft":
                state = dataclasses.replace(state, graft_ratio=ratio)
        new_states[key] = state if part is None else select(part, state, states[key])
        steps = jnp.where(broadcast(usable, direction), direction * broadcast(ratio, direction), stand_in)
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
            for position, part in zip(place, layer.parameters(matrix), strict=True):
                if position is not None and part is not None:
                    leaves[position] = part.astype(leaves[position].dtype)


def _first_order(momentum: Array, direction: Array, config: KFACConfig) -> Array:
    """What stands in for K-FAC directions that are of no use, (layers, groups, P_out, P_in).

    Args:
        momentum: what is preconditioned, of that shape.
        direction: NadamW's, of that shape; of no meaning where there are no second moments.
        config: says what lengths directions take.
    """
    if config.length_rule != "rms":
        return direction
    ratio = _ratio_to(config.length_factor, math.prod(momentum.shape[1:]), long_norms(momentum))
    return momentum * broadcast(jnp.nan_to_num(ratio, nan=0.0, posinf=0.0), momentum)


def _lengthened(norm: Array, stand_in: Array, config: KFACConfig) -> tuple[Array, Array]:
    """What K-FAC directions are multiplied by, and which of them are of use, (layers,) each.

    Args:
        norm: their lengths, (layers,).
        stand_in: the first-order directions, (layers, groups, P_out, P_in).
        config: says what lengths they take.
    """
    if config.length_rule == "none":
        return jnp.ones_like(norm), jnp.isfinite(norm)
    length = norms(stand_in)
    # A layer without gradient (all zero) has no direction of either kind, and is not in need of a stand-in.
    ratio = jnp.where(length == 0, length, length / nonzero(norm))
    # Where factors are all but singular a direction may vanish or overflow: the first-order one then stands.
    usable = jnp.isfinite(ratio) & jnp.isfinite(norm) & ((norm != 0) | (length == 0))
    return jnp.where(usable, ratio, 1.0), usable


def _ratio_to(length: float, size: int, norm: Array) -> Array:
    """What gives entries the root mean square `length`; 0 where all are zero, infinite or NaN where it overflows.

    Args:
        length: k; the norm is k sqrt(P_out P_in), then.
        size: number of entries.
        norm: of arrays of that size.
    """
    root = norm / math.sqrt(size)
    return jnp.where(root == 0, 0, length / nonzero(root))
