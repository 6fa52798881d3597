"""Gathers one layer's statistics over its calls in a capture, and sums them as they come.

An input is summed when the layer is called and then let go. Where output gradients decide which positions count, it
is kept until they come back: as long as autograd keeps it, with several backward passes until the last of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from algoperf_kfac.layers import OUTPUT_GRADIENTS, LayerSpec, gradients_of_calls
from algoperf_kfac.positions import Positions, Rows
from algoperf_kfac.pytorch import factors
from algoperf_kfac.pytorch.calls import Call, Examples, by_examples, counts_of, sum_of
from algoperf_kfac.pytorch.factors import MaskedLayout
from algoperf_kfac.pytorch.geometry import ConvGeometry
from algoperf_kfac.pytorch.loss_parts import Slices
from algoperf_kfac.pytorch.operations import Operation
from algoperf_kfac.pytorch.statistics import LayerSums, Product, Scalar, Statistics, accumulate
from algoperf_kfac.pytorch.vanishing import example_squares, without_vanishing
from algoperf_kfac.subset import Subset

# Calls whose outputs nobody uses count in no factor; which these are shows in the backward pass. Until then inputs
# are kept apart, or their outer products where these are smaller: no more than autograd keeps of a layer, unless it
# forgets activations. So from so many calls on there is a bound, as much as they take with 4096 features.
MAX_WAITING = 4
WAITING_BYTES = MAX_WAITING * 4096**2 * 4


class Recorder:
    """Gathers one layer's statistics over its calls in a capture.

    Sums over a part of the rows (`Subset`) are scaled to stand for those over all; examples are counted.
    Calls of one forward pass on equally many examples see the same examples, and their positions count together,
    unless they are known to see parts of a batch. Other numbers of examples are other examples.

    Args:
        spec: the layer.
        dtype: of the factors.
        one_pass: whether a forward pass is followed by a single backward pass, and not by several for a sampled or
            exact Fisher; inputs kept for their mask are then let go as soon as the gradient has come.
        checks: whether to form `product`.

    Attributes:
        loss_gradient: the gradient that the mean of a loss function got in the backward pass at hand, None if
            there is none; see `note_loss`.
        sums: of the closed groups of calls.
        rounding: the coarsest eps among the dtypes of inputs and output gradients.
        thins: whether some of an example's positions may be taken where positions are rows.
    """

    thins = True

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, *, one_pass: bool = True, checks: bool = False) -> None:
        self.spec = spec
        self.dtype = dtype
        self.one_pass = one_pass
        self.checks = checks
        self.calls: list[Call] = []
        self.product: Product | None = None
        self.loss_gradient: Tensor | None = None
        self.rounding = 0.0
        self.sums = LayerSums()
        # Calls whose gradient is to come, and that keep what A takes: by identity, with its bytes, oldest first.
        # Layers may be called thousands of times in a pass, so nothing that a call does goes through all of them.
        self._waiting: dict[int, tuple[Call, int]] = {}
        self._waiting_bytes = 0
        self._any_seen = False
        # Of the group at hand.
        self._a: list[Tensor] | None = None
        self._b: list[Tensor] | None = None
        self._a_count: Scalar = 0.0
        self._squares: Tensor | None = None  # (groups, blocks of B), where vanishing sums are watched
        # Gradient sums (and squares) of passes whose counts are not known yet.
        self._reduced: list[tuple[Examples, Tensor, Tensor | None]] = []

    @property
    def uses(self) -> tuple[Recorder, ...]:
        return (self,)

    @property
    def block_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the blocks of A, and of B, as this recorder sums them."""
        return self.spec.in_blocks, self.spec.out_blocks

    @property
    def input_features(self) -> int:
        """Of a row that A is formed of, without the bias."""
        return self.spec.in_dim

    @property
    def output_features(self) -> int:
        """Of a row that B is formed of."""
        return self.spec.out_dim

    @property
    def products_so_far(self) -> tuple[list[Tensor] | None, list[Tensor] | None, Scalar]:
        """Of the group at hand: the outer products of A, and of B, and how many rows count in A."""
        return self._a, self._b, self._a_count

    def go_on(self, call: Call, a: list[Tensor] | None, b: list[Tensor] | None, a_count: Scalar) -> None:
        """Take a call that has come back, with `products_so_far`, for the group at hand."""
        self._a, self._b, self._a_count = a, b, a_count
        self._hold([call])

    def note_loss(self, gradient: Tensor | None) -> None:
        self.loss_gradient = gradient

    @property
    def examples(self) -> Scalar:
        return self.sums.examples

    @property
    def rows(self) -> int:
        return self.sums.rows

    @property
    def seen(self) -> int:
        """Calls whose gradients came back; of closed groups that there were any."""
        return bool(self.sums.rows) + sum(call.seen for call in self.calls)

    @property
    def is_complete(self) -> bool:
        return not self.missed

    @property
    def missed(self) -> str:
        if not self.rows and not any(call.seen for call in self.calls):
            return OUTPUT_GRADIENTS
        lost = sum(not call.seen and not self._kept_apart(call) for call in self.calls)
        return gradients_of_calls(lost, len(self.calls)) if lost else ""

    @property
    def has_seen(self) -> bool:
        """Whether a backward pass reached the calls at hand: what follows is a further micro-batch's."""
        return self._any_seen

    def take_parts(self, parts: Slices) -> bool:
        """Take the calls at hand for those on the parts of a batch, one or several on each; whether they are."""
        calls = [call for call in self.calls if call.seen]
        numbers = parts.numbers([call.place for call in calls])
        if numbers is None or not self.one_pass:  # else gradients are summed as they come
            return False
        for number, call in zip(numbers, calls, strict=True):
            layout = call.layout
            if layout.segment_ids is not None or not parts.fits(number, layout.num_examples, layout.positions):
                return False
        for number, call in zip(numbers, calls, strict=True):
            call.part = number
        return True

    def input(
        self,
        operation: Operation,
        conv: ConvGeometry | None,
        rows: Rows,
        positions: Positions | None,
        limit: int | None = None,
    ) -> Call:
        """Begin a call with its input.

        Args:
            operation: the call.
            conv: where it reads, None for linear operations.
            rows: of the call.
            positions: which of them count.
            limit: from `RowLimit`.
        """
        layout = MaskedLayout.fitted(positions, rows, self.spec.name, self.dtype)
        call = Call(
            layout,
            conv,
            layout.subset(limit, reduces=self.spec.reduces_inputs, thins=self.thins),
            layout.subset(limit, reduces=self.spec.reduces_outputs, thins=self.thins),
        )
        x = call.batch_first(operation.input.detach())
        self._note_rounding(x)
        self._prepare(call, operation, x)
        self.calls.append(call)
        if self.checks:
            call.checked = x
        x = x[call.inputs.slice]
        if layout.by_gradient:
            call.input = x
        elif self.spec.reduces_inputs:
            self._take(call, x)
        else:
            self._keep_apart(call, x)
        return call

    def _keep_apart(self, call: Call, x: Tensor) -> None:
        """Keep what A takes of a call until its gradient comes; the oldest ones go into the sums without, where too
        many wait."""
        number = len(self._waiting)
        numbers = self.spec.groups * sum(size**2 for size in self.block_sizes[0])
        if number >= MAX_WAITING and x.nbytes < numbers * self.dtype.itemsize:
            call.input = x.clone()  # autograd may keep a copy of its own, and the model write to this one
        else:
            self._take(call, x)
        self._wait(call)
        if number >= MAX_WAITING and self._waiting_bytes > WAITING_BYTES:
            oldest = next(iter(self._waiting.values()))[0]
            self._end_wait(oldest)
            if oldest.input is not None:
                self._take(oldest, oldest.input)
            self._merge(oldest)

    def _wait(self, call: Call) -> None:
        self._waiting[id(call)] = call, call.bytes
        self._waiting_bytes += call.bytes

    def _end_wait(self, call: Call) -> None:
        _, kept = self._waiting.pop(id(call), (call, 0))
        self._waiting_bytes -= kept

    def _hold(self, calls: list[Call]) -> None:
        """Have these calls and no others."""
        self.calls, self._any_seen = calls, any(call.seen for call in calls)
        self._waiting, self._waiting_bytes = {}, 0
        for call in calls:
            if not call.seen and call.waits:
                self._wait(call)

    def _note_rounding(self, x: Tensor) -> None:
        if x.is_floating_point():
            self.rounding = max(self.rounding, torch.finfo(x.dtype).eps)

    def _prepare(self, call: Call, operation: Operation, x: Tensor) -> None:
        """A place for what subclasses know of a call beforehand."""

    def _take(self, call: Call, x: Tensor) -> None:
        """Add a call's input to the sums, now that it is known which of its positions count."""
        if call.nonzero is not None and not _is_seen_to_hold(call.nonzero):
            call.layout = dataclasses.replace(call.layout, mask=call.nonzero.to(self.dtype))
        call.input = call.nonzero = None
        if self.spec.reduces_inputs:
            call.input_sums = self._input_sums(call, x)
            return
        call.products = _weighted(self._expand_inputs(call, x), call.inputs)
        count = call.inputs.weight * len(x) * call.input_layout.positions
        mask = call.input_layout.mask
        call.count = count if mask is None else call.inputs.weight * mask.sum()

    def _merge(self, call: Call) -> None:
        """Add a call's outer products of inputs to those of the group."""
        if call.products is not None:
            self._a = accumulate(self._a, call.products)
            self._a_count = self._a_count + call.count
            call.products = None

    def _input_sums(self, call: Call, x: Tensor) -> Tensor:
        """(examples, groups, P_in): sums over each example's positions."""
        return factors.input_sums(x.to(self.dtype), self.spec.groups, call.conv, call.input_layout)

    def _expand_inputs(self, call: Call, x: Tensor) -> list[Tensor]:
        """The outer products of all positions' inputs."""
        total: list[Tensor] | None = None
        of_all = call.input_layout.mask
        thinning = call.inputs.thinning
        for chunk, inputs in factors.input_chunks(x.to(self.dtype), self.spec.groups, call.conv, thinning):
            mask = None if of_all is None else of_all[chunk]
            rows = factors.expand_rows(inputs, mask)
            ones = None
            if self.spec.bias is not None:
                ones = rows.new_ones(len(rows)) if mask is None else mask.reshape(-1)
            total = accumulate(total, self._input_products(rows, ones))
        assert total is not None
        return total

    def _input_products(self, rows: Tensor, ones: Tensor | None) -> list[Tensor]:
        return factors.outer_sums(rows, ones, self.spec.in_blocks)

    def _output_products(self, rows: Tensor) -> list[Tensor]:
        return factors.outer_sums(rows, None, self.spec.out_blocks)

    def output_gradient(self, call: Call, grad: Tensor) -> None:
        """End a call with the gradient of its output.

        Raises:
            RuntimeError: if it was ended before.
        """
        if call.fired:
            raise RuntimeError(
                f"layer {self.spec.name} received two gradients for one call: capture() takes one backward pass "
                "for each forward pass. Sum the losses of one forward pass before backward(), and leave gradients "
                "of gradients (penalties, create_graph=True) outside of capture()"
            )
        self._take_back(call)
        call.fired = call.seen = self._any_seen = True
        self._end_wait(call)
        self._note_rounding(grad)
        grad = call.batch_first(grad.to(self.dtype))
        rows = factors.output_rows(grad, self.spec.groups, call.conv)
        if call.drop is not None:
            rows = rows.masked_fill(call.drop[:, :, None, None], 0)
        if call.checked is not None:
            product = self._product(call, call.checked, grad, self.rounding)
            self.product = product if self.product is None else self.product + product
            call.checked = None
        chosen, layout = rows[call.outputs.slice, call.outputs.of_rows], call.output_layout
        if self.spec.reduces_outputs:
            call.grad_sums = layout.sum_positions(chosen)
            if self.spec.watches_sums:
                call.grad_squares = example_squares(chosen, self.spec.out_blocks, layout)
        else:
            products = self._output_products(factors.expand_rows(chosen, layout.mask))
            self._b = accumulate(self._b, _weighted(products, call.outputs))
        if call.layout.by_gradient:
            # The sums above need no mask: what it leaves out is zero.
            nonzero = factors.nonzero_positions(rows)
            call.nonzero = nonzero if call.nonzero is None else call.nonzero | nonzero
        if call.input is not None and (self.one_pass or not call.layout.by_gradient):
            self._take(call, call.input)
        if call.input is None:
            self._merge(call)

    def _product(self, call: Call, x: Tensor, grad: Tensor, eps: float) -> Product:
        """G^T A of one call from its input and its output gradient, batch first."""
        x = x.to(self.dtype)
        bound = x.norm() * grad.norm()
        if call.conv is not None:
            matrix = call.conv.weight_gradient(x, grad, self.spec.groups)
            return Product(matrix, bound * math.prod(call.conv.kernel) ** 0.5, eps)
        matrix = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return Product(matrix.unsqueeze(0), bound, eps)

    def set_aside(self) -> None:
        """Leave out the calls that a gradient with respect to inputs alone went through, and no other yet.

        Raises:
            RuntimeError: if the sums hold the inputs of such a call, beside those of others.
        """
        aside = [call for call in self.calls if call.aside and not call.seen]
        if not aside:
            return
        if len(aside) == len(self.calls):
            self._a, self._b, self._a_count, self._squares, self._reduced = None, None, 0.0, None, []
        elif not all(map(self._kept_apart, aside)):
            raise self._two_ways()
        for call in aside:
            call.apart = True
        self._hold([call for call in self.calls if not call.apart])

    def _take_back(self, call: Call) -> None:
        """A gradient for parameters comes to a call that had been left out: one forward pass for both.

        Raises:
            RuntimeError: if the call's input had been summed, and forgotten.
        """
        if not call.apart:
            return
        if not self._kept_apart(call):
            raise self._two_ways()
        call.apart = call.aside = False
        self.calls.append(call)

    def _kept_apart(self, call: Call) -> bool:
        """Whether a call's input is not in sums with others."""
        return self.spec.reduces_inputs or call.input is not None or call.products is not None

    def _two_ways(self) -> RuntimeError:
        return RuntimeError(
            f"layer {self.spec.name}: a gradient with respect to inputs alone went through some of its calls "
            "and not through others of the same forward pass: take it outside of capture()"
        )

    def forget_seen(self) -> None:
        """Forget what gradients came back for, as they were cleared.

        Raises:
            RuntimeError: if the sums hold inputs of calls whose gradients are yet to come.
        """
        waiting = [call for call in self.calls if not call.seen]
        if not all(map(self._kept_apart, waiting)):
            raise RuntimeError(
                f"layer {self.spec.name}: gradients were cleared inside capture(), between the backward passes of "
                "one forward pass: open a capture for each pass"
            )
        self._hold(waiting)
        self.sums, self.product = LayerSums(), None
        self._a, self._b, self._a_count, self._squares, self._reduced = None, None, 0.0, None, []

    def end_pass(self) -> None:
        """Close one backward pass; several may follow one forward pass (sampled or exact Fisher).

        A call that this pass did not reach has a gradient of zero, as long as another pass reaches it.
        """
        fired = [call for call in self.calls if call.fired]
        if self.spec.reduces_outputs:
            for examples, calls in by_examples(fired).items():
                grads = sum_of(call.grad_sums for call in calls)
                squares = sum_of(call.grad_squares for call in calls) if self.spec.watches_sums else None
                for call in calls:
                    call.grad_sums = call.grad_squares = None
                of_sum = calls[0].layout.readout == "sum"
                if of_sum and any(call.input is not None or not call.seen for call in self.calls):
                    self._reduced.append((examples, grads, squares))
                else:
                    self._reduce_outputs(examples, grads, squares)
        for call in fired:
            call.fired = False

    def _reduce_outputs(self, examples: Examples, grads: Tensor, squares: Tensor | None) -> None:
        """Add the outer products of each example's gradient sums, or of its means, to those of the group."""
        calls = by_examples(self.calls)[examples]
        part = calls[0].outputs
        if calls[0].layout.readout == "sum":
            counts = counts_of(calls, grads)[part.slice].clamp(min=1)[:, None, None]
            grads, squares = grads / counts, None if squares is None else squares / counts**2
        self._b = accumulate(self._b, _weighted(self._output_products(grads), part))
        if squares is not None:
            total = part.weight * squares.sum(0)
            self._squares = total if self._squares is None else self._squares + total

    def end_group(self) -> None:
        """Close the calls of one forward pass and its backward passes."""
        self.end_pass()
        # A forward pass whose outputs were detached (pseudo-labels) has no part in the loss, as far as can be seen.
        waiting = [call for call in self.calls if not call.seen]
        self.calls = [call for call in self.calls if call.seen]
        if not self.calls:
            self._hold(waiting)
            return
        for call in self.calls:
            if call.input is not None:
                self._take(call, call.input)
            self._merge(call)
        for reduced in self._reduced:
            self._reduce_outputs(*reduced)
        seen: Scalar = 0.0
        for calls in by_examples(self.calls).values():
            seen = seen + self._end_calls(calls)
        self._close(seen, sum(number for _, number in by_examples(self.calls)))
        self._hold(waiting)
        self._reduced = []

    def _end_calls(self, calls: list[Call]) -> Scalar:
        """Close calls on the same examples; the number of these that count."""
        layout, part = calls[0].layout, calls[0].inputs
        examples: Scalar = float(layout.num_examples)
        if not self.spec.reduces_inputs:
            if layout.ragged:
                blocks = self._a or self._b  # one has none, where the identity stands for it
                assert blocks
                examples = (counts_of(calls, blocks[0]) > 0).sum().to(self.dtype)
            return examples
        sums = sum_of(call.input_sums for call in calls)
        chosen: Scalar = examples
        if layout.ragged or layout.readout == "sum":
            counts = counts_of(calls, sums)
            valid = (counts > 0).to(self.dtype)
            examples = valid.sum() if layout.ragged else examples
            counts, valid = counts[part.slice], valid[part.slice]
            chosen = part.weight * valid.sum() if layout.ragged else examples
            ones = counts if layout.readout == "sum" else valid
            if layout.readout == "mean":
                sums = sums / counts.clamp(min=1)[:, None, None]
        else:  # the same, without asking the device for what is known
            ones = sums.new_ones(len(sums))
            sums = sums / sum(call.layout.positions for call in calls)
        homogeneous = ones if self.spec.bias is not None else None
        self._a = accumulate(self._a, _weighted(self._input_products(sums, homogeneous), part))
        self._a_count = self._a_count + chosen
        return examples

    def _close(self, examples: Scalar, rows: int) -> None:
        """Add the group's sums to those of the capture."""
        assert self._a is not None
        assert self._b is not None
        vanished: Scalar = 0.0
        if self._squares is not None:
            self._b, share = without_vanishing(self._b, self._squares, self.rounding)
            vanished = share * examples
        # What a loss of the group's own, a mean over its examples, asks for.
        own = None if self.loss_gradient is None else (examples / self.loss_gradient) ** 2
        self.sums.add(self._a, self._b, self._a_count, examples, vanished, rows, own)
        self._a, self._b, self._a_count, self._squares = None, None, 0.0, None

    def statistics(self, factor: Scalar, *, by_loss: bool = False) -> Statistics:
        """The sums of a closed recorder; see `LayerSums.statistics`."""
        return self.sums.statistics(factor, self.rounding, by_loss=by_loss)

    def kept_inputs(self) -> Iterator[Tensor]:
        """Inputs that are kept until their gradients come."""
        yield from (call.input for call in self.calls if call.input is not None)


def _is_seen_to_hold(condition: Tensor) -> bool:
    """Whether it holds everywhere, where looking is for free: not on an accelerator, nor in a graph."""
    return type(condition) is Tensor and condition.device.type == "cpu" and bool(condition.all())


def _weighted(sums: list[Tensor], part: Subset) -> list[Tensor]:
    """Sums over the chosen rows as those over all."""
    return sums if part.every == part.thinning == 1 else [m.mul_(part.weight) for m in sums]
