"""The directions of one step: K-FAC's in place of NadamW's for covered layers, with its length.

Nothing here waits for the device: whether a K-FAC direction is usable is selected on it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import preconditioner
from algoperf_kfac.jax.discovery import named_leaves
from algoperf_kfac.jax.preconditioner import LayerState
from algoperf_kfac.jax.stacks import Stack, broadcast

Tree = Any  # a pytree of arrays


def second_order(
    stacks: Mapping[str, Stack],
    config: KFACConfig,
    gradients: Tree,
    momenta: Tree,
    directions: Tree,
    states: Mapping[str, LayerState],
    monitor: bool,
) -> tuple[Tree, dict[str, LayerState], Array]:
    """The directions with those of covered layers replaced, the states, and the number of stand-ins."""
    leaves, tree = jax.tree.flatten(directions)
    number = {name: i for i, name in enumerate(named_leaves(directions))}
    momentum_leaves, gradient_leaves = jax.tree.leaves(momenta), jax.tree.leaves(gradients)
    precondition = jax.vmap(functools.partial(preconditioner.precondition, config=config))
    new_states = {}
    failed = jnp.zeros((), jnp.int32)
    for key, stack in stacks.items():
        places = [
            (number[layer.spec.weight], None if layer.spec.bias is None else number[layer.spec.bias])
            for layer in stack.layers
        ]

        def matrices(values: list[Array], stack: Stack = stack, places: list[Any] = places) -> Array:
            """(layers, groups, P_out, P_in)"""
            wide = [[None if i is None else values[i].astype(stack.dtype) for i in place] for place in places]
            return jnp.stack([la.view.to_matrix(*pair) for la, pair in zip(stack.layers, wide, strict=True)])

        momentum, first_order = matrices(momentum_leaves), matrices(leaves)
        direction, state = precondition(states[key], momentum, matrices(gradient_leaves))
        norm = _long_norms(direction)
        ratio = jnp.ones_like(norm)
        if config.grafting:
            length = _norms(first_order)
            # A layer without gradient (all zero) has no direction of either kind, and is not in need of a stand-in.
            ratio = jnp.where(length == 0, length, length / norm)
        # Where factors are all but singular a direction may vanish or overflow: the first-order one then stands.
        usable = jnp.isfinite(ratio) & jnp.isfinite(norm)
        ratio = jnp.where(usable, ratio, 1.0)
        failed = failed + (~usable).sum(dtype=jnp.int32)
        if monitor:
            cosine = (momentum * direction).sum((1, 2, 3)) / (_norms(momentum) * norm)
            state = state._replace(graft_ratio=ratio, cosine=cosine)
        new_states[key] = state
        steps = jnp.where(broadcast(usable, direction), direction * broadcast(ratio, direction), first_order)
        for layer, place, step in zip(stack.layers, places, steps, strict=True):
            for position, part in zip(place, layer.view.from_matrix(step, layer.bias_shape), strict=True):
                if position is not None and part is not None:
                    leaves[position] = part.astype(leaves[position].dtype)
    return jax.tree.unflatten(tree, leaves), new_states, failed


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
