"""Which dimension of a weighted operation's rows runs over examples: the one that grows with their number.

A program's own order of dimensions does not tell. Under `jax.vmap` over examples, a constant times an example
(`adj @ x`) or the outputs of a scan over time come out as (T, N, features), and samples may stand in front of the
examples. So the model is traced once more with one example more, and what has grown is the dimension over examples.
Examples are taken to be dimension 0 of the arguments and of the outputs. Where that says nothing (sizes written
into the model, rows that no argument brings), nothing is learnt, and dimension 0 stands.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from algoperf_kfac.jax.interpreter import Key
from algoperf_kfac.jax.tracing import Leaf, Survey, TracedModel, arrays_of, is_array, trace
from algoperf_kfac.jax.types import ApplyFn, Sizes, Tree

TRIES = 3  # sizes of arguments that may be the number of examples: each costs a trace


def grown_dims(
    model: TracedModel, notes: Survey, apply_fn: ApplyFn, params: Tree, args: Sequence[Tree]
) -> dict[Key, int]:
    """Operation -> the leading dimension over examples, where that was learnt; nothing is computed.

    Args:
        model: traced, of (params, *args).
        notes: what reads its parameters.
        apply_fn, params, args: as `trace` took them.
    """
    data = _data(model, args)
    outputs = model.shapes_returned
    sizes = _candidates(data, outputs)
    if not _in_doubt(notes, outputs, sizes):
        return {}
    for size in sizes[:TRIES]:
        more = _traced(apply_fn, params, _with_one_more(model, args, size), has_aux=model.has_aux)
        if more is None:
            continue
        after, later = more
        if _is_number_of_examples(outputs, after.shapes_returned, data, alone=len(sizes) == 1):
            return _differences(notes, later)
    return {}


def _held(model: TracedModel, args: Sequence[Tree]) -> list[bool]:
    """Which of the arguments' arrays are held beside data: trees like the parameters, numbers."""
    return [tag is not None for tag in model.tags[len(model.tags) - len(arrays_of(args)) :]]


def _data(model: TracedModel, args: Sequence[Tree]) -> list[Sizes]:
    """The shapes of the arguments' arrays of data."""
    arrays = zip(arrays_of(args), _held(model, args), strict=True)
    return [tuple(leaf.shape) for leaf, held in arrays if not held and leaf.shape and not _is_key(leaf)]


def _is_key(leaf: Leaf) -> bool:
    """Whether an array is one of random keys; raw ones are pairs of numbers, or two of these."""
    raw = leaf.dtype == jnp.uint32 and leaf.shape[-1] in (2, 4)
    return raw or bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended))


def _candidates(data: Iterable[Sizes], outputs: Sequence[Sizes]) -> list[int]:
    """First sizes of the arguments, those first with which outputs begin, or have in an early dimension."""

    def place(size: int) -> float:
        return min((shape.index(size) for shape in outputs if size in shape), default=math.inf)

    return sorted(dict.fromkeys(shape[0] for shape in data), key=place)


def _leading(notes: Survey) -> dict[str, dict[Key, Sizes]]:
    """By parameter the leading sizes of the operations that read it, in order, but for those of convolutions."""
    return {
        name: {
            key: use.rows.leading
            for uses in notes.uses(name)
            for key, use in uses.items()
            if not use.rows.batch_first
        }
        for name in notes.names
    }


def _in_doubt(notes: Survey, outputs: Sequence[Sizes], sizes: Sequence[int]) -> bool:
    """Whether rows may begin with something else than examples.

    They do not where they, and all outputs, begin with one size of the arguments that no other dimension of theirs
    has. This spares most models the trace.
    """
    several = [rows for uses in _leading(notes).values() for rows in uses.values() if len(rows) > 1]
    first = {shape[0] for shape in outputs}
    if not several or not sizes:
        return False
    if len(first) != 1 or not first.issubset(sizes):
        return True
    (size,) = first
    return any(rows[0] != size or size in rows[1:] for rows in several)


def _with_one_more(model: TracedModel, args: Sequence[Tree], size: int) -> tuple[Tree, ...]:
    """The arguments, what begins with `size` being a shape that begins with one more."""
    leaves, tree = jax.tree.flatten(tuple(args))
    held = iter(_held(model, args))

    def more(leaf: Leaf) -> Leaf:
        if next(held) or tuple(leaf.shape[:1]) != (size,):
            return leaf
        return jax.ShapeDtypeStruct((size + 1, *leaf.shape[1:]), leaf.dtype)

    grown: tuple[Tree, ...] = jax.tree.unflatten(tree, [more(t) if is_array(t) else t for t in leaves])
    return grown


def _traced(
    apply_fn: ApplyFn, params: Tree, args: Sequence[Tree], *, has_aux: bool
) -> tuple[TracedModel, Survey] | None:
    """The model on other arguments, and what reads its parameters; None where it does not take them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model says of a size that no batch has
        try:
            model = trace(apply_fn, params, args, has_aux=has_aux, binds=True)
            return model, model.survey()
        except Exception:  # of the user's code, whatever it asks of its arguments
            return None


def _is_number_of_examples(
    before: Sequence[Sizes], after: Sequence[Sizes], data: Sequence[Sizes], *, alone: bool
) -> bool:
    """Whether the size that has grown is that of the examples, as the outputs show it.

    They begin with it; or, if no argument has what stands in front of it (samples drawn in the model), with that.
    Something else has grown where they end with it: it may be the length of sequences that come first.

    Args:
        before, after: shapes of the outputs.
        data: of the arguments.
        alone: whether there is no other size that it could be.
    """
    if list(map(len, before)) != list(map(len, after)):
        return False
    if not before:  # scalars show nothing
        return alone
    grown = [(shape, _grown(shape, more)) for shape, more in zip(before, after, strict=True)]
    if any(0 in dims for _, dims in grown):
        return True
    known = {size for shape in data for size in shape}
    fronts = [shape[: dims[0]] for shape, dims in grown if dims]
    return bool(fronts) and all(known.isdisjoint(front) for front in fronts)


def _grown(before: Sizes, after: Sizes) -> list[int]:
    """The dimensions whose sizes differ."""
    return [dim for dim, (size, other) in enumerate(zip(before, after, strict=True)) if size != other]


def _differences(notes: Survey, more: Survey) -> dict[Key, int]:
    """Operation -> its one leading dimension that has grown, where as many operations read its weight as before."""
    later, found = _leading(more), dict[Key, int]()
    for name, uses in _leading(notes).items():
        others = list(later[name].values())
        if len(others) != len(uses):
            continue
        for (key, rows), other in zip(uses.items(), others, strict=True):
            dims = _grown(rows, other) if len(rows) == len(other) else []
            if len(dims) == 1:
                found[key] = dims[0]
    return found
