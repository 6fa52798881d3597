"""Running a traced function again, operation by operation, while following its parameters.

`jax.make_jaxpr` turns the model into primitives; `Interpreter` evaluates them one after the other, keeps account
of which values are parameters up to their shape, and hands each weighted operation to a visitor, which may replace
its output. Calls, rematerialised blocks, loops and branches are entered wherever a parameter goes into them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from algoperf_kfac.jax.operations import RULES, WEIGHT_READS, Call, Lookup, Rule, is_bias, shape_of
from algoperf_kfac.jax.sources import CONSTANT, Derived, Fused, Move, Source, as_source, fuse, sources_of
from algoperf_kfac.jax.types import Sizes, Tree

Key: TypeAlias = tuple[int, ...]
"""Where an operation stands: its number in the program, after those of the operations it is nested in."""

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
# What multiplies a derived weight into the data, or hides what it does with it.
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "pallas_call", "custom_vjp_call", "shard_map"}


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
    dims: Sizes


Tag: TypeAlias = Source | Fused | Output | Derived
"""What a value is of the parameters; None for data."""

Tags: TypeAlias = Sequence[Tag | None]
Evaluated: TypeAlias = tuple[list[Array], list[Tag | None]]
"""Values with their tags."""


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

    def sliced(self, names: Sequence[str], length: int) -> Tree:
        """A pytree to be sliced along with the parameters `names` as a scan of `length` runs over them."""
        return None

    @contextlib.contextmanager
    def slice(self, names: Sequence[str], values: Tree) -> Iterator[None]:
        """While inside the scan: one slice of what `sliced` gave."""
        yield


class Interpreter:
    """Evaluates jaxprs, telling a visitor of what becomes of the parameters.

    Args:
        visitor: is told.
        rules: by primitive, which operations are weighted.
    """

    def __init__(self, visitor: Visitor, rules: Mapping[str, Rule] = RULES) -> None:
        self.visitor = visitor
        self.rules = rules

    def run(self, closed: ClosedJaxpr, args: Sequence[Array], tags: Tags) -> list[Array]:
        """Evaluate a traced function.

        Args:
            closed: from `jax.make_jaxpr`.
            args: its flat arguments.
            tags: which of them are parameters.
        """
        return self._evaluate(closed.jaxpr, closed.consts, args, tags, ())[0]

    def _evaluate(
        self, jaxpr: Jaxpr, consts: Sequence[Array], args: Sequence[Array], tags: Tags, key: Key
    ) -> Evaluated:
        values: dict[Var, Array] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))
        tagged: dict[Var, Tag] = {v: t for v, t in zip(jaxpr.invars, tags, strict=True) if t is not None}

        for number, eqn in enumerate(jaxpr.eqns):
            ins = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
            in_tags = [CONSTANT if isinstance(v, Literal) else tagged.get(v) for v in eqn.invars]
            if not any(tag for tag in in_tags if tag != CONSTANT):
                outs = _bind(eqn, ins)
                if in_tags and all(in_tags):
                    tagged |= dict.fromkeys(eqn.outvars, CONSTANT)
            else:
                outs, out_tags = self._equation(eqn, ins, in_tags, (*key, number))
                tagged |= {v: t for v, t in zip(eqn.outvars, out_tags, strict=False) if t is not None}
            values |= dict(zip(eqn.outvars, outs, strict=True))
        outs = [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]
        return outs, [None if isinstance(v, Literal) else tagged.get(v) for v in jaxpr.outvars]

    def _enter(self, closed: ClosedJaxpr, args: Sequence[Array], tags: Tags, key: Key) -> Evaluated:
        return self._evaluate(closed.jaxpr, closed.consts, args, tags, key)

    def _equation(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key) -> Evaluated:
        """One equation with at least one tagged input."""
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self._enter(inner, ins, tags, key)
        if any(sources_of(tag) for tag in tags):
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
        return outs, [self._follow(eqn, tags, key, outs)]

    def _weighted(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key) -> Evaluated | None:
        """An operation with a rule; None if it is none."""
        rule = self.rules.get(eqn.primitive.name)
        read = None if rule is None else rule(eqn, tags)
        if read is None:
            return None
        (out,) = _bind(eqn, ins)
        x = ins[read.operand]
        if isinstance(read.use, Lookup):
            return [self.visitor.lookup(key, read.use, x[..., 0], out)], []
        parts: tuple[tuple[Key, Call], ...] = ((key, read.use),)
        if read.parts:  # one product with several weights side by side: an operation for each
            parts = tuple(((*key, number), part) for number, part in enumerate(read.parts))
        for part_key, part in parts:
            out = self.visitor.operation(part_key, part, x, out)
        return [out], [Output(read.use, parts, read.use.out_dims)]

    def _follow(self, eqn: JaxprEqn, tags: Tags, key: Key, outs: list[Array]) -> Tag | None:
        """What the output of an ordinary primitive is, and what it means for the parameters it reads."""
        name, tag = eqn.primitive.name, tags[0]
        if name in _PASS:
            return tag
        if name == "concatenate" and (fused := fuse(tags, eqn.params["dimension"])) is not None:
            return fused
        if isinstance(tag, Source | Fused) and (move := _move(eqn, tag, tuple(outs[0].shape))) is not None:
            return tag.moved(move)
        if isinstance(tag, Output) and name == "transpose":
            permutation = eqn.params["permutation"]
            return dataclasses.replace(tag, dims=tuple(permutation.index(d) for d in tag.dims))
        if name in ("add", "add_any"):
            for output, summand in (tags, tags[::-1]):
                if isinstance(output, Output) and isinstance(summand, Source | Fused):
                    self._bias(output, summand, outs[0].shape)
                    return None
        if name in WEIGHT_READS:
            for tag in tags:
                if not isinstance(tag, Derived) or name in _PRODUCTS:
                    for part in sources_of(tag):
                        self.visitor.other_use(key, part, name)
        return _derived(eqn, tags, outs[0])

    def _bias(self, output: Output, summand: Source | Fused, shape: Sizes) -> None:
        """Tell the visitor if the summand is the bias of the operation, part by part where it is fused."""
        whole = as_source(summand)
        if whole is None or not is_bias(whole, output.call, output.dims, shape):
            return
        biases = summand.parts if isinstance(summand, Fused) else (summand,)
        sizes = [call.view.groups * call.view.out_dim for _, call in output.parts]
        if [math.prod(bias.shape) for bias in biases] == sizes:
            for (key, call), bias in zip(output.parts, biases, strict=True):
                self.visitor.bias(key, call, bias)

    def _remat(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key) -> list[Array]:
        inner = eqn.params["jaxpr"]

        def run(*args: Array) -> list[Array]:
            return self._evaluate(inner, (), args, tags, key)[0]

        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*ins)

    def _cond(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key) -> list[Array]:
        def branch(number: int, closed: ClosedJaxpr) -> Callable[..., list[Array]]:
            return lambda *args: self._enter(closed, args, tags[1:], (*key, number))[0]

        branches = [branch(i, closed) for i, closed in enumerate(eqn.params["branches"])]
        outs: list[Array] = lax.switch(ins[0], branches, *ins[1:])
        return outs

    def _scan(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key) -> list[Array]:
        """A loop, again as a loop: parameters come in whole at each turn, or slice by slice."""
        params = eqn.params
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        first_x = num_consts + num_carry
        inner_tags = self._inside_scan(tags, num_consts, first_x, key)
        sliced = [tag.name for tag in inner_tags[first_x:] if isinstance(tag, Source)]
        consts, init, xs = ins[:num_consts], ins[num_consts:first_x], ins[first_x:]

        def body(carry: list[Array], slices: tuple[list[Array], Tree]) -> tuple[list[Array], list[Array]]:
            with self.visitor.slice(sliced, slices[1]):
                outs, _ = self._enter(params["jaxpr"], [*consts, *carry, *slices[0]], inner_tags, key)
            return outs[:num_carry], outs[num_carry:]

        carry, ys = lax.scan(
            body,
            list(init),
            (list(xs), self.visitor.sliced(sliced, params["length"])),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]

    def _inside_scan(self, tags: Tags, num_consts: int, first_x: int, key: Key) -> list[Tag | None]:
        """The tags of a loop's operands within its body. A weight that it carries, or cuts otherwise, is lost.

        Args:
            tags: of the constants, the carry, and what is sliced.
            num_consts: number of constants.
            first_x: where what is sliced begins.
            key: of the loop.
        """
        inner: list[Tag | None] = []
        for position, tag in enumerate(tags):
            if position < num_consts and isinstance(tag, Source | Fused | Derived):
                inner.append(tag)
            elif position >= first_x and isinstance(tag, Source):
                inner.append(dataclasses.replace(tag, scans=tag.scans + 1))
            else:
                inner.append(None)
                for part in sources_of(tag):
                    self.visitor.other_use(key, part, "scan")
        return inner


def _bind(eqn: JaxprEqn, ins: list[Array]) -> list[Array]:
    """The equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older releases give inner programs apart from the rest.
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *ins, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _move(eqn: JaxprEqn, tag: Source | Fused, shape: Sizes) -> Move | None:
    """What a primitive does to the shape of a parameter, so that it becomes `shape`; None if it does more."""
    name, params = eqn.primitive.name, eqn.params
    source = tag.whole if isinstance(tag, Fused) else tag
    scans, sizes = source.scans, source.scanned_sizes
    whole = tuple(range(scans))
    if name == "squeeze" or (name == "reshape" and params.get("dimensions") is None):
        return Move("reshape", (*sizes, *shape))
    if name == "transpose":
        return Move("transpose", (*whole, *(scans + d for d in params["permutation"])))
    if name == "rev":
        return Move("rev", tuple(scans + d for d in params["dimensions"]))
    if name == "broadcast_in_dim":
        dims = tuple(params["broadcast_dimensions"])
        if math.prod(shape) == math.prod(shape_of(eqn.invars[0])) and list(dims) == sorted(dims):
            return Move("reshape", (*sizes, *shape))
        return Move("broadcast", (*whole, *(scans + d for d in dims)), (*sizes, *shape))
    return None


def _derived(eqn: JaxprEqn, tags: Tags, out: Array) -> Derived | None:
    """The output as a function of parameters, where no data go into it, or data only scale a weight."""
    names = frozenset(source for tag in tags for source in sources_of(tag))
    pure = all(isinstance(tag, Source | Fused | Derived) for tag in tags)
    scaled = eqn.primitive.name in ("mul", "div") and any(
        math.prod(source.shape) == out.size and len(source.shape) > 1 for source in names
    )
    return Derived(names) if pure or scaled else None
