"""Which rows of a layer's input and output belong to which example, and which of them count.

Everything here works on shapes, so that both frameworks choose alike; the arrays themselves are theirs.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, Self, TypeAlias

from algoperf_kfac.errors import check_patterns, listed

BY_GRADIENT = "gradient"
READOUTS = ("mean", "sum")


class Array(Protocol):
    """An array of any framework, as far as its shape goes."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Positions:
    """How the leading dimensions of a layer's input and output are to be read.

    Attributes:
        mask: shape of the leading dimensions (or of the first few of them), not zero where a position counts; or
            "gradient": a position counts where its output gradient is not exactly zero in every channel. These
            are the positions b[n, r] = 0 that the loss does not depend on (padding, positions without target),
            found layer by layer from the data. Over several backward passes a position counts if any pass
            reaches it. None: all positions count.
        segment_ids: shape (rows,): example index of each row of dimension 0, for graphs and packed batches.
            Also (T, N), or of as many leading dimensions as the ids have.
        num_segments: number of examples in `segment_ids`; needed with it (reading it off would cost a
            host synchronisation, and shapes are static in JAX).
        batch_dim: which leading dimension runs over examples, e.g. 1 for (length, batch, features). None: the
            first; in JAX the one that was seen to grow with the number of examples, if there is one.
        readout: "mean" if positions are averaged before the loss, "sum" if they are summed; decides which of
            reduce's factors takes the 1/R where R varies between examples.

    Raises:
        ValueError: for another readout, a mask that is another string, or segment_ids without num_segments.
    """

    mask: Array | str | None = None
    segment_ids: Array | None = None
    num_segments: int | None = None
    batch_dim: int | None = None
    readout: str = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.mask, str) and self.mask != BY_GRADIENT:
            raise ValueError(f"mask={self.mask!r}: allowed is an array, None or {BY_GRADIENT!r}")
        if self.readout not in READOUTS:
            raise ValueError(f"readout={self.readout!r}: allowed is 'mean' or 'sum'")
        if (self.segment_ids is None) != (self.num_segments is None):
            raise ValueError("segment_ids and num_segments go together")

    @property
    def by_gradient(self) -> bool:
        return isinstance(self.mask, str)

    @property
    def examples_dim(self) -> int:
        """`batch_dim`, and the first dimension where nothing is said: that of examples in a mask."""
        return self.batch_dim or 0

    @property
    def array_mask(self) -> Array | None:
        """The mask where it is an array."""
        return None if isinstance(self.mask, str) else self.mask


PositionsLike: TypeAlias = Positions | Array | str | Sequence["Positions | Array | str"]
"""What a caller may say: a description, a bare mask, "gradient", or a list of these of which a layer takes the
first that fits."""

Candidates: TypeAlias = list[Positions] | dict[str, list[Positions]]
"""The same as lists, for the whole model or by pattern of layer names."""


def as_candidates(positions: PositionsLike | Mapping[str, PositionsLike] | None) -> Candidates:
    """What a caller said, as lists."""
    if isinstance(positions, Mapping):
        return {pattern: _as_list(value) for pattern, value in positions.items()}
    return [] if positions is None else _as_list(positions)


def _as_list(positions: PositionsLike) -> list[Positions]:
    if isinstance(positions, list | tuple):
        return [_as_one(item) for item in positions]
    return [_as_one(positions)]


def _as_one(item: object) -> Positions:
    if isinstance(item, Positions):
        return item
    if isinstance(item, str) or (hasattr(item, "shape") and hasattr(item, "ndim")):
        return Positions(mask=item)
    raise ValueError(f"positions: a {type(item).__name__} is neither a Positions, nor a mask, nor {BY_GRADIENT!r}")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one call of a layer, as it has them.

    Attributes:
        leading: sizes of the dimensions over examples and positions, in the layer's own order; of a convolution
            (N, *output positions).
        batch_first: whether examples come first whatever `Positions.batch_dim` says, as in convolutions.
        examples: which dimension runs over examples where `Positions.batch_dim` does not say it.
    """

    leading: tuple[int, ...]
    batch_first: bool = False
    examples: int = 0

    def batch_dim(self, positions: Positions) -> int:
        """Which dimension runs over examples."""
        dim = self.examples if positions.batch_dim is None else positions.batch_dim
        return 0 if self.batch_first or len(self.leading) <= dim else dim

    def described(self, ways: Sequence[Positions]) -> Rows:
        """The same, dimension 0 running over examples where masks and segment ids fit this order alone."""
        plain = dataclasses.replace(self, examples=0)
        own_order = any(map(plain.fits, ways)) and not any(map(self.fits, ways))
        return plain if own_order else self

    def sizes(self, positions: Positions) -> tuple[int, ...]:
        """The leading sizes, examples first; (1,) where there are none."""
        return to_front(self.leading, self.batch_dim(positions)) or (1,)

    def fits(self, positions: Positions) -> bool:
        """Whether mask and segment ids have the sizes of these rows."""
        sizes = self.sizes(positions)
        if positions.segment_ids is not None and sizes[:1] != tuple(positions.segment_ids.shape):
            return False
        mask = positions.array_mask
        return mask is None or sizes[: mask.ndim] == mask_sizes(mask, positions)


def mask_sizes(mask: Array, positions: Positions) -> tuple[int, ...]:
    """The sizes of a mask, examples first."""
    dim = positions.examples_dim
    return to_front(mask.shape, dim) if dim < mask.ndim else tuple(mask.shape)


def to_front(sizes: Sequence[int], dim: int) -> tuple[int, ...]:
    """Sizes with dimension `dim` first, where there are several."""
    sizes = tuple(sizes)
    return (sizes[dim], *sizes[:dim], *sizes[dim + 1 :]) if len(sizes) > 1 else sizes


def candidates_for(name: str, candidates: Candidates) -> list[Positions]:
    """The descriptions that a layer may take, in order.

    Of several patterns that match its name it takes the one that says most of it. Which stands first means
    nothing: a mapping that goes through `jax.jit` comes out sorted.

    Raises:
        ValueError: naming the layer, if two patterns say equally much of it.
    """
    if not isinstance(candidates, Mapping):
        return candidates
    pattern = most_said("positions", (name,), candidates)
    return [] if pattern is None else candidates[pattern]


def name_fits(name: str, pattern: str) -> bool:
    """Whether a pattern (fnmatch) matches a name; a name matches itself, whatever characters it has ("head[0]")."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def most_said(argument: str, names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The pattern (fnmatch) that says most of one of a layer's names; None where none matches.

    Args:
        argument: that holds the patterns.
        names: what the layer goes by, its own name first.
        patterns: to choose from.

    Raises:
        ValueError: naming the layer, if two patterns say equally much.
    """
    names = list(names)
    fitting = {p for p in patterns if any(name_fits(name, p) for name in names)}
    said = {p: (p in names, *_said(p)) for p in fitting}
    matches = sorted(fitting, key=said.__getitem__, reverse=True)
    if len(matches) > 1 and said[matches[0]] == said[matches[1]]:
        first, second = sorted(matches[:2])
        raise ValueError(
            f"{argument}: layer {names[0]} matches {first!r} and {second!r}, and neither says more of its "
            f"name: give {names[0]!r} itself, too"
        )
    return matches[0] if matches else None


def _said(pattern: str) -> tuple[bool, int]:
    """How much a pattern says of a name: whether it is the name, and how many of its characters it fixes."""
    fixed = re.sub(r"\[.[^]]*\]|[*?]", "", pattern)
    return fixed == pattern, len(fixed)


def choose(name: str, candidates: Candidates, rows: Rows) -> Positions | None:
    """The description that a call of a layer takes; None where all its rows are examples that count.

    A single description given by the layer's name has to fit, of others the first that fits is taken. One row per
    segment (a layer behind the read-out) is an example each.

    Args:
        name: the layer's.
        candidates: from `as_candidates`.
        rows: of the call.

    Raises:
        ValueError: naming the layer, if several segmentations fit, or if there are some and none fits.
    """
    own = candidates_for(name, candidates)
    if isinstance(candidates, Mapping) and len(own) == 1:
        return own[0]
    fitting = [p for p in own if rows.fits(p)]
    by_name = f"describe its positions by its name, positions={{{name!r}: ..., ...}}"
    if sum(p.segment_ids is not None for p in fitting) > 1:
        # Nothing but their number tells what the rows are, and a wrong guess would not show.
        raise ValueError(
            f"layer {name} has {rows.sizes(fitting[0])[0]} rows in dimension 0, which fits several of the "
            f"segmentations: {by_name}"
        )
    if fitting:
        return fitting[0]
    segmented = [p for p in own if p.segment_ids is not None]
    for p in segmented:
        if rows.sizes(p)[0] == p.num_segments:
            return dataclasses.replace(p, segment_ids=None, num_segments=None) if p.by_gradient else None
    if segmented:
        # Taken as they are, these rows would silently be examples with a single position each.
        shapes = [tuple(p.segment_ids.shape) for p in segmented if p.segment_ids is not None]
        numbers = ", ".join(str(shape[0] if len(shape) == 1 else shape) for shape in shapes)
        raise ValueError(
            f"layer {name} has {rows.sizes(segmented[0])[0]} rows in dimension 0, neither those of segment_ids "
            f"({numbers}) nor one per segment ({segmented[0].num_segments}): {by_name}{_second(segmented[0], rows)}"
        )
    return None


def _second(positions: Positions, rows: Rows) -> str:
    """What to say where the second dimension may be the one over examples."""
    if rows.batch_first or len(rows.leading) < 2 or rows.leading[1] != positions.num_segments:
        return ""
    return "; where the sequence comes first, as (T, N, features), it is Positions(batch_dim=1) without segments"


def check_fits(candidates: Candidates, rows: Mapping[str, Sequence[Rows]], others: Iterable[str] = ()) -> None:
    """Descriptions that concern no layer at all were a mistake, and would be ignored without a word.

    Of a list, one that fits is enough: the others may be for kinds of rows that no covered layer has.

    Args:
        candidates: from `as_candidates`.
        rows: of the calls of each covered layer, by its name.
        others: names of layers and parameters that are not covered, which patterns may mean, too.

    Raises:
        ValueError: naming a pattern that matches nothing, or descriptions that fit no layer, and the layers' rows.
    """
    if not isinstance(candidates, Mapping):
        _check_list("", candidates, rows)
        return
    names = {*rows, *others}
    unmatched = [p for p in candidates if not any(name_fits(name, p) for name in names)]
    check_patterns("positions", candidates, unmatched, "layer")
    for pattern, own in candidates.items():
        if len(own) > 1:  # a single one has to fit each layer, which `Layout.of` checks
            _check_list(pattern, own, {name: rows[name] for name in rows if name_fits(name, pattern)})


def _check_list(pattern: str, given: Sequence[Positions], rows: Mapping[str, Sequence[Rows]]) -> None:
    """`check_fits` of a list, for the layers of a pattern or for all."""
    # Where there are segments, `choose` names each layer that none of them fits.
    if not given or not rows or any(p.segment_ids is not None for p in given):
        return
    if any(one.described(given).fits(p) for calls in rows.values() for one in calls for p in given):
        return
    masks = " and ".join(str(tuple(p.array_mask.shape)) for p in given if p.array_mask is not None)
    seen = (f"{name} {' and '.join(sorted({str(one.leading) for one in calls}))}" for name, calls in rows.items())
    argument = f"positions[{pattern!r}]" if pattern else "positions"
    raise ValueError(
        f"{argument}: a mask of shape {masks} fits no layer. Their rows are: {listed(seen)}. A mask has the first "
        "dimensions of these; where a model flattens examples and positions into rows, give "
        "Positions(mask.reshape(-1), segment_ids=..., num_segments=...), segment_ids being the example of each row"
    )


def other_rows(rows: Mapping[str, int], argument: str, *, scaled: bool, calls: int = 1) -> str | None:
    """What to say of layers whose number of examples is not that of the batch; None where all agree.

    Args:
        rows: how many examples each layer sees, the first one first: its are those of the batch.
        argument: how positions are given, with `{}` for them.
        scaled: whether the caller said what the loss was divided by.
        calls: how often the first one is called on its examples, where that may as well be parts of the batch.
    """
    first, examples = next(iter(rows.items()), ("", 0))
    others = {name: number for name, number in rows.items() if number != examples}
    if not others:
        return None
    parts = listed(f"{name} ({number})" for name, number in others.items())
    scale = "Each" if scaled else f"B is scaled by {examples} throughout, and each"
    way_out = argument.format("positions={'pattern': Positions(segment_ids=..., num_segments=...)}")
    of_parts = (
        f". {first} is called {calls} times: where each call has examples of its own (chunks of tokens, a loop "
        f"over parts of the batch), say what the loss is divided by: {argument.format('loss_normalizer=...')}"
    )
    return (
        f"the batch has {examples} examples, as {first} sees them, and other layers have other numbers of rows in "
        f"dimension 0: {parts}. {scale} row counts as an example of its own in these layers; if several belong "
        f"together (windows, packed batches), say so: {way_out}; where the sequence comes first: "
        f"Positions(batch_dim=1){of_parts if calls > 1 and not scaled else ''}"
    )


def more_rows(name: str, rows: int, whole: str, number: int, argument: str) -> str:
    """What to say where all layers see more rows than there are examples, it seems.

    Args:
        name: a layer.
        rows: those it sees.
        whole: what has fewer.
        number: how many these are.
        argument: how to say what rows are, with `{}` for it.
    """
    ids, by_gradient = "positions=Positions(segment_ids=..., num_segments=...)", 'positions="gradient"'
    normalizer = f"loss_normalizer={number}"
    return (
        f"layer {name} sees {rows} rows, and {whole} {number}, fewer than any layer: each row counts as an example "
        f"of its own, and B is scaled by {rows}. If several belong together (frames, windows, nodes of a graph), "
        f"say so: {argument.format(ids)}; else say what the summed loss was divided by: "
        f"{argument.format(normalizer)}, and where rows have no part in the loss (a mask), {by_gradient}"
    )


def in_parts(found: Mapping[str, tuple[int, int]], whole: str, remedy: str, argument: str) -> str:
    """What to say of layers that see the batch in parts, one call after the other, it seems.

    Args:
        found: by layer, how many calls it has, and how many rows in all of them; at least one layer.
        whole: what has so many rows.
        remedy: what to do where each call has examples of its own.
        argument: how to say what the loss was divided by, with `{}` for it.
    """
    name, (calls, rows) = next(iter(found.items()))
    return (
        f"layer {name} is called {calls} times, on {rows} rows in all, as many as {whole}. Calls on equally many "
        f"rows are taken to see the same examples (so in {len(found)} layers). Where each call has examples of its "
        f"own (a loop over parts of the batch), {remedy.format(rows)}; where calls are positions (time steps), say "
        f"what the loss is divided by: {argument.format(rows)}"
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """`Positions` fitted to one call of a layer with N x R positions; what is known from shapes.

    Attributes:
        num_examples: N, or the number of segments.
        positions: R.
        batch_dim: which leading dimension of the call runs over examples.
        readout: see `Positions`.
        by_gradient: whether the output gradients decide which positions count.
        ragged: whether examples may differ in the number of positions that count.
    """

    num_examples: int
    positions: int
    batch_dim: int = 0
    readout: str = "mean"
    by_gradient: bool = False
    ragged: bool = False

    @classmethod
    def of(cls, positions: Positions | None, rows: Rows, name: str) -> Self:
        """Fit a description to a call.

        Raises:
            ValueError: naming the layer, if a mask or the segment ids do not fit.
        """
        chosen = positions or Positions()
        sizes = rows.sizes(chosen)
        mask, ids = chosen.array_mask, chosen.segment_ids
        if mask is not None and sizes[: mask.ndim] != mask_sizes(mask, chosen):
            raise ValueError(
                f"layer {name}: a mask of shape {tuple(mask.shape)} does not fit positions {rows.leading}"
            )
        if ids is not None and tuple(ids.shape) != sizes[:1]:
            raise ValueError(
                f"layer {name}: segment_ids of shape {tuple(ids.shape)} do not fit {sizes[0]} rows in dimension 0"
            )
        return cls(
            num_examples=sizes[0] if chosen.num_segments is None else chosen.num_segments,
            positions=math.prod(sizes[1:]),
            batch_dim=rows.batch_dim(chosen) if len(sizes) > 1 else 0,
            readout=chosen.readout,
            by_gradient=chosen.by_gradient,
            ragged=chosen.by_gradient or mask is not None or ids is not None,
        )
