"""An embedding table that is the output layer too: one K-FAC direction from all uses of one weight.

The table W (V x d) takes part in the loss twice. As output layer s = W x, its inputs are on the d-side and its
output gradients on the V-side; as lookup y = W^T e, with e the one-hot token, it is the other way round. With the
factors of each use as in `factors`, uses taken as independent, the curvature of vec(W), V-side first, is

    B_out (x) A_out  +  F (x) B_emb,

F the factor of the one-hot inputs (expand: the diagonal of token frequencies, of trace 1). No single Kronecker
product equals this sum, and V is too large for a matrix of its own. The vocabulary side is taken as the identity,
and among all I (x) X the one closest to the sum in the Frobenius norm is its partial trace over the vocabulary,

    X = ( tr(B_out) A_out + tr(F) B_emb ) / V,

because || M - I (x) X ||^2 is a separate least-squares problem in each entry of X, over the V entries of M that it
stands for (Van Loan and Pitsianis 1993, with one factor held at the identity). Only traces are needed of what has V
rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch import factors
from algoperf_kfac.pytorch.operations import Operation
from algoperf_kfac.pytorch.statistics import Call, Recorder, Scalar, Statistics

# Operations whose output may be the transposed table; who reads that decides what it was for.
TRANSPOSES = frozenset({"T", "H", "mT", "mH", "t", "adjoint", "transpose", "swapaxes", "swapdims", "permute"})
PRODUCTS = frozenset({"matmul", "mm"})


def table_behind(value: object, tables: Mapping[int, LayerSpec]) -> tuple[Tensor | None, bool]:
    """The table that a tensor is, or is a view of; and whether it is exactly its transpose.

    Args:
        value: any argument of an operation.
        tables: layers by the identity of their weight.
    """
    if not isinstance(value, Tensor):
        return None, False
    if id(value) in tables:
        return value, False
    base = value._base if value._is_view() else None
    if base is None or id(base) not in tables:
        return None, False
    same = value.storage_offset() == base.storage_offset() and value.is_conj() == base.is_conj()
    return base, same and value.shape == base.shape[::-1] and value.stride() == base.stride()[::-1]


class OutputUse(Recorder):
    """The table as output layer: A_out in blocks, of B_out the trace alone."""

    def _output_products(self, rows: Tensor) -> list[Tensor]:
        return [rows.square().sum().reshape(1, 1, 1)]


class Lookups(Recorder):
    """The table as lookup: of the one-hot inputs the trace alone, B_emb in blocks."""

    def _prepare(self, call: Call, operation: Operation, x: Tensor) -> None:
        padding = operation.hyper["padding_idx"]
        if padding is None:
            return
        # The backward pass leaves these rows of the gradient out.
        call.drop = x.reshape(len(x), -1) == (padding if padding >= 0 else self.spec.out_dim + padding)
        if not call.layout.by_gradient:
            keep = (~call.drop).to(self.dtype)
            mask = keep if call.layout.mask is None else keep * call.layout.mask
            call.layout = dataclasses.replace(call.layout, mask=mask)

    def _input_sums(self, call: Call, x: Tensor) -> Tensor:
        """(examples, 1, V): how often each token occurs in each example."""
        layout, vocabulary = call.layout, self.spec.out_dim
        ids = x.reshape(len(x), -1).long()
        example = torch.arange(len(x), device=x.device) if layout.segment_ids is None else layout.segment_ids
        counts = torch.zeros(layout.num_examples * vocabulary, dtype=self.dtype, device=x.device)
        weights = torch.ones_like(ids, dtype=self.dtype) if layout.mask is None else layout.mask
        places = example.unsqueeze(1) * vocabulary + ids
        return counts.scatter_add_(0, places.flatten(), weights.flatten()).reshape(-1, 1, vocabulary)

    def _expand_inputs(self, call: Call, x: Tensor) -> None:
        count = torch.full((), float(x[..., 0].numel()), dtype=self.dtype, device=x.device)
        count = count if call.layout.mask is None else call.layout.mask.sum()
        self.a = [count.reshape(1, 1, 1) + (self.a[0] if self.a else 0)]

    def _input_products(self, rows: Tensor, ones: Tensor | None) -> list[Tensor]:
        return [rows.square().sum().reshape(1, 1, 1)]

    def _output_products(self, rows: Tensor) -> list[Tensor]:
        return factors.outer_sums(rows, None, self.spec.in_blocks)


class TiedRecorder:
    """Gathers the statistics of a tied table; the interface of `Recorder` as far as `Capture` needs it."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, one_pass: bool = True) -> None:
        self.spec = spec
        self.output = OutputUse(spec, dtype, one_pass)
        self.lookups = Lookups(spec, dtype, one_pass)
        self.is_output = False  # the table was read as output layer

    @property
    def backward_done(self) -> bool:
        return self.output.backward_done and (self.lookups.backward_done or not self.lookups.calls)

    @property
    def examples(self) -> Scalar:
        return self.output.examples

    def end_pass(self) -> None:
        self.output.end_pass()
        self.lookups.end_pass()

    def end_group(self) -> None:
        self.output.end_group()
        self.lookups.end_group()

    def statistics(self, factor: Scalar) -> Statistics:
        """A_out as `a`; tr(B_out), tr(F) and the blocks of B_emb as `b`, all to be divided by their counts."""
        out = self.output.statistics(factor)
        trace, ones = out.b[0], torch.ones_like(out.b[0])
        if self.lookups.a is None:
            share, blocks = 0 * ones, [m.new_zeros(m.shape) for m in out.a]
        else:
            emb = self.lookups.statistics(factor)
            # A count of zero comes with a sum of zero.
            share, blocks = emb.a[0] / torch.as_tensor(emb.a_count).clamp(min=1), emb.b
        return Statistics(out.a, [trace, share * out.examples, *blocks], out.a_count, out.examples)
