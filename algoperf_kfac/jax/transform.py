"""K-FAC as an optax transformation: NadamW for every parameter, a K-FAC direction for the covered ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import preconditioner
from algoperf_kfac.jax.directions import second_order
from algoperf_kfac.jax.layer_book import Layers, check_known, check_params
from algoperf_kfac.jax.nadamw import nadamw_directions, nesterov
from algoperf_kfac.jax.preconditioner import LayerState
from algoperf_kfac.jax.refresh import refresh_due
from algoperf_kfac.jax.scalings import scaling_of
from algoperf_kfac.jax.stacks import stack_trees, stacks_of
from algoperf_kfac.jax.statistics import Statistics
from algoperf_kfac.jax.types import Tree

Schedule: TypeAlias = Callable[[Array], Array]
"""An optax schedule."""

Mask: TypeAlias = Tree | Callable[[Tree], Tree] | None
"""What optax.add_decayed_weights takes."""


class KFACState(NamedTuple):
    """State of `scale_by_kfac`; a pytree of arrays alone.

    Attributes:
        steps: updates made so far, int32 ().
        mu: first moments, shapes of the parameters.
        nu: second moments, shapes of the parameters.
        stacks: statistics and preconditioners of the covered layers, layers of equal shape together under the name
            of the first of them; `layer_states` takes them apart.
        stand_ins: K-FAC directions that vanished or overflowed and were replaced by first-order ones, int32 ().
    """

    steps: Array
    mu: Tree
    nu: Tree
    stacks: dict[str, LayerState]
    stand_ins: Array


def scale_by_kfac(
    layers: Layers, config: KFACConfig, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by directions, without learning rate, sign and weight decay.

    Covered layers move along their K-FAC direction, by default with the length of their NadamW update; all other
    parameters take the NadamW update itself. `update` takes the keyword argument `statistics`: those of this step,
    as `value_grad_and_statistics` returns them, or None on steps without. Refreshes happen on steps with
    statistics, layers taking turns; everything that depends on the step number is decided on the device, so that
    `jit` compiles a step with and a step without statistics, once each.

    Args:
        layers: from `discover`.
        config: the configuration.
        mesh: a one-dimensional mesh whose devices share the decompositions.
    """
    beta1 = 1 - config.one_minus_beta1
    stacks = stacks_of(layers)
    scaling = scaling_of(config)

    def init(params: Tree) -> KFACState:
        check_params(layers, params)
        states = {
            key: stack_trees(
                [preconditioner.init_layer(la.spec, la.slices, scaling, stack.dtype) for la in stack.layers]
            )
            for key, stack in stacks.items()
        }
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        return KFACState(jnp.zeros((), jnp.int32), zeros(params), zeros(params), states, jnp.zeros((), jnp.int32))

    def update(
        updates: Tree,
        state: KFACState,
        params: Tree | None = None,
        *,
        statistics: Mapping[str, Statistics] | None = None,
        **extra: object,
    ) -> tuple[Tree, KFACState]:
        del params, extra
        states = state.stacks
        if statistics is not None:
            states = move_averages(states, statistics, layers, config)
            states = refresh_due(states, stacks, state.steps, scaling, mesh)
        count = state.steps + 1
        mu, momenta = nesterov(updates, state.mu, count, beta1)
        nu, directions = nadamw_directions(updates, momenta, state.nu, count, config.beta2, config.eps)
        outcome = second_order(
            stacks, scaling, updates, momenta, directions, states, monitor=statistics is not None
        )
        return outcome.directions, KFACState(count, mu, nu, outcome.states, state.stand_ins + outcome.stand_ins)

    return optax.GradientTransformationExtraArgs(init, update)


def kfac(
    layers: Layers,
    config: KFACConfig,
    *,
    learning_rate: float | Schedule | None = None,
    weight_decay_mask: Mask = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with decoupled weight decay and learning rate: p <- p - lr (direction + weight_decay p).

    Args:
        layers: from `discover`.
        config: the configuration.
        learning_rate: a number or an optax schedule in place of the configuration's.
        weight_decay_mask: as optax.add_decayed_weights takes it.
        mesh: see `scale_by_kfac`.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    return optax.chain(
        scale_by_kfac(layers, config, mesh),
        optax.add_decayed_weights(config.weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(rate),
    )


def move_averages(
    states: Mapping[str, LayerState], statistics: Mapping[str, Statistics], layers: Layers, config: KFACConfig
) -> dict[str, LayerState]:
    """The states with their averages moved towards the statistics of one step.

    Args:
        states: by stack.
        statistics: by layer, from `value_grad_and_statistics`.
        layers: from `discover`.
        config: the configuration.

    Raises:
        ValueError: naming layers that are missing in `statistics` or unknown to K-FAC.
    """
    check_known(layers, set(statistics))
    move = jax.vmap(functools.partial(preconditioner.update_statistics, decay=config.factor_decay))
    return {
        key: move(states[key], stack_trees([statistics[name] for name in stack.names]))
        for key, stack in stacks_of(layers).items()
    }


def find_state(state: Tree) -> KFACState:
    """The `KFACState` inside the state of a chain.

    Raises:
        ValueError: if there is none, or more than one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, KFACState))
    found = [leaf for leaf in leaves if isinstance(leaf, KFACState)]
    if len(found) != 1:
        raise ValueError(f"the optimizer state holds {len(found)} states of K-FAC, not one")
    return found[0]
