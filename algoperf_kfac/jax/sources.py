"""Parameters as a program reads them: followed through changes of shape, concatenations and arithmetic.

Each value of a program carries a tag that says what it is of the parameters; see `Tag` in `interpreter.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from algoperf_kfac.jax.types import Sizes

Value = TypeVar("Value", Array, np.ndarray)


class Move(NamedTuple):
    """One change of shape.

    Attributes:
        kind: "reshape", "transpose", "rev" or "broadcast".
        argument: the new shape, the permutation, the reversed dimensions, or where the old dimensions go.
        shape: the new shape of a broadcast.
    """

    kind: str
    argument: Sizes
    shape: Sizes = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A value that is a parameter, up to changes of shape.

    Attributes:
        name: of the parameter.
        shape: as the parameter is stored.
        moves: what was done to it, in order; shapes and dimensions include those that scans run over.
        scans: leading dimensions over which enclosing scans run; the value at hand is a slice of them.
    """

    name: str
    shape: Sizes
    moves: tuple[Move, ...] = ()
    scans: int = 0

    def moved(self, move: Move) -> Source:
        """After one more move; what undoes itself leaves no trace, so that equal views compare equal."""
        before, moves = self.moves[:-1], (*self.moves, move)
        last = self.moves[-1] if self.moves else None
        if last is not None and last.kind == move.kind == "transpose":
            moves = (*before, Move("transpose", tuple(last.argument[d] for d in move.argument)))
        elif last is not None and last.kind == move.kind == "reshape":
            moves = (*before, move)
        moved, earlier = (dataclasses.replace(self, moves=m) for m in (moves, moves[:-1]))
        kind, argument, _ = moves[-1]
        idle = kind == "transpose" and argument == tuple(range(len(argument)))
        return earlier if idle or (kind == "reshape" and argument == earlier.seen_shape) else moved

    def apply(self, value: Value) -> Value:
        """The parameter (a NumPy or JAX array of shape `shape`) as the operation sees it, with all its slices."""
        module = np if isinstance(value, np.ndarray) else jnp
        for move in self.moves:
            if move.kind == "reshape":
                value = value.reshape(move.argument)
            elif move.kind == "transpose":
                value = module.transpose(value, move.argument)
            elif move.kind == "rev":
                value = module.flip(value, move.argument)
            else:
                sizes = [1] * len(move.shape)
                for size, dim in zip(value.shape, move.argument, strict=True):
                    sizes[dim] = size
                value = module.broadcast_to(value.reshape(sizes), move.shape)
        return value

    def invert(self, value: Array) -> Array:
        """The inverse of `apply`, for sources that were not broadcast."""
        befores = [dataclasses.replace(self, moves=self.moves[:i]).seen_shape for i in range(len(self.moves))]
        for move, before in zip(reversed(self.moves), reversed(befores), strict=True):
            if move.kind == "reshape":
                value = value.reshape(before)
            elif move.kind == "transpose":
                value = jnp.transpose(value, inverse_permutation(move.argument))
            else:
                value = jnp.flip(value, move.argument)
        return value

    @property
    def seen_shape(self) -> Sizes:
        """The shape in which the operation sees it, with all its slices."""
        return tuple(self.apply(hollow(self.shape)).shape)

    @property
    def scanned_sizes(self) -> Sizes:
        """Sizes of the dimensions that scans run over."""
        return self.seen_shape[: self.scans]

    @property
    def keeps_slices(self) -> bool:
        """Whether the slices at hand are those of the leading dimensions as the parameter is stored."""
        whole, sizes = tuple(range(self.scans)), self.shape[: self.scans]
        leading = {"reshape": sizes, "transpose": whole, "broadcast": whole}
        return self.scanned_sizes == sizes and all(
            min(move.argument, default=self.scans) >= self.scans
            if move.kind == "rev"
            else move.argument[: self.scans] == leading[move.kind]
            for move in self.moves
        )

    def once_only(self) -> Source:
        """The same before it was repeated for the first time."""
        first = next((i for i, move in enumerate(self.moves) if move.kind == "broadcast"), len(self.moves))
        return dataclasses.replace(self, moves=self.moves[:first])

    def once(self) -> tuple[Source, Sizes] | None:
        """The same without repetitions, and where its dimensions are among those of the operand at hand.

        None unless whole dimensions are all that the moves after the first repetition leave or add.
        """
        whole = self.once_only()
        first, before = len(whole.moves), whole.seen_shape
        places = {dim: dim for dim in range(len(before))}  # where each dimension of the whole is by now
        for number, move in enumerate(self.moves[first:], first):
            shape = dataclasses.replace(self, moves=self.moves[:number]).seen_shape
            if move.kind == "broadcast":
                moved = dict(enumerate(move.argument))
            elif move.kind == "transpose":
                moved = {dim: place for place, dim in enumerate(move.argument)}
            elif move.kind == "reshape":
                moved = aligned(shape, move.argument)
            else:
                return None
            after = dataclasses.replace(self, moves=self.moves[: number + 1]).seen_shape
            places = {
                dim: moved[place]
                for dim, place in places.items()
                if place in moved and after[moved[place]] == before[dim]
            }
            if any(size > 1 for dim, size in enumerate(before) if dim not in places):
                return None
        if any(places.get(dim) != dim for dim in range(self.scans)):
            return None
        kept = whole.moved(Move("reshape", tuple(before[dim] for dim in places)))
        return kept, tuple(place - self.scans for place in list(places.values())[self.scans :])

    @property
    def is_broadcast(self) -> bool:
        return any(move.kind == "broadcast" for move in self.moves)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Parameters concatenated into one weight or bias, as LSTM cells do with their gates.

    Attributes:
        whole: the concatenation, as if it were a parameter.
        parts: the parameters, without changes of shape.
        axis: the dimension along which they follow each other.
    """

    whole: Source
    parts: tuple[Source, ...]
    axis: int

    def moved(self, move: Move) -> Fused:
        return dataclasses.replace(self, whole=self.whole.moved(move))


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value computed from parameters and constants, no longer a parameter itself: a scaled or normalised weight.

    Attributes:
        sources: the parameters; empty for a constant.
        with_data: whether data of the weight's own size went into it, element by element: noise, a mask.
    """

    sources: frozenset[Source] = frozenset()
    with_data: bool = False


@dataclasses.dataclass(frozen=True)
class Held:
    """What a program holds beside parameters and data, or a function of it: floats that it closes over, that are a
    single number, or that come in trees like the parameters (old weights, Fisher information). A constant beside a
    parameter of its size. Random keys are none: noise is data.

    Attributes:
        given: whether a single number among the arguments is part of it: another one at every step, maybe.
    """

    given: bool = False


@dataclasses.dataclass(frozen=True)
class Penalised:
    """A scalar of the data to which scalars of parameters were added: a loss with penalties.

    Attributes:
        sources: the parameters. They have no other use as long as nothing but a sum is made of it.
    """

    sources: frozenset[Source]


@dataclasses.dataclass(frozen=True)
class Selected:
    """Data, but for an operation that makes a weight of the parameter in them: a product that multiplies by parts
    that were taken by number, a sum over what data were multiplied by.

    Attributes:
        source: the parameter.
        what: the operation that made them of it.
        shared: dimensions that such a sum runs over; none for parts.
    """

    source: Source
    what: str
    shared: frozenset[int] = frozenset()


CONSTANT = Derived()


def fuse(tags: Sequence[object], axis: int) -> Fused | None:
    """The concatenation of values; None unless all are parameters as they are stored."""
    sources = [tag for tag in tags if isinstance(tag, Source) and not tag.moves and not tag.scans]
    if len(sources) < len(tags):
        return None
    shape = list(sources[0].shape)
    shape[axis] = sum(s.shape[axis] for s in sources)
    return Fused(Source(" + ".join(s.name for s in sources), tuple(shape)), tuple(sources), axis)


def as_source(tag: object) -> Source | None:
    """The parameter, or the concatenation of parameters, that a value is."""
    if isinstance(tag, Fused):
        return tag.whole
    return tag if isinstance(tag, Source) else None


def sources_of(tag: object) -> tuple[Source, ...]:
    """The parameters in a value."""
    if isinstance(tag, Source):
        return (tag,)
    if isinstance(tag, Fused):
        return tag.parts
    return tuple(tag.sources) if isinstance(tag, Derived | Penalised) else ()


def is_data(tag: object) -> bool:
    """Whether a value may be the input of a weighted operation: it is no function of parameters alone."""
    return not sources_of(tag) or (isinstance(tag, Derived) and tag.with_data)


def constant_of(tags: Sequence[object]) -> Held | Derived | None:
    """What is made of constants and of what is held; None unless all values are such."""
    if not all(tag == CONSTANT or isinstance(tag, Held) for tag in tags):
        return None
    held = [tag for tag in tags if isinstance(tag, Held)]
    return Held(any(tag.given for tag in held)) if held else CONSTANT


def is_float(value: object) -> bool:
    """Whether a number or an array is floating."""
    return isinstance(value, float) or jnp.issubdtype(getattr(value, "dtype", jnp.int32), jnp.floating)


def hollow(shape: Sizes) -> np.ndarray:
    """An array of any shape in one byte: what becomes of its shape can be read off it."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def inverse_permutation(permutation: Sequence[int]) -> Sizes:
    return tuple(int(i) for i in np.argsort(permutation))


def aligned(before: Sizes, after: Sizes) -> dict[int, int]:
    """Which dimensions a reshape leaves as they are, and where they are afterwards."""
    if 0 in before:
        return {}
    same: dict[int, int] = {}
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == after[j]:
            same[i] = j
        elif before[i] == 1:
            j -= 1
        elif after[j] == 1:
            i -= 1
        else:  # some are joined or cut: up to where both have as many entries
            left, right = before[i], after[j]
            while left != right:
                if left < right:
                    i += 1
                    left *= before[i]
                else:
                    j += 1
                    right *= after[j]
        i, j = i + 1, j + 1
    return same
