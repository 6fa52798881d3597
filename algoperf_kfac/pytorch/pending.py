"""The statistics of the coming step, and the gradients they belong to."""

from __future__ import annotations

from collections.abc import Mapping

from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.statistics import Statistics


class Pending:
    """What the captures since the last step gathered.

    It belongs to the gradients that are there. Where these are cleared behind the optimizer's back, by
    `model.zero_grad()` after a step that was skipped, it is forgotten.

    Attributes:
        statistics: by layer.
        captures: captures that drew labels.
        captured: whether some capture saw a backward pass.
        unfinished: what layers missed in a capture without one, by name.
    """

    def __init__(self) -> None:
        self.statistics: dict[str, Statistics] = {}
        self.captures = 0
        self.captured = False
        self.unfinished: dict[str, str] = {}
        self._versions: dict[str, int] = {}  # of the gradients

    def add(self, statistics: Mapping[str, Statistics], layers: Mapping[str, CoveredLayer]) -> None:
        """Take in what a capture gathered, and remember the gradients that are there after it."""
        for name, new in statistics.items():
            if name in self.statistics:
                self.statistics[name].add(new)
            else:
                self.statistics[name] = new
        self.captured = True
        self._versions = {
            name: layer.weight.grad._version
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
        """Forget everything if the gradients are gone."""
        if not self.statistics or not self._versions:
            return
        grads = {name: layers[name].weight.grad for name in self._versions if name in layers}
        there = {name: grad for name, grad in grads.items() if grad is not None}
        # In place a gradient may have been scaled, clipped or zeroed, which the version does not tell apart.
        changed = [grad for name, grad in there.items() if grad._version != self._versions[name]]
        if not there or (len(changed) == len(there) and not any(bool(grad.any()) for grad in changed)):
            self.forget()
