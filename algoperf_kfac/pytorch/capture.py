"""Capture: the context around a forward and a backward pass in which layers are recorded, the model unedited.

On statistics steps the model runs under a `TorchFunctionMode` (`interception.py`), an observer records what it does
(`observer.py`), and at the end statistics are made of that (`gathering.py`). On others nothing happens.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algoperf_kfac.errors import check_loss_normalizer, check_loss_normalizer_array
from algoperf_kfac.pytorch import fisher
from algoperf_kfac.pytorch.gathering import Gathered, gather
from algoperf_kfac.pytorch.interception import Interceptor, TracedInterceptor, eagerly
from algoperf_kfac.pytorch.observer import Observer
from algoperf_kfac.pytorch.options import Options
from algoperf_kfac.pytorch.statistics import Scalar

if TYPE_CHECKING:
    from types import TracebackType

    from algoperf_kfac.pytorch.layer_book import Layers


class Capture(contextlib.AbstractContextManager["Capture"]):
    """Context around the forward and backward pass of one (micro-)batch; made by `KFAC.capture`.

    Args:
        layers: the book of layers.
        finish: is told what the capture came to.
        options: what it is to do.
        loss_normalizer: see below.

    Attributes:
        active: whether this is a statistics step; if not, nothing is watched and entering costs nothing.
        loss_normalizer: what the summed loss was divided by before `backward`: the number of examples
            (default), the number of valid tokens, ... A tensor is fine. Output gradients are scaled by it, so
            that B belongs to the summed, per-example loss. May be set until the context is left.
        observer: sees the passes.
    """

    def __init__(
        self,
        layers: Layers,
        finish: Callable[[Gathered], None],
        options: Options,
        loss_normalizer: Scalar | None = None,
    ) -> None:
        self.active = options.active
        self.loss_normalizer = loss_normalizer
        self.observer = Observer(layers, options)
        self._finish = finish
        self._options = options
        self._entered = False
        self._stack = contextlib.ExitStack()

    @property
    def loss_normalizer(self) -> Scalar | None:
        return self._loss_normalizer

    @loss_normalizer.setter
    def loss_normalizer(self, value: Scalar | None) -> None:
        if isinstance(value, Tensor):
            real = not (value.is_complex() or value.dtype == torch.bool)
            check_loss_normalizer_array(tuple(value.shape), real=real, dtype=value.dtype)
        elif value is not None:
            check_loss_normalizer(value)
        self._loss_normalizer = value

    def __enter__(self) -> Capture:
        if self._entered:
            raise RuntimeError("a capture() is for one pass: call optimizer.capture() again")
        self._entered = True
        if self.active:
            self._options.pending.enter()
            taps, observer = self._options.taps, self.observer
            # A compiled graph hides its operations: without taps the same model runs eagerly.
            if taps is None and "torch._dynamo" in sys.modules:
                self._stack.enter_context(eagerly())
            self._stack.enter_context(Interceptor(observer) if taps is None else TracedInterceptor(observer, taps))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.active:
            return
        self._options.pending.leave()
        self._stack.close()
        self.active = False
        self.observer.passes.records = False
        try:
            if exc_type is None:
                self._collect()
        finally:
            if self._options.taps is not None:
                self._options.taps.clear()
            self.observer.release()

    def _collect(self) -> None:
        self._options.meet(self.observer.parallels)
        number = self.loss_normalizer
        # Not earlier: a batch that has no example that counts may be given up before its backward pass.
        if isinstance(number, Tensor) and number.device.type == "cpu" and self.observer.passes.seen:
            check_loss_normalizer(number.item())
        self._finish(gather(self.observer, self._options, self.loss_normalizer))

    def backward_fisher(
        self,
        outputs: Tensor | tuple[Tensor, Tensor],
        loss_type: enum.Enum | str,
        mask: Tensor | None = None,
        *,
        class_dim: int = -1,
    ) -> None:
        """The extra backward passes of `fisher="mc"` and "exact", through the forward pass just made.

        Does nothing for the empirical Fisher and outside statistics steps, so it may always be called; call it
        before `loss.backward()`, which frees the graph. A model with several heads: once for each.

        Args:
            outputs, loss_type, mask: as in `fisher.sampled_loss`.
            class_dim: dimension of the logits over classes; 1 for (N, C, H, W).
        """
        config = self._options.config
        if not self.active or config.fisher == "empirical":
            return
        self._options.meet(self.observer.parallels)  # processes that share draw labels of their own
        outputs = fisher.classes_last(outputs, loss_type, class_dim)
        if config.fisher == "mc":
            generator = self._options.generator()
            losses: Iterator[Tensor] = (
                fisher.sampled_loss(outputs, loss_type, mask, generator) for _ in range(config.fisher_samples)
            )
        else:
            losses = fisher.exact_losses(outputs, loss_type, mask)
        self.observer.passes.for_fisher(losses)
