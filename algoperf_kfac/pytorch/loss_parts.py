"""Batches that loss functions take part by part: chunks of tokens before a large vocabulary, micro-batches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from algoperf_kfac.pytorch.statistics import Scalar


@dataclasses.dataclass
class Slices:
    """What loss functions took of one tensor of targets in one forward pass.

    Attributes:
        whole: the tensor, held as long as its identity stands for it; None when the pass is over.
        sizes: by where a slice begins in its storage, how many numbers and how many rows it has.
        gradients: what those of the losses got together that are means; None if there was none.
    """

    whole: Tensor | None
    sizes: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    gradients: Tensor | None = None

    @property
    def are_parts(self) -> bool:
        """Whether there are several, one behind the other."""
        ends = [start + numbers for start, (numbers, _) in sorted(self.sizes.items())]
        return len(ends) > 1 and ends[:-1] == sorted(self.sizes)[1:]

    @property
    def rows(self) -> tuple[int, ...]:
        """Of each slice, as they were taken."""
        return tuple(rows for _, rows in self.sizes.values())

    def note_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of a mean over a slice."""
        gradient = gradient.detach().reshape(())
        self.gradients = gradient if self.gradients is None else self.gradients + gradient

    @property
    def means(self) -> Scalar:
        """How many means over examples the loss is the sum of: as many as parts if they are added up, else one."""
        if self.gradients is None:
            return 1.0
        number = torch.full_like(self.gradients, len(self.sizes))
        return torch.where(torch.isclose(self.gradients, number, rtol=1e-3), number, torch.ones_like(number))


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

    def note(self, target: Tensor) -> Slices | None:
        """Remember what a loss function took as its target; where, if it is a slice."""
        whole = target._base if target.layout is torch.strided else None
        if whole is None or not target.ndim or not target.numel() or not target.is_contiguous():
            return None
        if target.ndim < whole.ndim and target.shape == whole.shape[-target.ndim :]:
            return None  # y[t]
        slices = self._of_pass.setdefault(id(whole), Slices(whole))
        slices.sizes.setdefault(int(target.storage_offset()), (target.numel(), target.shape[0]))
        return slices

    def end_pass(self) -> None:
        """A backward pass is over: targets that follow are another forward pass's."""
        closed = self._latest  # passes may be many, and what has one slice is no part
        for slices in closed:
            slices.whole = None
        self._closed += closed
        self._of_pass.clear()

    @property
    def found(self) -> list[Slices]:
        """All that are parts, the latest first."""
        return [*self._latest, *reversed(self._closed)]

    @property
    def _latest(self) -> list[Slices]:
        return [slices for slices in self._of_pass.values() if slices.are_parts]
