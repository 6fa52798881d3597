"""A model as a program of primitives: what it reads of its parameters, and running it again under a visitor."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from algoperf_kfac.jax import kinds
from algoperf_kfac.jax.dependence import is_within, without_data
from algoperf_kfac.jax.interpreter import Interpreter, Key, Visitor
from algoperf_kfac.jax.operations import Call, Lookup
from algoperf_kfac.jax.sources import Held, Source, is_float
from algoperf_kfac.jax.types import ApplyFn, Tree

_UNBOUND = re.compile(r"unbound axis name: (\w+)")  # what JAX raises where a collective's axis is not there

Leaf: TypeAlias = Array | np.ndarray | jax.ShapeDtypeStruct
"""An array, or its shape."""


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """A model's forward pass on arguments of certain shapes.

    Attributes:
        program: its primitives.
        outputs: shapes of what it returns, as it returns it.
        tags: which of the flat (params, *args) are parameters, and which are held beside data.
        leaves: the flat (params, *args) themselves, or their shapes; without the arguments that are no arrays.
        has_aux: whether it returns (outputs, aux).
        has_data: whether arrays of data are among the arguments; random keys and what is held beside data are none.
        axes: sizes of the axes that are bound for it alone.
        data: which of the flat (params, *args) are arrays of data.
        sources: which of them are these, or what data may be drawn with: random keys, single integers.
    """

    program: ClosedJaxpr
    outputs: Tree
    tags: list[Source | Held | None]
    leaves: list[Leaf]
    has_aux: bool = False
    has_data: bool = True
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    data: Sequence[bool] = ()
    sources: Sequence[bool] = ()

    def run(self, visitor: Visitor, params: Tree, args: Sequence[Tree], *, all_uses: bool = False) -> list[Array]:
        """The flat outputs, the visitor being told of weighted operations on the way; see `Interpreter`."""
        interpreter = Interpreter(visitor, kinds.rules(), all_uses=all_uses)
        leaves = [*jax.tree.leaves(params), *arrays_of(args)]
        with jax.disable_jit(False):  # else a branch that is not taken would have no taps
            return interpreter.run(self.program, leaves, self.tags, self.returned)

    def show(self, visitor: Visitor, *, all_uses: bool = False) -> None:
        """Lead a visitor through the model without computing anything."""
        interpreter = Interpreter(visitor, kinds.rules(), all_uses=all_uses)
        with jax.disable_jit(False):  # as in `_program`
            jax.make_jaxpr(
                lambda *values: interpreter.run(self.program, values, self.tags, self.returned),
                axis_env=list(self.axes.items()),
            )(*self.leaves)

    @property
    def returned(self) -> list[bool]:
        """Which of the flat outputs go into the loss."""
        parts = self.outputs if self.has_aux else (self.outputs, ())
        return [number == 0 for number, part in enumerate(parts) for _ in jax.tree.leaves(part)]

    @property
    def shapes_returned(self) -> list[tuple[int, ...]]:
        """The shapes of the outputs that go into the loss, but for scalars."""
        outputs = zip(self.program.out_avals, self.returned, strict=True)
        return [tuple(out.shape) for out, returned in outputs if returned and out.shape]

    def survey(self) -> Survey:
        """What reads the parameters."""
        names = [tag.name for tag in self.tags if isinstance(tag, Source)]
        notes = Survey(names)
        self.show(notes)
        if not notes.stopped <= notes.calls.keys() | notes.lookups.keys() | notes.other_uses.keys():
            # A layer none of whose outputs reaches the loss is hardly meant: all reads count, and it is missed.
            every = Survey(names, all_uses=True)
            self.show(every, all_uses=True)
            notes = every if every.calls.keys() - notes.calls.keys() else notes
        notes.dataless = without_data(self.program.jaxpr, self.data)
        if not any(notes.reads_data(key) for calls in notes.calls.values() for key in calls):
            # What is drawn with a key are examples (of a generator), where no others are; else it may as well be
            # one number for the whole batch (a time, a level of noise).
            notes.dataless = without_data(self.program.jaxpr, self.sources)
        return notes


class Survey(Visitor):
    """Notes what reads the parameters.

    Args:
        names: of the parameters.
        all_uses: whether it is shown operations from which no gradient comes, too.

    Attributes:
        names, all_uses: the same.
        dataless: operations that read no data, see `dependence`; filled in behind the others.
        calls, lookups: weight -> the operations that read it, in order.
        constant: operations that read nothing but constants, and whether these may be others at every step.
        added: operation -> the parameters that are added to its output as a bias would be.
        bare: operations whose output something reads as it is.
        other_uses: parameter -> the primitives without a rule that read it, in order; and whether they read a
            function of it.
        products: parameters that something without a rule multiplies by, or may.
        stopped: parameters that something reads through which no gradient goes.
        penalised: parameters that the loss depends on apart from what the model computes with them.
        rounding: weight -> the coarsest eps among the dtypes of its operations' inputs and outputs.
        conditions: operations in which a branch is taken.
        loops: operations in which others run several times, and how often.
    """

    def __init__(self, names: Iterable[str], *, all_uses: bool = False) -> None:
        self.names = tuple(names)
        self.all_uses = all_uses
        self.dataless: frozenset[Key] = frozenset()
        self.calls: dict[str, dict[Key, Call]] = {}
        self.lookups: dict[str, dict[Key, Lookup]] = {}
        self.constant: dict[Key, bool] = {}
        self.added: dict[Key, set[Source]] = {}
        self.bare: set[Key] = set()
        self.other_uses: dict[str, dict[str, bool]] = {}
        self.products: set[str] = set()
        self.stopped: set[str] = set()
        self.penalised: set[str] = set()
        self.rounding: dict[str, float] = {}
        self.conditions: set[Key] = set()
        self.loops: dict[Key, int] = {}

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        name = call.view.source.name
        self.calls.setdefault(name, {})[key] = call
        eps = [float(jnp.finfo(t.dtype).eps) for t in (x, out) if jnp.issubdtype(t.dtype, jnp.floating)]
        self.rounding[name] = max([self.rounding.get(name, 0.0), *eps])
        return out

    def lookup(self, key: Key, lookup: Lookup, rows: Array, out: Array) -> Array:
        self.lookups.setdefault(lookup.source.name, {})[key] = lookup
        return out

    def bias(self, key: Key, call: Call, source: Source) -> None:
        self.added.setdefault(key, set()).add(source)

    def without_bias(self, key: Key) -> None:
        self.bare.add(key)

    def constant_input(self, key: Key, *, given: bool) -> None:
        self.constant[key] = given

    def reads_constants(self, weight: str) -> bool:
        """Whether nothing but constants is multiplied by a weight."""
        return self.calls[weight].keys() <= self.constant.keys()

    def reads_data(self, key: Key) -> bool:
        """Whether an operation sees examples: data, or what other operations made of them."""
        return not is_within(key, self.dataless)

    def reads_nothing_new(self, weight: str) -> bool:
        """Whether these constants are the same at every step, too."""
        return self.reads_constants(weight) and not any(self.constant[key] for key in self.calls[weight])

    @property
    def biases(self) -> dict[Key, Source]:
        """Operation -> its bias: a parameter that all that read its output add, so that both have one gradient."""
        return {key: next(iter(s)) for key, s in self.added.items() if len(s) == 1 and key not in self.bare}

    def other_use(self, key: Key, source: Source, what: str, *, computed: bool, product: bool) -> None:
        self.other_uses.setdefault(source.name, {}).setdefault(what, computed)
        if product:
            self.products.add(source.name)

    def without_gradient(self, source: Source) -> None:
        self.stopped.add(source.name)

    def penalty(self, source: Source) -> None:
        self.penalised.add(source.name)

    def conditional(self, key: Key) -> None:
        self.conditions.add(key)

    def is_conditional(self, weight: str) -> bool:
        """Whether a step may go by without the weight: all operations that read it are in branches."""
        keys = [*self.calls.get(weight, {}), *self.lookups.get(weight, {})]
        return all(any(key[:length] in self.conditions for length in range(len(key))) for key in keys)

    def loop(self, key: Key, length: int) -> None:
        self.loops[key] = length

    def times(self, key: Key) -> int:
        """How often an operation runs."""
        return math.prod(self.loops.get(key[:length], 1) for length in range(len(key)))

    def uses(self, weight: str) -> kinds.Uses:
        """All weighted operations that read a parameter."""
        return kinds.Uses(self.calls.get(weight, {}), self.lookups.get(weight, {}))


def trace(
    apply_fn: ApplyFn, params: Tree, args: Sequence[Tree], *, has_aux: bool = False, binds: bool = False
) -> TracedModel:
    """The model as primitives; nothing is computed.

    Args:
        apply_fn: function of (params, *args).
        params: parameter tree, of arrays or shapes.
        args: the other arguments, arrays or shapes. Flags, numbers of Python and strings among them are handed over
            as they are.
        has_aux: whether it returns (outputs, aux).
        binds: whether to stand in for the axes over which the model's collectives run (SyncBatchNorm), where they
            are not bound yet: one device each.

    Raises:
        TypeError: if `apply_fn` is a module instead of a function of parameters, or takes other arguments.
    """
    if not callable(apply_fn) or _is_module(apply_fn):
        raise TypeError(
            f"apply_fn must be a function of (params, *args), got {type(apply_fn).__name__}: for a flax.linen "
            "module pass `lambda params, x: module.apply({'params': params}, x)`, for others (nnx, equinox) split "
            "the module into parameters and a function first"
        )
    check_takes("apply_fn(params, *args)", apply_fn, len(args))
    leaves, tree = jax.tree.flatten(tuple(args))

    def apply(params: Tree, arrays: Sequence[Array]) -> Tree:
        given = iter(arrays)
        return apply_fn(params, *jax.tree.unflatten(tree, [next(given) if is_array(t) else t for t in leaves]))

    arrays = arrays_of(args)
    program, outputs, axes = _program(apply, params, arrays, binds=binds)
    if has_aux and not (isinstance(outputs, tuple) and len(outputs) == 2):
        raise ValueError(f"has_aux: apply_fn must return (outputs, aux), it returned {_kind(outputs)}")
    tags: list[Source | Held | None] = [
        Source(name, tuple(leaf.shape)) if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        for name, leaf in named_leaves(params).items()
    ]
    held = _held(params, args)
    numbers = (jnp.floating, jnp.signedinteger)
    has_data = any(
        tag is None and any(jnp.issubdtype(leaf.dtype, kind) for kind in numbers)
        for tag, leaf in zip(held, arrays, strict=True)
    )
    # Integers among the parameters are buffers (numbers of positions).
    sources = [*(False for _ in tags), *(tag is None for tag in held)]
    leaves_given = [*jax.tree.leaves(params), *arrays]
    data = [source and _is_many(leaf) for source, leaf in zip(sources, leaves_given, strict=True)]
    return TracedModel(program, outputs, [*tags, *held], leaves_given, has_aux, has_data, axes, data, sources)


def _program(
    apply: Callable[[Tree, Sequence[Array]], Tree], params: Tree, arrays: Sequence[Array], *, binds: bool
) -> tuple[ClosedJaxpr, Tree, dict[str, int]]:
    """The primitives of a function of parameters and arrays, the shapes that it returns, and axes bound for it."""
    axes: dict[str, int] = {}
    while True:
        try:
            # Loops stay loops in a process that runs without `jit`, to be looked into: written out, their layers
            # would be read from slices of parameters.
            with jax.disable_jit(False):
                traced = jax.make_jaxpr(apply, axis_env=list(axes.items()), return_shape=True)(params, arrays)
            return *traced, axes
        except NameError as error:
            unbound = _UNBOUND.search(str(error))
            if unbound is None or not binds or unbound[1] in axes:
                raise
            axes[unbound[1]] = 1


def _held(params: Tree, args: Sequence[Tree]) -> list[Held | None]:
    """Which traced leaves of the arguments are held beside data: numbers, and trees like the parameters."""
    structure, shapes = jax.tree.structure(params), [leaf.shape for leaf in jax.tree.leaves(params)]

    def alike(node: Tree) -> bool:
        own: object = jax.tree.structure(node)
        if own != structure or jax.tree_util.treedef_is_leaf(structure):
            return False
        return [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(node)] == shapes

    tags: list[Held | None] = []
    for node in jax.tree.leaves(tuple(args), is_leaf=alike):
        leaves, like = [leaf for leaf in jax.tree.leaves(node) if is_array(leaf)], alike(node)
        tags += [Held(not like) if is_float(leaf) and (like or np.ndim(leaf) == 0) else None for leaf in leaves]
    return tags


def _is_many(leaf: Leaf) -> bool:
    """Whether a leaf may have numbers for each example: it is no single one, nor a random key of the old kind."""
    return len(leaf.shape) > 0 and not (leaf.dtype == jnp.uint32 and leaf.shape == (2,))


def is_array(leaf: object) -> bool:
    """Whether a leaf of the arguments is traced: an array or its shape, but no number of Python, flag or string."""
    return hasattr(leaf, "dtype")


def arrays_of(args: Sequence[Tree]) -> list[Array]:
    """The leaves of the arguments that are traced."""
    return [leaf for leaf in jax.tree.leaves(tuple(args)) if is_array(leaf)]


def _kind(outputs: Tree) -> str:
    """What a function returned, in words."""
    if isinstance(outputs, list | tuple):
        return f"{len(outputs)} values"
    return "one array" if hasattr(outputs, "shape") else f"a {type(outputs).__name__}"


def _is_module(apply_fn: Callable[..., object]) -> bool:
    """Whether it is a module of flax (linen or nnx), equinox or haiku; some can be called like a function."""
    libraries = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox", "haiku"))
    modules = tuple(library.Module for library in libraries if library is not None)
    return hasattr(apply_fn, "apply") or isinstance(apply_fn, modules)


def check_takes(call: str, function: Callable[..., object], count: int) -> None:
    """Whether a function can be called with its first argument and so many others.

    Raises:
        TypeError: if it cannot.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # some that are built in have none
        return
    try:
        signature.bind(*range(1 + count))
    except TypeError as error:
        name = call.partition("(")[0]
        raise TypeError(
            f"{call} with {count} arguments behind the first: {error}. apply_fn and loss_fn both get all arguments "
            f"that are given behind the parameters, used or not: let {name} take them"
        ) from None


def named_leaves(params: Tree, is_leaf: Callable[[object], bool] | None = None) -> dict[str, Leaf]:
    """The leaves of a parameter tree by path, e.g. "encoder/Dense_0/kernel".

    Args:
        params: the tree. Variables of flax.nnx go by their own path, without the attribute of their value.
        is_leaf: what is a leaf besides.

    Raises:
        ValueError: if two have the same path.
    """
    variables = _nnx_variables()
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, variables) or (is_leaf is not None and is_leaf(node))
    )
    leaves: dict[str, Leaf] = {}
    for path, node in nodes:
        name = "/".join(_key(k) for k in path) or "params"
        for leaf in jax.tree.leaves(node, is_leaf=is_leaf) if isinstance(node, variables) else [node]:
            if name in leaves:
                raise ValueError(
                    f"two parameters are called {name}: give one of them, or what it stands in, another key"
                )
            leaves[name] = leaf
    return leaves


def _nnx_variables() -> tuple[type, ...]:
    """What flax.nnx wraps parameters in; empty unless it is loaded."""
    nnx = sys.modules.get("flax.nnx")
    names = ("Variable", "VariableState")  # the second is gone in later releases
    return tuple({getattr(nnx, name) for name in names if isinstance(getattr(nnx, name, None), type)})


def _key(entry: object) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
