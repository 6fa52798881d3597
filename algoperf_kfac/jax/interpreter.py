"""Running a traced function again, operation by operation, while following its parameters.

`jax.make_jaxpr` turns the model into primitives; `Interpreter` evaluates them one after the other, keeps account
of which values are parameters up to their shape, and hands each weighted operation to a visitor, which may replace
its output. Calls, rematerialised blocks, loops and branches are entered wherever a parameter goes into them.

No list says which operations read a weight. Functions of parameters and constants alone are followed as such; where
one meets data, or leaves the model, without a rule for it, its parameters have another use than those that are
recorded. Harmless is only what has no gradient, and a scalar of parameters that is added to a scalar: a penalty. It
may be one of parameters and what the program holds beside its data: old weights, coefficients. No uses either are
operations from which no gradient comes to an output: an attack computed on the way, layers that a metric reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from algoperf_kfac.jax.derived import completes, either, function_of, is_penalty, may_multiply, read_later
from algoperf_kfac.jax.equations import MOVES, NO_GRADIENT, bind, carrying, moved_dims, moves_of
from algoperf_kfac.jax.operations import RULES, Call, Lookup, Rule, bias_of
from algoperf_kfac.jax.sources import (
    CONSTANT,
    Derived,
    Fused,
    Held,
    Penalised,
    Selected,
    Source,
    as_source,
    constant_of,
    fuse,
    is_float,
    sources_of,
)
from algoperf_kfac.jax.types import Sizes, Tree

Key: TypeAlias = tuple[int, ...]
"""Where an operation stands: its number in the program, after those of the operations it is nested in."""

CALLS = {"jit", "pjit", "closed_call", "core_call"}
REMAT = {"checkpoint", "remat", "remat2"}
_PASS = {
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "reshard",
    "sharding_constraint",
    "name",
    "optimization_barrier",
    "pbroadcast",  # a weight that all devices of a shard_map hold, beside data of their own
    "pcast",
    "pvary",
    "reduce_precision",
}
_SUMS = {"add", "add_any", "sub"}  # of a loss and its penalties
# What cannot be followed is taken for a use at once, even without data.
_OPAQUE = {"while", "pure_callback", "io_callback", "ffi_call", "pallas_call"}
RETURNED = "the loss"  # in place of an operation's name


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


Tag: TypeAlias = Source | Fused | Output | Derived | Held | Penalised | Selected
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
        """A parameter is added to the output of the operation `key` as a bias would be; see `bias_of`."""

    def without_bias(self, key: Key) -> None:
        """Something reads the output of the operation `key` as it is, no bias added."""

    def constant_input(self, key: Key, *, given: bool) -> None:
        """The operation `key` reads nothing but constants, or (`given`) single numbers among the arguments."""

    def other_use(self, key: Key, source: Source, what: str, *, computed: bool, product: bool) -> None:
        """Something without a rule reads a parameter: it meets data there.

        Args:
            key: where.
            source: the parameter.
            what: the operation's name.
            computed: whether it reads a function of the parameter, not the parameter itself.
            product: whether it may multiply data by it.
        """

    def without_gradient(self, source: Source) -> None:
        """Something reads a parameter through which no gradient goes."""

    def penalty(self, source: Source) -> None:
        """A scalar that goes into the loss has a summand that depends on the parameter alone."""

    def conditional(self, key: Key) -> None:
        """What is nested in the operation `key` runs only if its branch is taken."""

    def loop(self, key: Key, length: int) -> None:
        """What is nested in the operation `key` runs `length` times."""

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
        all_uses: whether operations count from which no gradient comes to an output.
    """

    def __init__(self, visitor: Visitor, rules: Mapping[str, Rule] = RULES, *, all_uses: bool = False) -> None:
        self.visitor = visitor
        self.rules = rules
        self.all_uses = all_uses

    def run(
        self, closed: ClosedJaxpr, args: Sequence[Array], tags: Tags, returned: Sequence[bool] = ()
    ) -> list[Array]:
        """Evaluate a traced function.

        Args:
            closed: from `jax.make_jaxpr`.
            args: its flat arguments.
            tags: which of them are parameters.
            returned: which outputs go into the loss, all if not given.
        """
        wanted = returned or [True] * len(closed.jaxpr.outvars)
        outs, out_tags = self._evaluate(closed.jaxpr, closed.consts, args, tags, (), wanted)
        for out, tag, is_returned in zip(outs, out_tags, wanted, strict=True):
            # A loss could do anything with a parameter that it is given; a scalar of parameters is a penalty.
            if is_returned and out.ndim == 0 and is_penalty(tag):
                for source in sources_of(tag):
                    self.visitor.penalty(source)
            elif is_returned:
                self._missed((), tag, RETURNED)
        # Beside the outputs (aux) numbers of Python stay what they are, as in `jax.value_and_grad`.
        return [
            out if is_returned or not isinstance(v, Literal) else v.val
            for v, out, is_returned in zip(closed.jaxpr.outvars, outs, wanted, strict=True)
        ]

    def _evaluate(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Array],
        args: Sequence[Array],
        tags: Tags,
        key: Key,
        wanted: Sequence[bool],
    ) -> Evaluated:
        """All equations of a program.

        Args:
            jaxpr: the program.
            consts, args: its inputs.
            tags: of `args`.
            key: of the operation that it is nested in.
            wanted: of its outputs, which a gradient comes back from.
        """
        values: dict[Var, Array] = {v: _on_device(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        values |= dict(zip(jaxpr.invars, args, strict=True))
        tagged: dict[Var, Tag] = {v: Held() for v, c in zip(jaxpr.constvars, consts, strict=True) if is_float(c)}
        tagged |= {v: t for v, t in zip(jaxpr.invars, tags, strict=True) if t is not None}

        live = carrying(jaxpr, wanted)
        for number, eqn in enumerate(jaxpr.eqns):
            ins = [_value(v, values) for v in eqn.invars]
            in_tags = [CONSTANT if isinstance(v, Literal) else tagged.get(v) for v in eqn.invars]
            if all(tag is None or constant_of([tag]) for tag in in_tags):
                outs = bind(eqn, ins)
                if (constant := constant_of(in_tags)) is not None:
                    tagged |= dict.fromkeys(eqn.outvars, constant)
            elif not self.all_uses and live.isdisjoint(eqn.outvars):
                outs = bind(eqn, ins)
                tagged |= {v: tag for v in eqn.outvars if (tag := self._unread(in_tags)) is not None}
            else:
                needed = [v in live for v in eqn.outvars]
                outs, out_tags = self._equation(eqn, ins, in_tags, (*key, number), needed)
                tagged |= {v: t for v, t in zip(eqn.outvars, out_tags, strict=True) if t is not None}
            values |= dict(zip(eqn.outvars, outs, strict=True))
        outs = [_value(v, values) for v in jaxpr.outvars]
        return outs, [None if isinstance(v, Literal) else tagged.get(v) for v in jaxpr.outvars]

    def _enter(
        self, closed: ClosedJaxpr, args: Sequence[Array], tags: Tags, key: Key, wanted: Sequence[bool]
    ) -> Evaluated:
        return self._evaluate(closed.jaxpr, closed.consts, args, tags, key, wanted)

    def _equation(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key, wanted: Sequence[bool]) -> Evaluated:
        """One equation with at least one tagged input, and a gradient from at least one output."""
        name = eqn.primitive.name
        if name in CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self._enter(inner, ins, tags, key, wanted)
        if any(sources_of(tag) for tag in tags):
            if name in REMAT:
                return self._remat(eqn, ins, tags, key, wanted)
            if name == "scan":
                return self._scan(eqn, ins, tags, key, wanted)
            if name == "cond":
                return self._cond(eqn, ins, tags, key, wanted)
        weighted = self._weighted(eqn, ins, tags, key)
        if weighted is not None:
            return weighted
        outs = bind(eqn, ins)
        if name in _PASS and len(tags) == len(outs):
            return outs, list(tags)
        return outs, [self._follow(eqn, tags, key, outs)] * len(outs)

    def _weighted(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key) -> Evaluated | None:
        """An operation with a rule; None if it is none."""
        rule = self.rules.get(eqn.primitive.name)
        read = None if rule is None else rule(eqn, tags)
        if read is None:
            return None
        (out,) = bind(eqn, ins)
        if any(jnp.issubdtype(t.dtype, jnp.complexfloating) for t in (ins[read.operand], out)):
            for tag in tags:
                self._missed(key, tag, f"{eqn.primitive.name} of complex numbers", product=True)
            return [out], [None]
        self._missed(key, tags[read.operand], eqn.primitive.name, product=True)
        x = ins[read.operand] if read.prepare is None else read.prepare(ins)
        if isinstance(read.use, Lookup):
            rows = self.visitor.lookup(key, read.use, x[..., 0], out)
            taken = Selected(read.use.source, eqn.primitive.name)
            return [rows], [taken if constant_of([tags[read.operand]]) else None]
        parts: tuple[tuple[Key, Call], ...] = ((key, read.use),)
        if read.parts:  # one product with several weights side by side: an operation for each
            parts = tuple(((*key, number), part) for number, part in enumerate(read.parts))
        for part_key, part in parts:
            if (constant := constant_of([tags[read.operand]])) is not None:
                self.visitor.constant_input(part_key, given=isinstance(constant, Held) and constant.given)
            out = self.visitor.operation(part_key, part, x, out)
        return [out], [Output(read.use, parts, read.use.out_dims)]

    def _follow(self, eqn: JaxprEqn, tags: Tags, key: Key, outs: list[Array]) -> Tag | None:
        """What the output of an ordinary primitive is, and what it means for the parameters it reads."""
        name, tag = eqn.primitive.name, tags[0]
        if not outs:  # a print, a callback
            return self._unread(tags)
        if name == "concatenate" and (fused := fuse(tags, eqn.params["dimension"])) is not None:
            return fused
        if isinstance(tag, Source | Fused) and (moves := moves_of(eqn, tag, tuple(outs[0].shape))):
            for move in moves:
                tag = tag.moved(move)
            return tag
        if isinstance(tag, Selected) and name in MOVES and not tag.shared:
            return tag
        if isinstance(tag, Output) and name == "transpose":
            permutation = eqn.params["permutation"]
            return dataclasses.replace(tag, dims=tuple(permutation.index(d) for d in tag.dims))
        if isinstance(tag, Output) and (dims := moved_dims(eqn, tag.dims, tuple(outs[0].shape))) is not None:
            return dataclasses.replace(tag, dims=dims)
        if name in ("add", "add_any"):
            for output, summand in (tags, tags[::-1]):
                if isinstance(output, Output) and isinstance(summand, Source | Fused):
                    if not self._bias(output, summand, outs[0].shape):
                        self._without_bias(output)
                        self._missed(key, summand, name)
                    return None
        if name in NO_GRADIENT or not any(jnp.issubdtype(out.dtype, jnp.inexact) for out in outs):
            return self._unread(tags)
        for one in tags:
            self._without_bias(one)
        if name not in _OPAQUE and (function := function_of(name, tags, outs)) is not None:
            return function
        product = may_multiply(eqn)
        penalties = frozenset[Source]()
        for tag in tags:
            if name in _SUMS and outs[0].ndim == 0 and is_penalty(tag):
                penalties |= frozenset(sources_of(tag))
            elif isinstance(tag, Selected) and completes(eqn, tag):
                self.visitor.other_use(
                    key, tag.source, tag.what if tag.shared else name, computed=True, product=True
                )
            else:
                self._missed(key, tag, name, product=product)
        return Penalised(penalties) if penalties else read_later(eqn, tags)

    def _unread(self, tags: Tags) -> Derived | None:
        """Tell the visitor of the parameters in values that are read without a gradient; what is made of them."""
        for source in (part for tag in tags for part in sources_of(tag)):
            self.visitor.without_gradient(source)
        return CONSTANT if all(isinstance(tag, Source | Fused | Derived) for tag in tags) else None

    def _without_bias(self, tag: Tag | None) -> None:
        """Tell the visitor that something reads a value that may be the output of an operation."""
        for key, _ in tag.parts if isinstance(tag, Output) else ():
            self.visitor.without_bias(key)

    def _missed(self, key: Key, tag: Tag | None, what: str, *, product: bool = False) -> None:
        """Tell the visitor of the parameters in a value that something without a rule reads."""
        self._without_bias(tag)
        for source in sources_of(tag):
            computed = not isinstance(tag, Source | Fused)
            self.visitor.other_use(key, source, what, computed=computed, product=product)

    def _bias(self, output: Output, summand: Source | Fused, shape: Sizes) -> bool:
        """Whether the summand is the bias of the operation; tells the visitor, part by part where it is fused."""
        whole = as_source(summand)
        stored = None if whole is None else bias_of(whole, output.call, output.dims, shape)
        if stored is None or (isinstance(summand, Fused) and stored.moves):
            return False
        biases = summand.parts if isinstance(summand, Fused) else (stored,)
        sizes = [call.view.groups * call.view.out_dim for _, call in output.parts]
        if [math.prod(bias.shape) for bias in biases] != sizes:
            return False
        for (key, call), bias in zip(output.parts, biases, strict=True):
            self.visitor.bias(key, call, bias)
        return True

    def _remat(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key, wanted: Sequence[bool]) -> Evaluated:
        inner, out_tags = eqn.params["jaxpr"], list[Tag | None]()

        def run(*args: Array) -> list[Array]:
            outs, out_tags[:] = self._evaluate(inner, (), args, tags, key, wanted)
            return outs

        policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
        outs = jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*ins)
        for tag in out_tags:
            self._without_bias(tag)
        return outs, [None if isinstance(tag, Output) else tag for tag in out_tags]

    def _cond(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key, wanted: Sequence[bool]) -> Evaluated:
        of_branches: list[list[Tag | None]] = []

        def branch(number: int, closed: ClosedJaxpr) -> Callable[..., list[Array]]:
            def run(*args: Array) -> list[Array]:
                outs, out_tags = self._enter(closed, args, tags[1:], (*key, number), wanted)
                for tag in out_tags:
                    self._without_bias(tag)
                of_branches.append(out_tags)
                return outs

            return run

        branches = [branch(i, closed) for i, closed in enumerate(eqn.params["branches"])]
        self.visitor.conditional(key)
        outs: list[Array] = lax.switch(ins[0], branches, *ins[1:])
        return outs, [either(alternatives) for alternatives in zip(*of_branches, strict=True)]

    def _scan(self, eqn: JaxprEqn, ins: list[Array], tags: Tags, key: Key, wanted: Sequence[bool]) -> Evaluated:
        """A loop, again as a loop: parameters come in whole at each turn, or slice by slice."""
        params = eqn.params
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        first_x = num_consts + num_carry
        came = _as_they_came(params["jaxpr"].jaxpr)
        kept = {place for place in range(num_consts, first_x) if came[place - num_consts] == place}
        inner_tags = self._inside_scan(tags, {*range(num_consts), *kept}, first_x, key, product=may_multiply(eqn))
        sliced = [tag.name for tag in inner_tags[first_x:] if isinstance(tag, Source)]
        inside = [
            *(True for _ in range(num_carry)),
            *wanted[num_carry:],
        ]  # what is carried may be read at later turns
        consts, init, xs = ins[:num_consts], ins[num_consts:first_x], ins[first_x:]
        whole = {inner: tag for inner, tag in zip(inner_tags[first_x:], tags[first_x:], strict=True) if inner}
        out_tags: list[Tag | None] = [
            inner_tags[place] if (place := num_consts + number) in kept else None for number in range(len(wanted))
        ]

        def body(carry: list[Array], slices: tuple[list[Array], Tree]) -> tuple[list[Array], list[Array]]:
            with self.visitor.slice(sliced, slices[1]):
                outs, of_turn = self._enter(params["jaxpr"], [*consts, *carry, *slices[0]], inner_tags, key, inside)
            for number, (tag, is_read) in enumerate(zip(of_turn, inside, strict=True)):
                # nnx hands a module's states out again as they came, read or not.
                if number >= num_carry and tag in whole:
                    out_tags[number] = whole[tag]
                elif is_read and not (number < num_carry and num_consts + number in kept):
                    self._missed(key, tag, "scan")
            return outs[:num_carry], outs[num_carry:]

        self.visitor.loop(key, params["length"])
        carry, ys = lax.scan(
            body,
            list(init),
            (list(xs), self.visitor.sliced(sliced, params["length"])),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys], out_tags

    def _inside_scan(
        self, tags: Tags, same: Collection[int], first_x: int, key: Key, *, product: bool
    ) -> list[Tag | None]:
        """The tags of a loop's operands within its body. A weight that it cuts otherwise is lost.

        Args:
            tags: of the constants, the carry, and what is sliced.
            same: which are the same at all turns: constants, and what is carried as it came.
            first_x: where what is sliced begins.
            key: of the loop.
            product: whether it may multiply data by a slice. What it carries else is a state, learned at its
                beginning.
        """
        inner: list[Tag | None] = []
        for position, tag in enumerate(tags):
            if position in same and isinstance(tag, Source | Fused | Derived | Held):
                inner.append(tag)
            elif position >= first_x and isinstance(tag, Source):
                inner.append(dataclasses.replace(tag, scans=tag.scans + 1))
            else:
                inner.append(None)
                matrices = position >= first_x and any(len(source.shape) > 2 for source in sources_of(tag))
                self._missed(key, tag, "scan", product=product and matrices)
        return inner


def _as_they_came(jaxpr: Jaxpr) -> list[int | None]:
    """By output of a program, the input that it is, handed on by functions and rematerialised blocks; or None."""
    came = {v: number for number, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in CALLS | REMAT:
            continue
        inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
        places = _as_they_came(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
        for out, place in zip(eqn.outvars, places, strict=True):
            source = None if place is None else eqn.invars[place]
            if isinstance(source, Var) and source in came:
                came[out] = came[source]
    return [came.get(v) if isinstance(v, Var) else None for v in jaxpr.outvars]


def _on_device(const: Array | np.ndarray) -> Array:
    """A constant of a program as JAX hands it on: `jax.make_jaxpr` keeps the small ones as NumPy's, which no traced
    number indexes, as derivatives written by hand may do (`custom_vjp`)."""
    return jnp.asarray(const) if isinstance(const, np.ndarray) else const


def _value(v: Var | Literal, values: Mapping[Var, Array]) -> Array:
    """A value of a program. Its literals may be numbers of Python: of a weak type then, as they are to JAX."""
    return jnp.asarray(v.val) if isinstance(v, Literal) else values[v]
