"""What a JAX model keeps for its backward pass, from the trace of its derivative; nothing is compiled."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from algoperf_kfac.jax.types import ApplyFn, Tree

# Element by element, or a change of shape: XLA fuses these into whatever reads them, forward or backward.
# fmt: off
CHEAP = frozenset([
    "abs", "add", "add_any", "and", "atan2", "broadcast_in_dim", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expand_dims", "expm1", "floor", "full_like", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pad", "pow",
    "reduce_precision", "rem", "reshape", "rev", "round", "rsqrt", "select_n", "sign", "sin", "slice", "sqrt",
    "square", "squeeze", "stop_gradient", "sub", "tan", "tanh", "transpose", "xor",
])
# What these read lies in memory, whether or not it could be recomputed.
READERS = frozenset([
    "cond", "conv_general_dilated", "dot_general", "fft", "gather", "scan", "scatter", "scatter-add", "sort",
    "while",
])
# fmt: on
RENAMES = frozenset({"reshape", "squeeze", "expand_dims", "copy", "stop_gradient"})  # the same memory
UNBOUNDED = 2**31 - 1
SMALL = 1 / 16  # means over positions and the like, beside an array: not worth counting


class _Array:
    """An array of a program: what made it, from what.

    Attributes:
        bytes: its size.
        maker: name of the operation; empty if it was given.
        inputs: what it was made from.
        is_read: whether a weighted operation reads it.
    """

    def __init__(self, value: Var, maker: str = "", inputs: Sequence[_Array] = ()) -> None:
        assert isinstance(value.aval, ShapedArray)
        itemsize = getattr(value.aval.dtype, "itemsize", 0)  # keys of random generators have none
        self.bytes = math.prod(value.aval.shape) * itemsize
        self.maker = maker
        self.inputs = inputs
        self.is_read = False


def activation_bytes(apply: ApplyFn, params: Tree, args: Sequence[Tree]) -> float:
    """Bytes of the smallest set of arrays from which the residuals of `jax.vjp` follow element by element.

    The derivative of elementwise functions keeps several arrays where a compiled program needs one: of a normalised
    input x with a ReLU, x - mean, x^2 and a mask, which all follow from x. What a matrix product, convolution or
    loop reads lies in memory anyway: it counts if the derivative keeps it.

    Args:
        apply: function of (params, *args).
        params: parameter tree, of arrays or shapes.
        args: arrays or shapes.
    """

    def residuals(params: Tree, *args: Tree) -> list[Array]:
        return jax.tree.leaves(jax.vjp(lambda p: apply(p, *args), params)[1])

    closed = jax.make_jaxpr(residuals)(params, *args)
    made: list[_Array] = []
    given = [_Array(v) for v in closed.jaxpr.invars]
    wanted = {array for array in _run(closed.jaxpr, given, made) if array is not None and array.maker}
    read = {array for array in wanted if array.is_read}
    return float(sum(array.bytes for array in read)) + _smallest_cut(made, wanted - read, read)


def _smallest_cut(made: Sequence[_Array], wanted: set[_Array], kept: set[_Array]) -> float:
    """Bytes of the arrays to keep, beside those kept and given, for the wanted ones to be recomputed.

    They cut every path of elementwise operations from an array that cannot be recomputed to one that is wanted, and
    the smallest such cut is the largest flow through a network in which an array lets its bytes pass.
    """
    numbers = {array: 2 + 2 * i for i, array in enumerate(made)}  # and the next one for its way out
    unit = max(1.0, sum(array.bytes for array in made) / 1e9)  # the solver takes 32 bits
    edges: dict[tuple[int, int], int] = {}
    for array, number in numbers.items():
        edges[number, number + 1] = 0 if array in kept else round(array.bytes / unit)
        if array in wanted:
            edges[number + 1, 1] = UNBOUNDED
        if array.maker not in CHEAP:
            edges[0, number] = UNBOUNDED
            continue
        for source in array.inputs:
            if source.maker and source.bytes > SMALL * array.bytes:
                edges[numbers[source] + 1, number] = UNBOUNDED
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    size = 2 + 2 * len(made)
    network = csr_matrix((np.array(list(edges.values()), np.int32), (rows, columns)), (size, size))
    return float(unit * maximum_flow(network, 0, 1).flow_value)


def _run(jaxpr: Jaxpr, inputs: Sequence[_Array | None], made: list[_Array]) -> list[_Array | None]:
    """The outputs of a program, functions that it calls written out; None for literals.

    Args:
        jaxpr: the program.
        inputs: its arguments.
        made: gets every array that it makes, in order.
    """
    values: dict[Var, _Array | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: _Array(v) for v in jaxpr.constvars}

    def read(v: Var | Literal) -> _Array | None:
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
            names: list[Hashable] = list(eqn.outvars)
            if name == "scan":
                names[eqn.params["num_carry"] :] = _piled_up(eqn)
            new = {key: _Array(v, name, arrays) for key, v in zip(names, eqn.outvars, strict=True)}
            made += new.values()
            outputs = [new[key] for key in names]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _piled_up(eqn: JaxprEqn) -> Sequence[Hashable]:
    """For each array that a loop piles up, the value in its body: what is piled up twice is one array."""
    body, carries = eqn.params["jaxpr"].jaxpr, eqn.params["num_carry"]
    values = _run(body, [_Array(v) for v in body.invars], [])
    return [v if value is None else value for value, v in zip(values, eqn.outvars, strict=True)][carries:]


def _called(eqn: JaxprEqn) -> Jaxpr | None:
    """The program of a function that is called once with the operands as they are, or None."""
    if eqn.primitive.name in READERS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(eqn.invars):
            return inner
    return None
