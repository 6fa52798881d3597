"""What single equations of a program do: to gradients that come back, and to the shapes of what they read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from algoperf_kfac.jax.operations import shape_of
from algoperf_kfac.jax.sources import Fused, Move, Source, aligned
from algoperf_kfac.jax.types import Sizes

# Without gradient: whatever these read, no statistics miss it.
NO_GRADIENT = {"stop_gradient", "round", "floor", "ceil", "sign"}


# Changes of shape, whatever they are to a parameter.
MOVES = {"squeeze", "reshape", "transpose", "rev", "broadcast_in_dim"}


def carrying(jaxpr: Jaxpr, wanted: Sequence[bool]) -> set[Var]:
    """The values of a program from which a gradient may come to one of its outputs that are wanted."""
    live = _inexact(v for v, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted)
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name not in NO_GRADIENT and not live.isdisjoint(eqn.outvars):
            live |= _inexact(eqn.invars)
    return live


def _inexact(values: Iterable[Var | Literal]) -> set[Var]:
    """Those of a program's values that can have a gradient."""
    dtypes = ((v, getattr(v.aval, "dtype", jnp.int32)) for v in values if isinstance(v, Var))
    return {v for v, dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)}


def bind(eqn: JaxprEqn, ins: list[Array]) -> list[Array]:
    """The equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older releases give inner programs apart from the rest.
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *ins, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def moves_of(eqn: JaxprEqn, tag: Source | Fused, shape: Sizes) -> tuple[Move, ...]:
    """What a primitive does to the shape of a parameter, so that it becomes `shape`; nothing if it does more."""
    name, params = eqn.primitive.name, eqn.params
    source = tag.whole if isinstance(tag, Fused) else tag
    scans, sizes = source.scans, source.scanned_sizes
    whole = tuple(range(scans))
    reshape = Move("reshape", (*sizes, *shape))

    def transpose(permutation: Iterable[int]) -> Move:
        return Move("transpose", (*whole, *(scans + d for d in permutation)))

    if name == "squeeze" or (name == "slice" and shape == shape_of(eqn.invars[0])):
        return (reshape,)
    if name == "reshape":
        order = params.get("dimensions")
        return (reshape,) if order is None else (transpose(order), reshape)
    if name == "transpose":
        return (transpose(params["permutation"]),)
    if name == "rev":
        return (Move("rev", tuple(scans + d for d in params["dimensions"])),)
    if name == "broadcast_in_dim":
        dims = tuple(params["broadcast_dimensions"])
        if math.prod(shape) == math.prod(shape_of(eqn.invars[0])) and list(dims) == sorted(dims):
            return (reshape,)
        return (Move("broadcast", (*whole, *(scans + d for d in dims)), (*sizes, *shape)),)
    return ()


def moved_dims(eqn: JaxprEqn, dims: Sizes, after: Sizes) -> Sizes | None:
    """Where some dimensions are after a change of shape that leaves them whole; None after anything else.

    One of size 1 may be gone afterwards.
    """
    name, params, before = eqn.primitive.name, eqn.params, shape_of(eqn.invars[0])
    moved: dict[int, int] = {}
    if name == "broadcast_in_dim":
        moved = dict(enumerate(params["broadcast_dimensions"]))
    elif name in ("squeeze", "reshape"):
        given = params.get("dimensions") if name == "reshape" else None  # before the reshape, a transpose
        order = range(len(before)) if given is None else given
        kept = aligned(tuple(before[d] for d in order), after)
        moved = {order[d]: place for d, place in kept.items()}
        dims = tuple(d for d in dims if d in moved or before[d] > 1)
    elif name == "slice" and before == after:  # of [..., 0], where that is all there is
        return dims
    places = tuple(moved.get(d, -1) for d in dims)
    whole = all(place >= 0 and before[d] == after[place] for d, place in zip(dims, places, strict=True))
    return places if moved and whole else None
