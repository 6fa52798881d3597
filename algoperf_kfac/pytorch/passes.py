"""The backward passes of one capture, and which of them the statistics belong to.

Statistics are those of the gradients that the step finds. Passes with respect to inputs alone have no part in them,
and where one adds to the gradients of parameters, neither have passes that return theirs (to look at, to weigh
losses). Where no pass adds, those that return are all there is, and count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algoperf_kfac.pytorch.hooks import in_backward
from algoperf_kfac.pytorch.options import Options

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.observer import Observer


class Passes:
    """The backward passes of one capture.

    Args:
        observer: sees what they go through.
        options: what the capture is to do.

    Attributes:
        seen: whether there was one for parameters.
        of_fisher: how many there were for a sampled or exact Fisher.
        records: whether output gradients are recorded.
        aside: whether the statistics have no part in the one at hand.
        returned: whether the one at hand runs within another, which gets its gradients.
    """

    def __init__(self, observer: Observer, options: Options) -> None:
        self.seen = False
        self.of_fisher = 0
        self.aside = False
        self.returned = False
        self._empirical = options.config.fisher == "empirical"
        self.records = self._empirical
        self._observer, self._options = observer, options
        self._added = False  # one added to the gradients of parameters
        self._running = False
        self._holding = False
        # What passes showed that returned their gradients and left the graph to others.
        self._held: list[Callable[[], None]] = []
        self._given: list[Tensor] = []  # weights that had a gradient after the latest

    def run(
        self, run: Callable[[], object], inputs: Iterable[object] | None, *, again: bool, keeps: bool, adds: bool
    ) -> object:
        """Run a backward pass.

        One may run within another: of an implicit layer, or of a function that forgets activations and runs its
        layers again.

        Args:
            run: the pass.
            inputs: what gradients are taken with respect to, None for all parameters.
            again: whether gradients of the gradients are to follow (create_graph).
            keeps: whether the graph stays for further passes.
            adds: whether it adds to the gradients that are there, and does not return its own.

        Raises:
            RuntimeError: for gradients of gradients, where the capture has other statistics.
        """
        weights = None if inputs is None else [p for p in inputs if isinstance(p, torch.nn.Parameter)]
        outer, within = (self.aside, self.returned, self._running), in_backward()
        returns = self._empirical and not adds and not within
        self.aside = self.aside or (inputs is not None and not weights) or (returns and self._added)
        # What it returns for weights comes to them once more, as the gradient of the function that asks for it.
        self.returned = self.returned or (within and not adds)
        self._obstruct(bool(weights), returned_within=within and not adds)
        if self.aside and again and self._observer.recorders:
            raise RuntimeError(
                "autograd.grad(..., create_graph=True) inside capture(): K-FAC has no statistics for the gradient "
                "of a gradient. Take the statistics of the plain loss alone inside capture(), and call backward() "
                "on the penalty outside of it: gradients add up"
            )
        if not within:
            self._observer.scale.gradient = None
        if not self.aside and not self.seen:
            self._options.before_backward(adds)
        elif not self.aside and not within:
            self._forget_cleared()
        if self._empirical and adds and not within and not self.aside:
            self._forget_returned()
        self._holding = returns and keeps and not again and not self.aside
        self._running = True
        try:
            return run()
        finally:
            self._holding = False
            if self.aside:
                for recorder in self._observer.recorders.values():
                    recorder.set_aside()
            else:
                self.seen = True
                self._given = [w for w in self._observer.weights.values() if w.grad is not None]
                if not within:
                    self._observer.scale.parts.end_pass()
                    self._options.after_backward()
            self.aside, self.returned, self._running = outer

    def _obstruct(self, for_weights: bool, *, returned_within: bool) -> None:
        """Say what compiled graphs cannot take of the pass that begins."""
        sights = self._observer.sights
        if for_weights:
            sights.obstruct("gradients are taken for given parameters")
        elif returned_within:
            sights.obstruct("a backward pass runs within another")
        elif self.seen and not self.aside:
            sights.obstruct("a capture has several backward passes")

    def for_fisher(self, losses: Iterable[Tensor]) -> None:
        """Record the output gradients of a sampled or exact Fisher: of each loss in a backward pass of its own."""
        weights = list(self._observer.weights.values())
        if not weights:
            return  # no layer is covered, or the forward pass is yet to come
        self.records = True
        for loss in losses:
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for recorder in self._observer.recorders.values():
                recorder.end_pass()
            self.of_fisher += 1
        self.records = False

    def note(self) -> None:
        """An output gradient came back, perhaps in a pass that `run` did not hear of.

        A capture of another optimizer within this one ran it; or it is one of `torch.autograd.backward`, of which
        older versions of torch do not tell. It counts as one that adds.
        """
        if self._empirical and not self._running:
            self._forget_returned()
        self.seen = True

    def record(self, record: Callable[[], None]) -> None:
        """Record an output gradient, or hold it as long as it may be none of the step's."""
        if self._holding:
            self._held.append(record)
        else:
            record()

    def _forget_cleared(self) -> None:
        """Loops may clear gradients between two passes of one capture (sharpness-aware minimisation): what was
        captured of the first goes with them."""
        grads = [weight.grad for weight in self._given if weight.grad is not None]
        if not self._given or any(grad.is_meta for grad in grads):
            return
        if grads and torch.stack([grad.any().to(grads[0].device) for grad in grads]).any():
            return
        self._forget()

    def _forget_returned(self) -> None:
        """Gradients are to be added to: forget what passes showed that returned theirs."""
        if not self._added and self.seen:
            self._held.clear()
            self._forget()
        self._added = True

    def _forget(self) -> None:
        self._observer.gradients.clear()
        self._observer.penalties.gradients.clear()
        for recorder in self._observer.recorders.values():
            recorder.forget_seen()

    def settle(self) -> None:
        """There are no further passes: what was held is the step's."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for record in self._held:
                record()
        self._held.clear()

    def release(self) -> None:
        """Let go of what hangs on the graph."""
        self._held.clear()
        self._given.clear()
