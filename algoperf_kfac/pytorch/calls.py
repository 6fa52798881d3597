"""One call of a layer, from its input to its output gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import Tensor

from algoperf_kfac.pytorch.factors import MaskedLayout
from algoperf_kfac.pytorch.geometry import ConvGeometry
from algoperf_kfac.pytorch.loss_parts import Place
from algoperf_kfac.pytorch.statistics import Scalar
from algoperf_kfac.subset import Subset


@dataclasses.dataclass
class Call:
    """One call of a layer, until its output gradient has come back."""

    layout: MaskedLayout
    conv: ConvGeometry | None
    inputs: Subset  # the rows that A is formed of
    outputs: Subset  # and B
    input: Tensor | None = None  # of their examples, batch first, as long as output gradients decide what counts
    nonzero: Tensor | None = None  # (N, R): positions that some backward pass reached
    drop: Tensor | None = None  # (N, R): positions whose weight gradient the operation leaves out (padding_idx)
    input_sums: Tensor | None = None  # reduce: (examples, groups, P_in)
    products: list[Tensor] | None = None  # expand: outer products of the inputs, until they are merged with others'
    count: Scalar = 0.0  # expand: positions that count in them
    grad_sums: Tensor | None = None  # reduce: (examples, groups, P_out), of the current backward pass
    grad_squares: Tensor | None = None  # where vanishing sums are watched: (examples, groups, blocks of B)
    checked: Tensor | None = None  # the input, kept for `Recorder.product`
    fired: bool = False  # its gradient came back in the current backward pass
    seen: bool = False  # or in any
    aside: bool = False  # a gradient with respect to inputs alone went through it
    apart: bool = False  # and it was left out, until a gradient for parameters comes
    place: Place | None = None  # in the graph, unless a part of it was run again or compiled
    part: int = 0  # of a batch that was taken in parts: which one it sees

    @property
    def waits(self) -> bool:
        """Whether what A takes of it is kept apart, where that is more than sums over positions."""
        return self.input is not None or self.products is not None

    @property
    def bytes(self) -> int:
        """Of what is kept apart."""
        return sum(t.nbytes for t in (self.input, *(self.products or ())) if t is not None)

    @property
    def input_layout(self) -> MaskedLayout:
        """Of the rows that A is formed of."""
        return self.layout.part(self.inputs)

    @property
    def output_layout(self) -> MaskedLayout:
        """Of the rows that B is formed of."""
        return self.layout.part(self.outputs)

    def batch_first(self, t: Tensor) -> Tensor:
        """The input or output of the call with its batch dimension first."""
        if self.conv is not None:
            return t if t.dim() == len(self.conv.kernel) + 2 else t.unsqueeze(0)
        return t.unsqueeze(0) if t.dim() == 1 else self.layout.batch_first(t)


Examples = tuple[int, int]  # which calls see the same: the part of the batch, and how many


def by_examples(calls: list[Call]) -> dict[Examples, list[Call]]:
    """Calls by the examples they see."""
    sets: dict[Examples, list[Call]] = {}
    for call in calls:
        sets.setdefault((call.part, call.layout.num_examples), []).append(call)
    return sets


def counts_of(calls: list[Call], like: Tensor) -> Tensor:
    """(examples,): positions that count, over all calls."""
    return sum_of(call.layout.counts(like) for call in calls)


def sum_of(tensors: Iterable[Tensor | None]) -> Tensor:
    """Of what all calls have, at least one."""
    total: Tensor | None = None
    for t in tensors:
        assert t is not None
        total = t if total is None else total + t
    assert total is not None
    return total
