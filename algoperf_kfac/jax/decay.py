"""Weight decay by parameter for optax, decoupled or as a prior's gradient; `online` derives both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from algoperf_kfac.jax.tracing import named_leaves
from algoperf_kfac.jax.types import Tree
from algoperf_kfac.online import by_parameter


class DecayState(NamedTuple):
    """State of `decay_by_parameter`.

    Attributes:
        rates: a number for each parameter, float32 (), in their tree.
    """

    rates: Tree


def decay_by_parameter(weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Like `optax.add_decayed_weights`, with a number for each parameter in the state: `set_weight_decay` changes
    it, and no program is compiled anew. To be given to `kfac(layers, config, decay=decay_by_parameter())`.

    Args:
        weight_decay: of all parameters, to begin with.
    """

    def init(params: Tree) -> DecayState:
        return DecayState(jax.tree.map(lambda _: jnp.asarray(weight_decay, jnp.float32), params))

    def update(updates: Tree, state: DecayState, params: Tree | None = None) -> tuple[Tree, DecayState]:
        if params is None:
            raise ValueError("weight decay needs the parameters: update(gradient, state, params)")
        decayed = jax.tree.map(lambda u, p, rate: u + (rate * p).astype(u.dtype), updates, params, state.rates)
        return decayed, state

    return optax.GradientTransformation(init, update)


def set_weight_decay(state: Tree, decays: Mapping[tuple[str, ...], float]) -> Tree:
    """The state of a chain with new weight decays.

    Args:
        state: with one `DecayState` in it.
        decays: by names of parameters, from `OnlineEvidence.weight_decays`. Others keep what they have.

    Raises:
        ValueError: for a state without `DecayState`, or with several, or a name that is no parameter.
    """
    single = by_parameter(decays)
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_decay) if _is_decay(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} states of decay_by_parameter, not one: "
            "kfac(layers, config, decay=decay_by_parameter())"
        )
    rates = found[0].rates
    _check_names(single, rates)
    leaves, tree = jax.tree.flatten(rates)
    values = [
        jnp.asarray(single.get(name, leaf), jnp.float32)
        for name, leaf in zip(named_leaves(rates), leaves, strict=True)
    ]
    new = DecayState(jax.tree.unflatten(tree, values))
    return jax.tree.map(lambda leaf: new if _is_decay(leaf) else leaf, state, is_leaf=_is_decay)


def prior_gradient(params: Tree, decays: Mapping[tuple[str, ...], float]) -> Tree:
    """w theta, to be added to the gradient of the loss; zero for parameters that are in no set.

    Args:
        params: parameters.
        decays: by names of parameters, from `OnlineEvidence.weight_decays`.

    Raises:
        ValueError: for a name that is no parameter.
    """
    single = by_parameter(decays)
    _check_names(single, params)
    leaves, tree = jax.tree.flatten(params)
    scaled = [single.get(name, 0.0) * leaf for name, leaf in zip(named_leaves(params), leaves, strict=True)]
    return jax.tree.unflatten(tree, scaled)


def _is_decay(node: object) -> bool:
    return isinstance(node, DecayState)


def _check_names(decays: Mapping[str, float], params: Tree) -> None:
    known = named_leaves(params)
    for name in decays:
        if name not in known:
            raise ValueError(f"decays: {name!r} is no parameter")
