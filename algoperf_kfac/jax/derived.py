"""What becomes of parameters in equations without a rule: functions of them, penalties, and products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from algoperf_kfac.jax.operations import shape_of
from algoperf_kfac.jax.sources import (
    Derived,
    Fused,
    Held,
    Penalised,
    Selected,
    Source,
    constant_of,
    sources_of,
)

# Element by element: with data of its own size (noise, a mask) a weight stays a weight, until something reads it.
ELEMENTWISE = {"add", "add_any", "clamp", "div", "max", "min", "mul", "pow", "rem", "select_n", "sub"}
# What makes a weight of what it reads, even if that is a function of a parameter: a slice of it, a sum.
PRODUCTS = {
    "dot_general",
    "conv_general_dilated",
    "ragged_dot",
    "ragged_dot_general",
    "triangular_solve",
    *(f"{layout}_dot_general" for layout in ("bcoo", "bcsr")),  # with sparse data
    *(f"{layout}_mat{kind}" for layout in ("coo", "csr") for kind in ("vec", "mat")),
}
# Operations that take entries of a table by numbers that are data.
SELECTIONS = {"gather", "dynamic_slice"}
# Whose programs cannot be looked into.
_KERNELS = {"pallas_call", "ffi_call", "pure_callback", "io_callback"}


def function_of(name: str, tags: Sequence[object], outs: Sequence[Array]) -> Derived | Penalised | None:
    """The outputs as a function of parameters, where no data go into them in a way that would be a use."""
    read = [tag for tag in tags if constant_of([tag]) is None]
    sources = frozenset(source for tag in read for source in sources_of(tag))
    pure = all(isinstance(tag, Source | Fused | Derived) for tag in read)
    if pure and any(isinstance(tag, Held) for tag in tags):
        # What is held may be data, closed over: constant is what has the size of the parameters, or of one number.
        sizes = [math.prod(source.shape) for source in sources]
        pure = name in ELEMENTWISE and outs[0].size in (1, *sizes, sum(sizes))
    mixed = any(isinstance(tag, Derived) and tag.with_data for tag in read)
    if pure:
        return Derived(sources, mixed)
    if all(out.ndim == 0 for out in outs):
        # Multiples of losses with penalties; sums of them are told apart, summand by summand.
        multiple = len(read) == 1 and (name in ("mul", "neg") or (name == "div" and tags[0] is read[0]))
        return Penalised(sources) if multiple and sources and not mixed else None
    # Data of a size that only the weight has: of a scalar or vector nothing could be told.
    of_its_size = any(len(source.shape) > 1 and math.prod(source.shape) == outs[0].size for source in sources)
    if name in ELEMENTWISE and of_its_size and not any(isinstance(tag, Penalised) for tag in read):
        return Derived(sources, with_data=True)
    return None


def is_penalty(tag: object) -> bool:
    """Whether a scalar may be added to a loss without a use of its parameters: no data met them before."""
    return not (isinstance(tag, Derived) and tag.with_data)


def either(tags: Sequence[object]) -> Source | Fused | Derived | None:
    """What one of several values is of the parameters: a parameter where all are the same."""
    if isinstance(tags[0], Source | Fused) and all(tag == tags[0] for tag in tags):
        return tags[0]
    sources = frozenset(source for tag in tags for source in sources_of(tag))
    # As of data: what the branches return besides is not known.
    return Derived(sources, with_data=True) if sources else None


def may_multiply(eqn: JaxprEqn) -> bool:
    """Whether an equation without a rule, or one in it, may be a product that a parameter is the weight of.

    Scales and what is added are no weights, whatever their shape; but a filter of a spectrum is one.
    """
    dtype = getattr(eqn.outvars[0].aval, "dtype", jnp.int32) if eqn.outvars else jnp.int32
    return (eqn.primitive.name == "mul" and jnp.issubdtype(dtype, jnp.complexfloating)) or _holds_product(eqn)


def read_later(eqn: JaxprEqn, tags: Sequence[object]) -> Selected | None:
    """The output of an equation that makes a product together with one that reads it."""
    name, source = eqn.primitive.name, next(iter(sources_of(tags[0])), None)
    # Of a stack, weights are taken by data; what an embedding's rows become is up to the model.
    if name in SELECTIONS and source is not None and len(source.shape) > 2:
        return Selected(source, name)
    if name != "mul":
        return None
    shapes = [shape_of(v) for v in eqn.invars]
    for tag, weight, data in zip(tags, shapes, shapes[::-1], strict=True):
        pairs = dict(enumerate(zip(weight, data, strict=False)))
        shared = frozenset(dim for dim, pair in pairs.items() if min(pair) > 1)
        # Data (N, D, 1) and a weight (D, K), element by element: a product if a sum over D follows.
        if sources_of(tag) and any(w > 1 == d for w, d in pairs.values()):
            return Selected(sources_of(tag)[0], name, shared)
    return None


def completes(eqn: JaxprEqn, tag: Selected) -> bool:
    """Whether an equation makes a product of what it reads."""
    if eqn.primitive.name == "reduce_sum":
        return not tag.shared.isdisjoint(eqn.params["axes"])
    return not tag.shared and eqn.primitive.name in PRODUCTS


def _holds_product(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name in PRODUCTS | _KERNELS:
        return True
    return any(_holds_product(inner) for jaxpr in _programs(eqn.params.values()) for inner in jaxpr.eqns)


def _programs(values: Iterable[object]) -> Iterator[Jaxpr]:
    """The programs among the parameters of an equation, in tuples, too."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _programs(value)
