"""Which operations of a program read data: examples, and what was made of them, even if weights came in between.

The others see no examples, but one row for the whole batch: constants, tangents of `jax.jvp` that are the same for
all examples, and the layers that such values go on to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from algoperf_kfac.jax.interpreter import CALLS, REMAT, Key


def without_data(program: Jaxpr, data: Sequence[bool]) -> frozenset[Key]:
    """The operations that read no data; those nested in one of them are not named.

    Args:
        program: of primitives.
        data: which of its inputs are data.
    """
    found: set[Key] = set()
    _follow(program, data, (), found.add)
    return frozenset(found)


def is_within(key: Key, operations: frozenset[Key]) -> bool:
    """Whether an operation is one of some others, or nested in one."""
    return any(key[:length] in operations for length in range(1, len(key) + 1))


def _follow(program: Jaxpr, data: Sequence[bool], key: Key, tell: Callable[[Key], None]) -> list[bool]:
    """Which outputs are made of data.

    Args:
        program, data: see `without_data`.
        key: of the operation that it is nested in.
        tell: is told of operations that read none.
    """
    fed = {v for v, is_data in zip(program.invars, data, strict=True) if is_data}
    for number, eqn in enumerate(program.eqns):
        flags = [isinstance(v, Var) and v in fed for v in eqn.invars]
        if any(flags):
            outs = _through(eqn, flags, (*key, number), tell)
            fed |= {v for v, is_data in zip(eqn.outvars, outs, strict=True) if is_data}
        else:
            tell((*key, number))
    return [isinstance(v, Var) and v in fed for v in program.outvars]


def _through(eqn: JaxprEqn, data: Sequence[bool], key: Key, tell: Callable[[Key], None]) -> list[bool]:
    """Which outputs of an equation are made of data, as some of its inputs are; numbered as by `Interpreter`."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS | REMAT:
        inner = params.get("jaxpr") or params["call_jaxpr"]
        return _follow(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, data, key, tell)
    if name == "cond":
        branches = [_follow(b.jaxpr, data[1:], (*key, i), tell) for i, b in enumerate(params["branches"])]
        return [data[0] or any(outs) for outs in zip(*branches, strict=True)]
    if name == "scan":
        start, end = params["num_consts"], params["num_consts"] + params["num_carry"]
        flags, body = list(data), params["jaxpr"].jaxpr
        while True:  # what is carried may become data at later turns
            carried = _follow(body, flags, key, lambda _: None)[: end - start]
            if not any(new and not old for new, old in zip(carried, flags[start:end], strict=True)):
                return _follow(body, flags, key, tell)
            flags[start:end] = [new or old for new, old in zip(carried, flags[start:end], strict=True)]
    return [True] * len(eqn.outvars)
