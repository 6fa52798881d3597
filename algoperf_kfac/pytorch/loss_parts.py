"""Batches that loss functions take part by part: chunks of tokens before a large vocabulary, micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from algoperf_kfac.pytorch.statistics import Scalar

_PLACES = "K-FAC: calls of layers"  # in the metadata of autograd's nodes


@dataclasses.dataclass(eq=False)
class Place:
    """Where a call of a layer stands in the graph of a forward pass; the graph's node has it, and not the reverse.

    Attributes:
        name: of the layer.
        sizes: of what may be the rows of the call.
    """

    name: str
    sizes: frozenset[int]

    @classmethod
    def of(cls, name: str, sizes: Iterable[int], output: Tensor) -> Place | None:
        """Mark the node that made an output; None if there is none."""
        base = output._base if output._is_view() else None  # an in-place operation leaves the base's node in place
        node: Any = output.grad_fn if base is None or base.grad_fn is None else base.grad_fn
        if node is None:
            return None
        place = cls(name, frozenset(sizes))
        node.metadata.setdefault(_PLACES, []).append(place)
        return place


@dataclasses.dataclass
class Slice:
    """A slice of a tensor of targets.

    Attributes:
        numbers: how many it has.
        rows: and how many rows.
        within: whether it lies within one row of the whole tensor.
        losses: the nodes of the losses taken of it; none when the pass is over.
        gradient: the largest that a loss got that is a mean over it; None if there was none.
    """

    numbers: int
    rows: int
    within: bool
    losses: list[Any] = dataclasses.field(default_factory=list)
    gradient: Tensor | None = None

    def note_gradient(self, gradient: Tensor) -> None:
        """Remember the gradient of a mean: auxiliary losses on the same targets have smaller ones."""
        gradient = gradient.detach().reshape(())
        self.gradient = gradient if self.gradient is None else torch.maximum(self.gradient, gradient)


@dataclasses.dataclass
class Slices:
    """What loss functions took of one tensor of targets in one forward pass.

    Attributes:
        whole: the tensor, held as long as its identity stands for it; None when the pass is over.
        by_start: by where they begin in its storage.
        reached: by call of a layer that losses depend on, the bits of the slices these were taken of.
        whole_sizes: of calls that all of them depend on.
    """

    whole: Tensor | None
    by_start: dict[int, Slice] = dataclasses.field(default_factory=dict)
    reached: dict[Place, int] = dataclasses.field(default_factory=dict)
    whole_sizes: set[int] = dataclasses.field(default_factory=set)

    @property
    def are_parts(self) -> bool:
        """Whether there are several, one behind the other."""
        ends = [start + part.numbers for start, part in sorted(self.by_start.items())]
        return len(ends) > 1 and ends[:-1] == sorted(self.by_start)[1:]

    @property
    def rows(self) -> tuple[int, ...]:
        """Of each slice, as they were taken."""
        return tuple(part.rows for part in self.by_start.values())

    @property
    def _all(self) -> int:
        """The bits of all slices."""
        return (1 << len(self.by_start)) - 1

    def close(self) -> None:
        """See which calls the losses depend on, and let go of what belongs to the pass."""
        roots = [(node, 1 << number) for number, part in enumerate(self.by_start.values()) for node in part.losses]
        self.reached = _reached(roots)
        self.whole_sizes = {s for place, mask in self.reached.items() if mask == self._all for s in place.sizes}
        self.whole = None
        for part in self.by_start.values():
            part.losses = []

    @property
    def carry_on(self) -> bool:
        """Whether they are steps of a recurrence: later losses depend on the calls that earlier ones depend on.

        The losses of parts depend on calls of their own, and on those on the whole batch, which all of them need.
        """
        bits: dict[str, set[int]] = {}
        for place, mask in self.reached.items():
            if not place.sizes.isdisjoint(self.rows):
                bits.setdefault(place.name, set()).add(mask)
        for masks in bits.values():
            own = {mask for mask in masks if mask.bit_count() == 1}
            if masks - own - {self._all} or (masks > own and 0 < sum(own) < self._all):
                return True
        return False

    def numbers(self, places: Sequence[Place | None]) -> list[int] | None:
        """Of the calls of a layer, which part each is on, one or several on each; None if they are on no parts."""
        if all(place is None for place in places):  # run again by checkpointing: they are in the order of the parts
            each, rest = divmod(len(places), len(self.by_start))
            return None if rest or not each else [number // each for number in range(len(places))]
        masks = [0 if place is None else self.reached.get(place, 0) for place in places]
        if any(mask.bit_count() != 1 for mask in masks):
            return None
        numbers = [mask.bit_length() - 1 for mask in masks]
        return numbers if len(set(numbers)) == len(self.by_start) else None

    def fits(self, number: int, examples: int, positions: int) -> bool:
        """Whether a call on so many examples may be on a part.

        What lies within a row is of one example, and has parts of it for rows only where a layer sees these. So
        are positions where what all parts need has seen as many examples as each call (levels of a pyramid).
        """
        part = list(self.by_start.values())[number]
        if part.rows == examples:
            return examples > 1 or not part.within
        return part.rows == examples * positions and not part.within and examples not in self.whole_sizes

    @property
    def means(self) -> Scalar:
        """How many means over examples the loss is the sum of: as many as parts if they are added up, else one."""
        gradients = [part.gradient for part in self.by_start.values() if part.gradient is not None]
        if not gradients:
            return 1.0
        largest = functools.reduce(torch.maximum, gradients)
        one = torch.ones_like(largest)
        return torch.where(largest > 1 - 1e-3, one * len(self.by_start), one)


class LossParts:
    """Sees of which parts of a batch the calls of a loss function are, by the targets they take.

    Calls of a layer on equally many rows may see the same examples, as time steps do, or each its own. Targets that
    are neighbouring blocks of one tensor (`y[i : i + n]`, `y.flatten().chunk(k)`) belong to different rows of a
    batch. Those of time steps are columns (`y[:, t]`), or rows where time comes first (`y[t]`): these, which cannot
    be told from single examples, are no parts.
    """

    def __init__(self) -> None:
        self._of_pass: dict[int, Slices] = {}  # by identity of the whole, since the latest backward pass
        self._closed: list[Slices] = []

    def note(self, target: Tensor, loss: Tensor) -> Slice | None:
        """Remember what a loss function took as its target; where, if it is a slice."""
        whole = target._base if target.layout is torch.strided else None
        if whole is None or not target.ndim or not target.numel() or not target.is_contiguous():
            return None
        if target.ndim < whole.ndim and target.shape == whole.shape[-target.ndim :]:
            return None  # y[t]
        slices = self._of_pass.setdefault(id(whole), Slices(whole))
        within = whole.ndim > 1 and target.numel() < whole[0].numel()
        new = Slice(target.numel(), target.shape[0], within)
        part = slices.by_start.setdefault(int(target.storage_offset()), new)
        part.losses.append(loss.grad_fn)
        return part

    def end_pass(self) -> None:
        """A backward pass is over: targets that follow are another forward pass's."""
        # Passes may be many, and what has one slice is no part.
        closed = [slices for slices in self._of_pass.values() if slices.are_parts]
        for slices in closed:
            slices.close()
        self._closed += [slices for slices in closed if not slices.carry_on]
        self._of_pass.clear()

    @property
    def found(self) -> list[Slices]:
        """All that are parts, the latest first."""
        return self._closed[::-1]


def _reached(roots: Sequence[tuple[Any, int]]) -> dict[Place, int]:
    """The calls that losses depend on.

    Args:
        roots: the losses' nodes, and their bits.

    Returns:
        By call, the bits of the losses.
    """
    masks: dict[Any, int] = {}
    for node, bit in roots:
        masks[node] = masks.get(node, 0) | bit
    found: dict[Place, int] = {}
    for node in reversed(_inputs_first(list(masks))):
        for place in node.metadata.get(_PLACES, ()):
            found[place] = masks[node]
        for source, _ in node.next_functions:
            if source is not None:
                masks[source] = masks.get(source, 0) | masks[node]
    return found


def _inputs_first(roots: Sequence[Any]) -> list[Any]:
    """All nodes of a graph, each behind those it depends on."""
    order, entered = [], set()
    stack = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack += [(source, False) for source, _ in node.next_functions if source is not None]
    return order
