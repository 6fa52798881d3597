"""One layer's statistics, gathered over its calls in a capture and summed as they come.

An input is summed when the layer is called and then let go. Where output gradients decide which positions count, it
is kept until they come back: as long as autograd keeps it, with several backward passes until the last of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from algoperf_kfac.errors import calls_disagree
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.positions import Positions, Rows
from algoperf_kfac.pytorch import factors
from algoperf_kfac.pytorch.factors import MaskedLayout
from algoperf_kfac.pytorch.geometry import ConvGeometry
from algoperf_kfac.pytorch.operations import Operation

Scalar = Tensor | float


@dataclasses.dataclass
class Statistics:
    """What one or more captures gathered for one layer, as sums.

    Attributes:
        a: sums of input outer products, a (groups, b, b) matrix per block of A.
        b: sums of output-gradient outer products of the per-example loss, per block of B.
        a_count: what `a` is divided by: valid positions (expand) or examples (reduce).
        examples: what `b` is divided by.
    """

    a: list[Tensor]
    b: list[Tensor]
    a_count: Scalar
    examples: Scalar

    def averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B per example; not numbers where nothing counted."""
        return [m / self.a_count for m in self.a], [m / self.examples for m in self.b]

    def add(self, other: Statistics) -> None:
        self.a = [x + y for x, y in zip(self.a, other.a, strict=True)]
        self.b = [x + y for x, y in zip(self.b, other.b, strict=True)]
        self.a_count = self.a_count + other.a_count
        self.examples = self.examples + other.examples


@dataclasses.dataclass
class Call:
    """One call of a layer, until its output gradient has come back."""

    layout: MaskedLayout
    conv: ConvGeometry | None
    input: Tensor | None = None  # batch first; kept where output gradients decide which positions count
    nonzero: Tensor | None = None  # (N, R): positions that some backward pass reached
    drop: Tensor | None = None  # (N, R): positions whose weight gradient the operation leaves out (padding_idx)
    input_sums: Tensor | None = None  # reduce: (examples, groups, P_in)
    grad_sums: Tensor | None = None  # reduce: (examples, groups, P_out), of the current backward pass
    fired: bool = False  # its gradient came back in the current backward pass
    seen: bool = False  # or in any


class AnyRecorder(Protocol):
    """Gathers one layer's statistics over its calls in a capture, whatever the layer's kind."""

    @property
    def backward_done(self) -> bool:
        """Whether every call's output gradient has come back."""

    @property
    def examples(self) -> Scalar:
        """Examples of the closed groups."""

    def end_pass(self) -> None:
        """Close one backward pass."""

    def end_group(self) -> None:
        """Close the calls of one forward pass and its backward passes."""

    def statistics(self, factor: Scalar) -> Statistics:
        """The sums, output gradients squared multiplied by `factor`."""

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come."""


class Recorder:
    """Gathers one layer's statistics over its calls in a capture.

    Args:
        spec: the layer.
        dtype: of the factors.
        one_pass: whether a forward pass is followed by a single backward pass, and not by several for a sampled or
            exact Fisher; inputs kept for their mask are then let go as soon as the gradient has come.
    """

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool = True) -> None:
        self.spec = spec
        self.dtype = dtype
        self.one_pass = one_pass
        self.calls: list[Call] = []
        self.backward_done = False
        self.a: list[Tensor] | None = None
        self.b: list[Tensor] | None = None
        self.a_count: Scalar = 0.0
        self.examples: Scalar = 0.0
        self._reduced: list[Tensor] = []  # gradient sums of passes whose counts are not known yet

    def next_forward(self) -> None:
        """A forward pass after a backward pass begins a further micro-batch in the same capture."""
        if self.backward_done:
            self.end_group()

    def input(
        self, operation: Operation, conv: ConvGeometry | None, rows: Rows, positions: Positions | None
    ) -> Call:
        """Begin a call with its input."""
        layout = MaskedLayout.fitted(positions, rows, self.spec.name, self.dtype)
        call = Call(layout, conv)
        x = self._batch_first(operation.input.detach(), call)
        self._prepare(call, operation, x)
        if self.calls and layout.num_examples != self.calls[0].layout.num_examples:
            raise calls_disagree(self.spec.name, (self.calls[0].layout.num_examples, layout.num_examples))
        self.calls.append(call)
        if layout.by_gradient:
            call.input = x
        else:
            self._take(call, x)
        return call

    def _prepare(self, call: Call, operation: Operation, x: Tensor) -> None:
        """A place for what subclasses know of a call beforehand."""

    def _take(self, call: Call, x: Tensor) -> None:
        """Add a call's input to the sums, now that it is known which of its positions count."""
        if call.nonzero is not None:
            call.layout = dataclasses.replace(call.layout, mask=call.nonzero.to(self.dtype))
        call.input = call.nonzero = None
        if self.spec.approximation == "reduce":
            call.input_sums = self._input_sums(call, x)
        else:
            self._expand_inputs(call, x)
            count = len(x) * call.layout.positions
            mask = call.layout.mask
            self.a_count = self.a_count + (float(count) if mask is None else mask.sum())

    def _input_sums(self, call: Call, x: Tensor) -> Tensor:
        """(examples, groups, P_in): sums over each example's positions."""
        return factors.input_sums(x.to(self.dtype), self.spec.groups, call.conv, call.layout)

    def _expand_inputs(self, call: Call, x: Tensor) -> None:
        """Add the outer products of all positions' inputs to `a`."""
        for chunk, inputs in factors.input_chunks(x.to(self.dtype), self.spec.groups, call.conv):
            mask = None if call.layout.mask is None else call.layout.mask[chunk]
            rows = factors.expand_rows(inputs, mask)
            ones = None
            if self.spec.bias is not None:
                ones = rows.new_ones(len(rows)) if mask is None else mask.reshape(-1)
            self.a = _accumulate(self.a, self._input_products(rows, ones))

    def _input_products(self, rows: Tensor, ones: Tensor | None) -> list[Tensor]:
        return factors.outer_sums(rows, ones, self.spec.in_blocks)

    def _output_products(self, rows: Tensor) -> list[Tensor]:
        return factors.outer_sums(rows, None, self.spec.out_blocks)

    def output_gradient(self, call: Call, grad: Tensor) -> None:
        """End a call with the gradient of its output."""
        if call.fired:
            raise RuntimeError(
                f"layer {self.spec.name} received two gradients for one call: capture() takes one backward "
                "pass per forward pass"
            )
        call.fired = call.seen = True
        grad = self._batch_first(grad.to(self.dtype), call)
        rows = factors.output_rows(grad, self.spec.groups, call.conv)
        if call.drop is not None:
            rows = rows.masked_fill(call.drop[:, :, None, None], 0)
        if self.spec.approximation == "reduce":
            call.grad_sums = call.layout.sum_positions(rows)
        else:
            self.b = _accumulate(self.b, self._output_products(factors.expand_rows(rows, call.layout.mask)))
        if call.layout.by_gradient:
            # The sums above need no mask: what it leaves out is zero.
            nonzero = factors.nonzero_positions(rows)
            call.nonzero = nonzero if call.nonzero is None else call.nonzero | nonzero
            if self.one_pass and call.input is not None:
                self._take(call, call.input)
        if all(c.seen for c in self.calls):
            self.backward_done = True

    def end_pass(self) -> None:
        """Close one backward pass; several may follow one forward pass (sampled or exact Fisher).

        A call that this pass did not reach has a gradient of zero, as long as another pass reaches it.
        """
        fired = [call for call in self.calls if call.fired]
        if not fired:
            return
        if self.spec.approximation == "reduce":
            grads: Tensor | None = None
            for call in fired:
                assert call.grad_sums is not None
                grads = call.grad_sums if grads is None else grads + call.grad_sums
                call.grad_sums = None
            assert grads is not None
            if self.calls[0].layout.readout == "sum" and any(call.input is not None for call in self.calls):
                self._reduced.append(grads)
            else:
                self._reduce_outputs(grads)
        for call in fired:
            call.fired = False

    def _reduce_outputs(self, grads: Tensor) -> None:
        """Add the outer products of each example's gradient sums, or of its means, to `b`."""
        if self.calls[0].layout.readout == "sum":
            grads = grads / self._counts(grads).clamp(min=1)[:, None, None]
        self.b = _accumulate(self.b, self._output_products(grads))

    def end_group(self) -> None:
        """Close the calls of one forward pass and its backward passes."""
        self.end_pass()
        if not self.calls:
            return
        for call in self.calls:
            if call.input is not None:
                self._take(call, call.input)
        for grads in self._reduced:
            self._reduce_outputs(grads)
        self._reduced = []
        layout = self.calls[0].layout
        if self.spec.approximation == "reduce":
            sums: Tensor | None = None
            for call in self.calls:
                assert call.input_sums is not None
                sums = call.input_sums if sums is None else sums + call.input_sums
            assert sums is not None
            examples: Scalar
            if layout.ragged or layout.readout == "sum":
                counts = self._counts(sums)
                valid = (counts > 0).to(self.dtype)
                examples = valid.sum() if layout.ragged else float(layout.num_examples)
                ones = counts if layout.readout == "sum" else valid
                if layout.readout == "mean":
                    sums = sums / counts.clamp(min=1)[:, None, None]
            else:  # the same, without asking the device for what is known
                examples, ones = float(layout.num_examples), sums.new_ones(len(sums))
                sums = sums / sum(call.layout.positions for call in self.calls)
            homogeneous = ones if self.spec.bias is not None else None
            self.a = _accumulate(self.a, self._input_products(sums, homogeneous))
            self.a_count = self.a_count + examples
        elif layout.ragged:
            like = self.a[0] if self.a else torch.empty(0, dtype=self.dtype)
            examples = (self._counts(like) > 0).sum().to(self.dtype)
        else:
            examples = float(layout.num_examples)
        self.examples = self.examples + examples
        self.calls = []
        self.backward_done = False

    def statistics(self, factor: Scalar) -> Statistics:
        """The sums of a closed recorder; `factor` scales output gradients squared to the per-example loss."""
        assert self.a is not None
        assert self.b is not None
        return Statistics(self.a, [matrix * factor for matrix in self.b], self.a_count, self.examples)

    def _counts(self, like: Tensor) -> Tensor:
        """(examples,): positions that count, over all calls."""
        counts = [call.layout.counts(like) for call in self.calls]
        return torch.stack(counts).sum(0)

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come."""
        yield from (call.input for call in self.calls if call.input is not None)

    def _batch_first(self, t: Tensor, call: Call) -> Tensor:
        """The input or output of a call with its batch dimension first."""
        if call.conv is not None:
            return t if t.dim() == len(call.conv.kernel) + 2 else t.unsqueeze(0)
        return t.unsqueeze(0) if t.dim() == 1 else call.layout.batch_first(t)


def _accumulate(total: list[Tensor] | None, new: list[Tensor]) -> list[Tensor]:
    return new if total is None else [x.add_(y) for x, y in zip(total, new, strict=True)]
