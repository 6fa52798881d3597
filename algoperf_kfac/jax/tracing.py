"""A model as a program of primitives: what it reads of its parameters, and running it again under a visitor."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from algoperf_kfac.jax import kinds
from algoperf_kfac.jax.interpreter import Interpreter, Key, Visitor
from algoperf_kfac.jax.operations import Call, Lookup
from algoperf_kfac.jax.sources import Source
from algoperf_kfac.jax.types import ApplyFn, Tree

Leaf: TypeAlias = Array | np.ndarray | jax.ShapeDtypeStruct
"""An array, or its shape."""


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """A model's forward pass on arguments of certain shapes.

    Attributes:
        program: its primitives.
        outputs: shapes of what it returns, as it returns it.
        tags: which of the flat (params, *args) are parameters.
        leaves: the flat (params, *args) themselves, or their shapes.
    """

    program: ClosedJaxpr
    outputs: Tree
    tags: list[Source | None]
    leaves: list[Leaf]

    def run(self, visitor: Visitor, params: Tree, args: Sequence[Tree]) -> list[Array]:
        """The flat outputs, the visitor being told of every weighted operation on the way."""
        interpreter = Interpreter(visitor, kinds.rules())
        return interpreter.run(self.program, jax.tree.leaves((params, *args)), self.tags)

    def show(self, visitor: Visitor) -> None:
        """Lead a visitor through the model without computing anything."""
        interpreter = Interpreter(visitor, kinds.rules())
        jax.eval_shape(lambda *values: interpreter.run(self.program, values, self.tags), *self.leaves)

    def survey(self) -> Survey:
        """What reads the parameters."""
        notes = Survey()
        self.show(notes)
        return notes


class Survey(Visitor):
    """Notes what reads the parameters.

    Attributes:
        calls, lookups: weight -> the operations that read it, in order.
        biases: of operations.
        other_uses: parameter -> the first primitive without a rule that reads it.
    """

    def __init__(self) -> None:
        self.calls: dict[str, dict[Key, Call]] = {}
        self.lookups: dict[str, dict[Key, Lookup]] = {}
        self.biases: dict[Key, Source] = {}
        self.other_uses: dict[str, str] = {}

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        self.calls.setdefault(call.view.source.name, {})[key] = call
        return out

    def lookup(self, key: Key, lookup: Lookup, rows: Array, out: Array) -> Array:
        self.lookups.setdefault(lookup.source.name, {})[key] = lookup
        return out

    def bias(self, key: Key, call: Call, source: Source) -> None:
        self.biases[key] = source

    def other_use(self, key: Key, source: Source, what: str) -> None:
        self.other_uses.setdefault(source.name, what)

    def uses(self, weight: str) -> kinds.Uses:
        """All weighted operations that read a parameter."""
        return kinds.Uses(self.calls.get(weight, {}), self.lookups.get(weight, {}))


def trace(apply_fn: ApplyFn, params: Tree, args: Sequence[Tree]) -> TracedModel:
    """The model as primitives; nothing is computed.

    Args:
        apply_fn: function of (params, *args).
        params: parameter tree, of arrays or shapes.
        args: the other arguments, arrays or shapes.

    Raises:
        TypeError: if `apply_fn` is a module instead of a function of parameters.
    """
    if not callable(apply_fn) or _is_module(apply_fn):
        raise TypeError(
            f"apply_fn must be a function of (params, *args), got {type(apply_fn).__name__}: for a flax.linen "
            "module pass `lambda params, x: module.apply({'params': params}, x)`, for others (nnx, equinox) split "
            "the module into parameters and a function first"
        )
    program, outputs = jax.make_jaxpr(apply_fn, return_shape=True)(params, *args)
    tags: list[Source | None] = [
        Source(name, tuple(leaf.shape)) if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        for name, leaf in named_leaves(params).items()
    ]
    tags += [None] * len(jax.tree.leaves(args))
    return TracedModel(program, outputs, tags, jax.tree.leaves((params, *args)))


def _is_module(apply_fn: Callable[..., object]) -> bool:
    """Whether it is a module of flax (linen or nnx), equinox or haiku; some can be called like a function."""
    libraries = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox", "haiku"))
    modules = tuple(library.Module for library in libraries if library is not None)
    return hasattr(apply_fn, "apply") or isinstance(apply_fn, modules)


def named_leaves(params: Tree) -> dict[str, Leaf]:
    """The leaves of a parameter tree by path, e.g. "encoder/Dense_0/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(_key(k) for k in path) or "params": leaf for path, leaf in leaves}


def _key(entry: object) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
