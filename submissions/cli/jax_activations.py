"""What a JAX model keeps for its backward pass, from the trace of its derivative: nothing is compiled or computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

# Element by element, or a change of shape: XLA fuses these into whatever reads them, forward or backward.
CHEAP = frozenset(
    """
    abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp convert_element_type copy cos div eq erf erf_inv erfc
    exp exp2 expand_dims expm1 floor full_like ge gt integer_pow iota is_finite le log log1p logistic lt max min mul
    ne neg nextafter not or pad pow reduce_precision rem reshape rev round rsqrt select_n sign sin slice sqrt square
    squeeze stop_gradient sub tan tanh transpose xor
    """.split()
)
RENAMES = frozenset({"reshape", "squeeze", "expand_dims", "copy", "stop_gradient"})  # the same memory
# What these read lies in memory, whether or not it could be recomputed.
READERS = frozenset("conv_general_dilated cond dot_general fft gather scan scatter scatter-add sort while".split())
SMALL = 1 / 16  # means over positions and the like, beside an array: not worth counting


class _Array:
    """An array of a program: what made it, from what.

    Attributes:
        bytes: its size.
        maker: name of the operation; empty if it was given.
        inputs: what it was made from.
        is_read: whether a weighted operation reads it.
    """

    def __init__(self, aval: Any, maker: str = "", inputs: Sequence[_Array] = ()) -> None:
        itemsize = getattr(aval.dtype, "itemsize", 0)
        self.bytes = math.prod(aval.shape) * itemsize
        self.maker = maker
        self.inputs = inputs
        self.is_read = False


def activation_bytes(apply: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> float:
    """Bytes of the residuals of `jax.vjp`, each once, less those that follow element by element from others.

    The derivative of an elementwise function keeps several arrays (for x sigmoid(x): x, sigmoid(x) and products of
    the two), of which a compiled program needs one. What a matrix product, convolution or loop makes or reads counts
    if the derivative keeps it.

    Args:
        apply: function of (params, *args).
        params: parameter tree, of arrays or shapes.
        args: arrays or shapes.
    """

    def residuals(params: Any, *args: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda p: apply(p, *args), params)[1])

    closed = jax.make_jaxpr(residuals)(params, *args)
    made: list[_Array] = []
    given = [_Array(v.aval) for v in closed.jaxpr.invars]
    # As keys of a dictionary they have an order, that of the program.
    wanted = set(_run(closed.jaxpr, given, made)) - {None}
    kept = dict.fromkeys(array for array in made if array in wanted)
    # From the last to the first: what a dropped array follows from is dropped only if it follows in turn.
    for array in reversed(list(kept)):
        if not array.is_read and _follows(array, kept):
            del kept[array]
    return float(sum(array.bytes for array in kept))


def _run(jaxpr: Any, inputs: Sequence[_Array | None], made: list[_Array]) -> list[_Array | None]:
    """The outputs of a program, functions that it calls written out; None for literals.

    Args:
        jaxpr: the program.
        inputs: its arguments.
        made: gets every array that it makes, in order.
    """
    values: dict[Any, _Array | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: _Array(v.aval) for v in jaxpr.constvars}

    def read(v: Any) -> _Array | None:
        return None if isinstance(v, Literal) else values[v]

    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, [read(v) for v in eqn.invars]
        called = _called(eqn)
        outputs: Sequence[_Array | None]
        if called is not None:
            outputs = _run(called, operands, made)
        elif name in RENAMES and operands[0] is not None:
            outputs = operands[:1]
        else:
            arrays = [array for array in operands if array is not None]
            if name in READERS:
                for array in arrays:
                    array.is_read = True
            new = [_Array(v.aval, name, arrays) for v in eqn.outvars]
            made += new
            outputs = new
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _called(eqn: Any) -> Any:
    """The program of a function that is called once with the operands as they are, or None."""
    if eqn.primitive.name in READERS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
            return inner
    return None


def _follows(array: _Array, kept: dict[_Array, None]) -> bool:
    """Whether an array can be recomputed element by element from given and other kept ones."""
    if array.maker not in CHEAP:
        return False
    waiting, seen = list(array.inputs), set()
    while waiting:
        source = waiting.pop()
        if source in seen or source in kept or not source.maker or source.bytes <= SMALL * array.bytes:
            continue
        if source.maker not in CHEAP:
            return False
        seen.add(source)
        waiting += source.inputs
    return True
