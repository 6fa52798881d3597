"""K-FAC as an optax transformation: NadamW for every parameter, a K-FAC direction for the covered ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import preconditioner
from algoperf_kfac.jax.directions import first_order, second_order
from algoperf_kfac.jax.layer_book import Layers, check_known, check_params, check_real, put_in
from algoperf_kfac.jax.mistakes import Mistakes
from algoperf_kfac.jax.nadamw import nesterov
from algoperf_kfac.jax.preconditioner import LayerState
from algoperf_kfac.jax.promotion import with_promotion
from algoperf_kfac.jax.refresh import States, refresh_due
from algoperf_kfac.jax.scalings import scaling_of
from algoperf_kfac.jax.stacks import Stack, Stacks, check_members, members_of, select, stack_trees, stacks_of
from algoperf_kfac.jax.statistics import Gathered, Statistics
from algoperf_kfac.jax.tracing import named_leaves
from algoperf_kfac.jax.trained import are_trained, dtype_of, put_back, trained, zeros_like
from algoperf_kfac.jax.types import Tree

Schedule: TypeAlias = Callable[[Array], Array]
"""An optax schedule."""

Program = TypeVar("Program")

Mask: TypeAlias = Tree | Callable[[Tree], Tree] | None
"""What optax.add_decayed_weights takes."""


# Restored without a template, a state is nested dictionaries.
NO_STATE = (
    "the optimizer's state is a {}, not a KFACState: restore it with a template, such as a fresh state: "
    "checkpointer.restore(path, optimizer.init(params)); or from_orbax(optimizer.init(params), restored), which "
    "also takes what version 0.1.0 saved"
)


class KFACState(NamedTuple):
    """State of `scale_by_kfac`; a pytree of arrays alone.

    Attributes:
        steps: updates made so far, int32 ().
        mu: first moments, shapes of the parameters.
        nu: second moments, shapes of the parameters; with length="rms" a zero () for each of a covered layer.
        stacks: statistics and preconditioners of the covered layers, layers of equal shape together under the name
            of the first of them, with the layers' names; `layer_states` takes them apart.
        stand_ins: K-FAC directions that vanished or overflowed and were replaced by first-order ones, int32 ().
    """

    steps: Array
    mu: Tree
    nu: Tree
    stacks: Stacks
    stand_ins: Array


def _kept_by_names(make: Callable[[frozenset[str]], Program]) -> Callable[[frozenset[str]], Program]:
    """A function of names that makes each program once.

    Not by `functools.cache`, of which a closure cannot be pickled by cloudpickle, as those of optax can.
    """
    kept: dict[frozenset[str], Program] = {}

    def program(names: frozenset[str]) -> Program:
        if names not in kept:
            kept[names] = make(names)
        return kept[names]

    return program


def scale_by_kfac(
    layers: Layers, config: KFACConfig, mesh: Mesh | None = None, mistakes: Mistakes | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by directions, without learning rate, sign and weight decay.

    Covered layers move along their K-FAC direction, by default with the length of their NadamW update
    (`KFACConfig.length`); all other parameters take the NadamW update itself. `update` takes the keyword argument
    `statistics`: those of this step, as `value_grad_and_statistics` returns them, or None on steps without. Layers
    that a step did not call get no update: the statistics know which they are, on steps without them the argument
    `idle` says it (`KFAC.idle`). Refreshes happen on steps with statistics, layers taking turns; everything that
    depends on the step number is decided on the device, so that `jit` compiles a step with and a step without
    statistics, once each.

    Args:
        layers: from `discover`.
        config: the configuration.
        mesh: a one-dimensional mesh whose devices share decompositions and directions.
        mistakes: what warnings were given so far, if it is not to be that of `layers`.
    """
    beta1 = 1 - config.one_minus_beta1
    scaling = scaling_of(config)
    said = mistakes or layers.mistakes

    @_kept_by_names
    def refreshed(names: frozenset[str]) -> Callable[[States, Array, Array | None], States]:
        """Refreshes the layers of these names.

        One program that is kept: outside of `jit` the loops of `refresh_due` would be compiled anew at every step.
        """
        stacks = stacks_of(layers.only(names))
        return jax.jit(lambda states, count, pace: refresh_due(states, stacks, count, scaling, mesh, pace))

    def new_states(stack: Stack) -> LayerState:
        """Of layers that are alike at the beginning."""
        layer = stack.layers[0]
        one = preconditioner.init_layer(layer.spec, layer.slices, scaling, stack.dtype)
        states: LayerState = jax.tree.map(lambda leaf: jnp.tile(leaf, (len(stack.layers), *[1] * leaf.ndim)), one)
        return states

    @_kept_by_names
    def beginning(names: frozenset[str]) -> Callable[[], States]:
        """The states of the layers of these names at the beginning.

        One program: one by one each kind of array is compiled for itself, for seconds.
        """
        stacks = stacks_of(layers.only(names))
        return jax.jit(lambda: {key: new_states(stack) for key, stack in stacks.items()})

    def init(params: Tree) -> KFACState:
        check_params(layers, params)
        check_real(named_leaves(params))
        here = layers.within(params)
        stacks = stacks_of(here)
        states = beginning(frozenset(here.covered))()
        zeros = functools.partial(jax.tree.map, zeros_like)
        nothing = jax.tree.map(lambda leaf: jnp.zeros((), dtype_of(leaf)), params)
        nu = put_in(zeros(params), nothing, here.without_second_moment(config))
        pace = None if config.refresh_budget is None else jnp.ones((), jnp.int32)
        held = Stacks(states, members_of(stacks), masked=here is not layers, pace=pace)
        # Two arrays: what is shared cannot be donated.
        steps, stand_ins = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return KFACState(steps, zeros(params), nu, held, stand_ins)

    def update(
        updates: Tree,
        state: KFACState,
        params: Tree | None = None,
        *,
        statistics: Mapping[str, Statistics] | None = None,
        idle: Collection[str] = (),
        **extra: object,
    ) -> tuple[Tree, KFACState]:
        del params, extra
        if not isinstance(state, KFACState):
            raise ValueError(NO_STATE.format(type(state).__name__))
        here = layers.within(state.mu)
        stacks = stacks_of(here)
        check_members(state.stacks, stacks)
        without = here.without_second_moment(config)
        _check_moments(state, without)
        states: Mapping[str, LayerState] = state.stacks
        pace = state.stacks.pace
        if pace is None and config.refresh_budget is not None:  # restored from a run without
            pace = jnp.ones((), jnp.int32)
        if statistics is None:
            said.without_statistics()
        else:
            said.statistics()
            idle = _idle(statistics, idle)
            check_known(layers, {*statistics, *idle})
            states = move_averages(states, statistics, here, config)
            states = refreshed(frozenset(here.covered))(dict(states), state.steps, pace)
        count = state.steps + 1
        gradients = trained(updates, state.mu)
        mu, momenta = nesterov(gradients, trained(state.mu, state.mu), count, beta1)
        names = jax.tree.unflatten(jax.tree.structure(state.mu), list(named_leaves(state.mu)))
        plain = [name in without for name in trained(names, state.mu)]
        nu, directions = first_order(gradients, momenta, trained(state.nu, state.mu), plain, count, config)
        gradients, momenta, directions, mu, nu = (
            put_back(leaves, state.mu) for leaves in (gradients, momenta, directions, mu, nu)
        )
        absent = _absent(here, updates)
        outcome = second_order(
            *(stacks, scaling, gradients, momenta, directions, states),
            monitor=statistics is not None,
            idle=idle,
            absent=absent,
            mesh=mesh,
        )
        still = here.parameters_of(idle)
        mu, nu = (
            _kept(put_in(new, old, still), old, here, absent) for new, old in ((mu, state.mu), (nu, state.nu))
        )
        directions = _stopped(outcome.directions, still)
        if absent:
            directions = _kept(directions, jax.tree.map(jnp.zeros_like, directions), here, absent)
        new = Stacks(outcome.states, members_of(stacks), masked=here is not layers, pace=pace)
        return directions, KFACState(count, mu, nu, new, state.stand_ins + outcome.stand_ins)

    return optax.GradientTransformationExtraArgs(with_promotion(init), with_promotion(update))


def kfac(
    layers: Layers,
    config: KFACConfig,
    *,
    learning_rate: float | Schedule | None = None,
    weight_decay_mask: Mask = None,
    decay: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    mistakes: Mistakes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with decoupled weight decay and learning rate: p <- p - lr (direction + weight_decay p).

    Args:
        layers: from `discover`.
        config: the configuration.
        learning_rate: a number or an optax schedule in place of the configuration's.
        weight_decay_mask: as optax.add_decayed_weights takes it.
        decay: a decay of other form in place of the configuration's, such as `decay.decay_by_parameter()`.
        mesh, mistakes: see `scale_by_kfac`.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    return optax.chain(
        scale_by_kfac(layers, config, mesh, mistakes),
        _decay(layers, decay or optax.add_decayed_weights(config.weight_decay, weight_decay_mask)),
        optax.scale_by_learning_rate(rate),
    )


def _decay(layers: Layers, decay: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A decay for what moves: neither whole numbers nor layers that a step did not call."""
    if not all(jnp.issubdtype(dtype, jnp.inexact) for _, dtype in layers.shapes.values()):
        decay = optax.masked(decay, are_trained)  # whole numbers, rounded down, would decay

    def update(
        updates: Tree,
        state: optax.OptState,
        params: Tree | None = None,
        *,
        statistics: Mapping[str, Statistics] | None = None,
        idle: Collection[str] = (),
        **extra: object,
    ) -> tuple[Tree, optax.OptState]:
        decayed, state = decay.update(updates, state, params)
        here = layers.within(updates)
        decayed = _kept(decayed, updates, here, _absent(here, updates))
        return _stopped(decayed, here.parameters_of(_idle(statistics, idle))), state

    return optax.GradientTransformationExtraArgs(decay.init, with_promotion(update))


def _check_moments(state: KFACState, without: Collection[str]) -> None:
    """Refuse a state that was made with another `KFACConfig.length`.

    Args:
        state: the optimizer's.
        without: names of the parameters that are to have no second moment.

    Raises:
        ValueError: naming a parameter whose second moment is there and should not, or is not and should.
    """
    nu = named_leaves(state.nu)
    for name, moment in named_leaves(state.mu).items():
        if nu[name].shape != (() if name in without else moment.shape):
            kept = "keeps no second moment" if name in without else "needs the second moment"
            raise ValueError(
                f"the optimizer's state is of another length: this one {kept} of {name}, and the state's has the "
                f"shape {tuple(nu[name].shape)}. Go on with the length it was made with, or start from "
                "optimizer.init(params)"
            )


def _idle(statistics: Mapping[str, Statistics] | None, idle: Collection[str]) -> set[str]:
    """The layers that a step did not call: those that its statistics know of, and those that are said to be."""
    return {*idle, *(statistics.idle if isinstance(statistics, Gathered) else ())}


def _absent(layers: Layers, updates: Tree) -> dict[str, Array]:
    """Of layers that are called in branches alone, whether a step went by without them.

    Args:
        layers: the layers.
        updates: gradients, or directions made of them: then all of a layer's are exactly zero.

    Returns:
        () each; with the leading sizes of its parameters for one that holds a layer in each slice.
    """
    if not any(layer.conditional for layer in layers.covered.values()):
        return {}
    leaves = named_leaves(updates)
    return {
        name: _all_zero([jnp.asarray(leaves[p]) for p in layers.parameters_of([name])], layer.scans)
        for name, layer in layers.covered.items()
        if layer.conditional
    }


def _all_zero(leaves: Sequence[Array], scans: int) -> Array:
    """Whether all entries of the parameters of a layer are zero, slice by slice where it has a layer in each."""
    return ~jnp.stack([jnp.any(leaf != 0, axis=tuple(range(scans, leaf.ndim))) for leaf in leaves]).any(0)


def _kept(tree: Tree, other: Tree, layers: Layers, absent: Mapping[str, Array]) -> Tree:
    """A tree with the leaves of another one for the parameters of layers that a step went by without."""
    owners = {parameter: name for name in absent for parameter in layers.parameters_of([name])}
    if not owners:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    given = zip(named_leaves(tree), leaves, jax.tree.leaves(other), strict=True)

    def chosen(name: str, new: Array, old: Array) -> Array:
        if name not in owners:
            return new
        without = absent[owners[name]]
        return jnp.where(without.reshape(*without.shape, *[1] * (new.ndim - without.ndim)), old, new)

    kept = [chosen(name, new, old) for name, new, old in given]
    return jax.tree.unflatten(structure, kept)


def _stopped(updates: Tree, names: Collection[str]) -> Tree:
    """Updates with zeros for some parameters."""
    return put_in(updates, jax.tree.map(jnp.zeros_like, updates), names) if names else updates


def move_averages(
    states: Mapping[str, LayerState], statistics: Mapping[str, Statistics], layers: Layers, config: KFACConfig
) -> Stacks:
    """The states with their averages moved towards the statistics of one step; those of other layers are left out.

    Args:
        states: by stack.
        statistics: by layer, from `value_grad_and_statistics`; a layer without keeps its averages.
        layers: from `discover`.
        config: the configuration.

    """
    move = jax.vmap(functools.partial(preconditioner.update_statistics, decay=config.factor_decay))
    stacks = stacks_of(layers)
    moved = {}
    for key, stack in stacks.items():
        state, called = states[key], [name in statistics for name in stack.names]
        seen = jnp.array(called)
        for i, (name, layer) in enumerate(zip(stack.names, stack.layers, strict=True)):
            if layer.conditional and called[i]:  # a branch that is not taken counts no examples
                seen = seen.at[i].set((statistics[name].examples > 0).any())
        if any(called):
            filling = statistics[stack.names[called.index(True)]]
            new = move(state, stack_trees([statistics.get(name, filling) for name in stack.names]))
            state = new if all(called) else select(jnp.array(called), new, state)
        moved[key] = dataclasses.replace(state, idle=jnp.where(seen, 0, state.idle + 1))
    return Stacks(moved, members_of(stacks))


def _is_restored(node: object) -> bool:
    """Whether a node was a `KFACState` before it was saved."""
    return isinstance(node, Mapping) and node.keys() == set(KFACState._fields)


def find_state(state: Tree) -> KFACState:
    """The `KFACState` inside the state of a chain.

    Raises:
        ValueError: if there is none, or more than one, or one of several members or devices.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, KFACState) or _is_restored(s))
    if any(map(_is_restored, leaves)):
        raise ValueError(NO_STATE.format("dict"))
    found = [leaf for leaf in leaves if isinstance(leaf, KFACState)]
    if len(found) != 1:
        remedy = ": hand over one of them, of optax.multi_transform state.inner_states[label]" if found else ""
        raise ValueError(f"the optimizer state holds {len(found)} states of K-FAC, not one{remedy}")
    if members := np.shape(found[0].steps):
        raise ValueError(
            f"the optimizer state is {' x '.join(map(str, members))} states, as jax.vmap over an ensemble and "
            f"jax.pmap have them: look at one, jax.tree.map(lambda leaf: leaf[{', '.join('0' for _ in members)}], "
            "state)"
        )
    return found[0]
