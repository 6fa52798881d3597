"""The statistics of the coming step, and the gradients they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.statistics import Statistics


class Pending:
    """What the captures since the last step gathered.

    It belongs to the gradients that are there. Where these are cleared behind the optimizer's back, by
    `model.zero_grad()` or `p.grad.data.zero_()` after a step that was skipped, it is forgotten.

    Attributes:
        statistics: by layer.
        captures: captures that drew labels.
        captured: whether some capture saw a backward pass.
        unfinished: what layers missed in a capture without one, by name.
        hint: what that capture knew of the reason.
        inside: whether a capture is open that takes statistics.
    """

    inside = False  # on the class, too: states that were pickled before have none

    def __init__(self) -> None:
        self.statistics: dict[str, Statistics] = {}
        self.captures = 0
        self.captured = False
        self.unfinished: dict[str, str] = {}
        self.hint = ""
        self._alive: dict[str, Tensor] = {}  # of layers with a gradient: whether it had anything but zeros, ()

    def enter(self) -> None:
        """A capture opens.

        Raises:
            RuntimeError: within another one.
        """
        if self.inside:
            raise RuntimeError(
                "a capture() inside a capture() of the same optimizer would count the statistics twice: open one "
                "after the other, for each (micro-)batch; step(closure) opens one around its closure"
            )
        self.inside = True

    def leave(self) -> None:
        """The capture is over."""
        self.inside = False

    def check_outside(self) -> None:
        """Raises RuntimeError within a capture, whose statistics are made when it is left."""
        if self.inside:
            raise RuntimeError(
                "step() inside capture(): statistics are made when the `with` block is left. Put forward and "
                "backward pass into it, and call step() after it; step(closure) opens a capture of its own"
            )

    def add(self, statistics: Mapping[str, Statistics], layers: Mapping[str, CoveredLayer]) -> None:
        """Take in what a capture gathered, and remember the gradients that are there after it."""
        for name, new in statistics.items():
            if name in self.statistics:
                self.statistics[name].add(new)
            else:
                self.statistics[name] = new
        self.captured = True
        self._alive = {
            name: layer.weight.grad.any()
            for name, layer in layers.items()
            if name in self.statistics and layer.weight.grad is not None
        }

    def drop(self, name: str) -> None:
        """Forget those of a layer."""
        self.statistics.pop(name, None)

    def forget(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def forget_stale(self, layers: Mapping[str, CoveredLayer]) -> None:
        """Forget everything if the gradients are gone.

        Neither versions nor identities of tensors tell: `p.grad.data.zero_()` changes none of them, and scaling by
        `p.grad = p.grad / 2` changes both. So their values are asked, which waits for the device once; only
        between the captures of one statistics step (micro-batches, skipped steps) is there anything to ask.
        """
        if not self.statistics or not self._alive:
            return
        grads = {name: layers[name].weight.grad for name in self._alive if name in layers}
        there = {name: grad for name, grad in grads.items() if grad is not None}
        if not there:
            self.forget()
            return
        if any(grad.is_meta for grad in there.values()):
            return
        device = next(iter(there.values())).device
        pairs = [torch.stack([self._alive[name], grad.any()]).to(device) for name, grad in there.items()]
        before, now = torch.stack(pairs).any(0).tolist()
        if before and not now:
            self.forget()
