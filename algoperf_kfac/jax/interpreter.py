"""Running a traced function again, operation by operation, while following its parameters.

`jax.make_jaxpr` turns the model into primitives; `Interpreter` evaluates them one after the other, keeps account
of which values are parameters up to their shape, and hands each weighted operation to a visitor, which may replace
its output. Calls, rematerialised blocks, loops and branches are entered wherever a parameter goes into them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from algoperf_kfac.jax.operations import (
    WEIGHT_READS,
    Call,
    Fused,
    Source,
    fuse,
    is_bias,
    read_conv,
    read_dot_general,
    split_call,
)

Key = tuple[Any, ...]

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_REMAT = {"checkpoint", "remat", "remat2"}
_PASS = {
    "convert_element_type",
    "copy",
    "copy_p",
    "sharding_constraint",
    "name",
    "optimization_barrier",
    "reduce_precision",
}


@dataclasses.dataclass(frozen=True)
class Output:
    """A value that is the output of a weighted operation, up to a permutation.

    Attributes:
        call: the operation.
        parts: key and call of each weight in it: itself, or the parts of a fused weight.
        dims: its dimensions over groups and output features, in the order of the weight's matrix.
    """

    call: Call
    parts: tuple[tuple[Key, Call], ...]
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a parameter, gathered: an embedding.

    Attributes:
        source: the table, (V, P).
        leading: sizes of the dimensions over examples and positions.
    """

    source: Source
    leading: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value computed from parameters and constants, no longer a parameter itself: a scaled or normalised weight.

    Attributes:
        sources: the parameters; empty for a constant.
    """

    sources: frozenset[Source] = frozenset()


CONSTANT = Derived()

Tag = Source | Fused | Output | Derived

# What multiplies a derived weight into the data, or hides what it does with it.
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "pallas_call", "custom_vjp_call", "shard_map"}


class Visitor:
    """What happens at the places of interest; the base class does nothing."""

    def operation(self, key: Key, call: Call, x: Array, out: Array) -> Array:
        """A weighted operation; returns what takes the place of its output."""
        return out

    def lookup(self, key: Key, lookup: Lookup, rows: Array, out: Array) -> Array:
        """An embedding of the row numbers `rows`; returns what takes the place of its output."""
        return out

    def bias(self, key: Key, call: Call, source: Source) -> None:
        """The operation `key` has the bias `source`."""

    def other_use(self, key: Key, source: Source, what: str) -> None:
        """Something without a rule reads a parameter as a weight."""

    def stacked(self, names: Sequence[str], length: int) -> Any:
        """A pytree to be sliced along with the stacked parameters `names` as a scan of `length` runs over them."""
        return None

    @contextlib.contextmanager
    def slice(self, names: Sequence[str], values: Any) -> Iterator[None]:
        """While inside the scan: one slice of what `stacked` gave."""
        yield


class Interpreter:
    """Evaluates jaxprs, telling a visitor of what becomes of the parameters."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor

    def run(self, closed: ClosedJaxpr, args: Sequence[Any], tags: Sequence[Tag | None]) -> list[Any]:
        """Evaluate a traced function.

        Args:
            closed: from `jax.make_jaxpr`.
            args: its flat arguments.
            tags: which of them are parameters.
        """
        return self._evaluate(closed.jaxpr, closed.consts, args, tags, ())[0]

    def _evaluate(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], tags: Sequence[Tag | None], key: Key
    ) -> tuple[list[Any], list[Tag | None]]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))
        tagged: dict[Any, Tag] = {v: t for v, t in zip(jaxpr.invars, tags, strict=True) if t is not None}

        for number, eqn in enumerate(jaxpr.eqns):
            ins = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
            in_tags = [CONSTANT if isinstance(v, Literal) else tagged.get(v) for v in eqn.invars]
            here = (*key, number)
            if not any(tag for tag in in_tags if tag != CONSTANT):
                outs = _bind(eqn, ins)
                if in_tags and all(in_tags):
                    tagged |= dict.fromkeys(eqn.outvars, CONSTANT)
            else:
                outs, out_tags = self._equation(eqn, ins, in_tags, here)
                tagged |= {v: t for v, t in zip(eqn.outvars, out_tags, strict=False) if t is not None}
            values |= dict(zip(eqn.outvars, outs, strict=True))
        outs = [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]
        return outs, [None if isinstance(v, Literal) else tagged.get(v) for v in jaxpr.outvars]

    def _enter(
        self, closed: ClosedJaxpr, args: Sequence[Any], tags: Sequence[Tag | None], key: Key
    ) -> tuple[list[Any], list[Tag | None]]:
        return self._evaluate(closed.jaxpr, closed.consts, args, tags, key)

    def _equation(
        self, eqn: Any, ins: list[Any], tags: list[Tag | None], key: Key
    ) -> tuple[list[Any], list[Tag | None]]:
        """One equation with at least one tagged input."""
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self._enter(inner, ins, tags, key)
        if any(_sources(tag) for tag in tags):
            if name in _REMAT:
                return self._remat(eqn, ins, tags, key), []
            if name == "scan":
                return self._scan(eqn, ins, tags, key), []
            if name == "cond":
                return self._cond(eqn, ins, tags, key), []
        weighted = self._weighted(eqn, ins, tags, key)
        if weighted is not None:
            return weighted
        outs = _bind(eqn, ins)
        out_tag = self._follow(eqn, tags, key, outs)
        return outs, [out_tag]

    def _weighted(
        self, eqn: Any, ins: list[Any], tags: list[Tag | None], key: Key
    ) -> tuple[list[Any], list[Tag | None]] | None:
        name = eqn.primitive.name
        call: Call | None = None
        x: Any = None
        if name == "dot_general":
            for position in (1, 0):
                tag, other = tags[position], tags[1 - position]
                source = tag.whole if isinstance(tag, Fused) else tag
                if isinstance(source, Source) and not _sources(other) and not source.is_broadcast:
                    x, w = ins[1 - position], ins[position]
                    call = read_dot_general(source, w.shape, x.shape, position == 1, eqn.params)
                    if call is not None and isinstance(tag, Fused):
                        return self._fused(eqn, ins, x, call, tag, key)
                    break
        elif name == "conv_general_dilated":
            kernel = tags[1]
            if isinstance(kernel, Source) and not _sources(tags[0]) and not kernel.is_broadcast:
                x = ins[0]
                call = read_conv(kernel, ins[1].shape, x.shape, eqn.outvars[0].aval.shape, eqn.params)
        elif name == "gather" and isinstance(tags[0], Source):
            return self._lookup(eqn, ins, tags[0], key)
        if call is None:
            return None
        (out,) = _bind(eqn, ins)
        out = self.visitor.operation(key, call, x, out)
        return [out], [Output(call, ((key, call),), call.out_dims)]

    def _fused(
        self, eqn: Any, ins: list[Any], x: Any, call: Call, fused: Fused, key: Key
    ) -> tuple[list[Any], list[Tag | None]] | None:
        """One product with several weights side by side: an operation for each."""
        calls = split_call(call, fused)
        if calls is None:
            return None
        (out,) = _bind(eqn, ins)
        parts = tuple(((*key, number), part) for number, part in enumerate(calls))
        for part_key, part in parts:
            out = self.visitor.operation(part_key, part, x, out)
        return [out], [Output(call, parts, call.out_dims)]

    def _lookup(
        self, eqn: Any, ins: list[Any], source: Source, key: Key
    ) -> tuple[list[Any], list[Tag | None]] | None:
        """Whole rows of a table that is read as it is stored."""
        table, numbers = ins[0], eqn.params["dimension_numbers"]
        whole_rows = table.ndim == 2 and tuple(eqn.params["slice_sizes"]) == (1, table.shape[1])
        rows_last = tuple(numbers.offset_dims) == (eqn.outvars[0].aval.ndim - 1,)
        if (
            source.moves
            or source.stack
            or not whole_rows
            or not rows_last
            or tuple(numbers.start_index_map) != (0,)
        ):
            return None
        (out,) = _bind(eqn, ins)
        return [self.visitor.lookup(key, Lookup(source, out.shape[:-1]), ins[1][..., 0], out)], []

    def _follow(self, eqn: Any, tags: list[Tag | None], key: Key, outs: list[Any]) -> Tag | None:
        """What the output of an ordinary primitive is, and what it means for the parameters it reads."""
        name, params = eqn.primitive.name, eqn.params
        tag = tags[0]
        if name in _PASS:
            return tag
        if name == "concatenate" and (fused := fuse(tags, params["dimension"])) is not None:
            return fused
        if isinstance(tag, Source | Fused):
            source = tag.whole if isinstance(tag, Fused) else tag
            stack = source.stack
            whole = tuple(range(stack))
            sizes = source.apply(_probe(source.shape)).shape[:stack]
            if name == "squeeze" or (name == "reshape" and params.get("dimensions") is None):
                return tag.moved("reshape", (*sizes, *outs[0].shape))
            if name == "transpose":
                return tag.moved("transpose", (*whole, *(stack + d for d in params["permutation"])))
            if name == "rev":
                return tag.moved("rev", tuple(stack + d for d in params["dimensions"]))
            if name == "broadcast_in_dim":
                dims = tuple(params["broadcast_dimensions"])
                if outs[0].size == eqn.invars[0].aval.size and list(dims) == sorted(dims):
                    return tag.moved("reshape", (*sizes, *outs[0].shape))
                shape = (*sizes, *outs[0].shape)
                return tag.moved("broadcast", (shape, (*whole, *(stack + d for d in dims))))
        if isinstance(tag, Output) and name == "transpose":
            permutation = params["permutation"]
            return dataclasses.replace(tag, dims=tuple(permutation.index(d) for d in tag.dims))
        if name in ("add", "add_any"):
            for output, summand in (tags, tags[::-1]):
                if isinstance(output, Output) and isinstance(summand, Source | Fused):
                    self._bias(output, summand, outs[0].shape)
                    return None
        if name in WEIGHT_READS:
            for tag in tags:
                if not isinstance(tag, Derived) or name in _PRODUCTS:
                    for part in _sources(tag):
                        self.visitor.other_use(key, part, name)
        return _derived(eqn, tags, outs[0])

    def _bias(self, output: Output, summand: Source | Fused, shape: tuple[int, ...]) -> None:
        """Tell the visitor if the summand is the bias of the operation, part by part where it is fused."""
        whole = summand.whole if isinstance(summand, Fused) else summand
        if not is_bias(whole, output.call, output.dims, shape):
            return
        biases = summand.parts if isinstance(summand, Fused) else (summand,)
        sizes = [call.view.groups * call.view.out_dim for _, call in output.parts]
        if [math.prod(bias.shape) for bias in biases] == sizes:
            for (key, call), bias in zip(output.parts, biases, strict=True):
                self.visitor.bias(key, call, bias)

    def _remat(self, eqn: Any, ins: list[Any], tags: list[Tag | None], key: Key) -> list[Any]:
        inner = eqn.params["jaxpr"]

        def run(*args: Any) -> list[Any]:
            return self._evaluate(inner, (), args, tags, key)[0]

        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*ins)

    def _cond(self, eqn: Any, ins: list[Any], tags: list[Tag | None], key: Key) -> list[Any]:
        def branch(number: int, closed: ClosedJaxpr) -> Callable[..., list[Any]]:
            return lambda *args: self._enter(closed, args, tags[1:], (*key, number))[0]

        branches = [branch(i, closed) for i, closed in enumerate(eqn.params["branches"])]
        return lax.switch(ins[0], branches, *ins[1:])

    def _scan(self, eqn: Any, ins: list[Any], tags: list[Tag | None], key: Key) -> list[Any]:
        """A loop, again as a loop: parameters come in whole at each turn, or slice by slice."""
        params = eqn.params
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        first_x = num_consts + num_carry
        inner_tags: list[Tag | None] = []
        stacked: list[str] = []
        for position, tag in enumerate(tags):
            inner: Tag | None = None
            if isinstance(tag, Fused | Derived):
                if position < num_consts:
                    inner = tag
                else:
                    for part in _sources(tag):
                        self.visitor.other_use(key, part, "scan")
            elif isinstance(tag, Source):
                if position < num_consts:
                    inner = tag
                elif position < first_x:
                    self.visitor.other_use(key, tag, "scan")
                else:
                    inner = dataclasses.replace(tag, stack=tag.stack + 1)
                    stacked.append(tag.name)
            inner_tags.append(inner)
        consts, init, xs = ins[:num_consts], ins[num_consts:first_x], ins[first_x:]

        def body(carry: list[Any], slices: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
            with self.visitor.slice(stacked, slices[1]):
                outs, _ = self._enter(params["jaxpr"], [*consts, *carry, *slices[0]], inner_tags, key)
            return outs[:num_carry], outs[num_carry:]

        carry, ys = lax.scan(
            body,
            list(init),
            (list(xs), self.visitor.stacked(stacked, params["length"])),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]


def _bind(eqn: Any, ins: list[Any]) -> list[Any]:
    """The equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older releases give inner programs apart from the rest.
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *ins, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _sources(tag: Tag | None) -> tuple[Source, ...]:
    """The parameters in a value."""
    if isinstance(tag, Source):
        return (tag,)
    if isinstance(tag, Fused):
        return tag.parts
    return tuple(tag.sources) if isinstance(tag, Derived) else ()


def _derived(eqn: Any, tags: Sequence[Tag | None], out: Any) -> Derived | None:
    """The output as a function of parameters, where no data go into it, or data only scale a weight."""
    names = frozenset(source for tag in tags for source in _sources(tag))
    pure = all(isinstance(tag, Source | Fused | Derived) for tag in tags)
    scaled = eqn.primitive.name in ("mul", "div") and any(
        math.prod(source.shape) == out.size and len(source.shape) > 1 for source in names
    )
    return Derived(names) if pure or scaled else None


def _probe(shape: tuple[int, ...]) -> Any:
    return np.broadcast_to(np.zeros((), np.int8), shape)
