"""Several calls of a layer in one compiled graph: what of each adds up, and the layer's sums of what was added up.

Graphs hand out gradients of zeros, to which each call adds. Outer products of means over an example's positions
cannot be added up over calls, as the positions of all of them count together; sums over its positions can. So these
are handed out, with the number of positions, and the outer products are formed outside of the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.pytorch.calls import Call, counts_of, sum_of
from algoperf_kfac.pytorch.factors import MaskedLayout
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.statistics import Scalar
from algoperf_kfac.subset import Subset


@dataclasses.dataclass(frozen=True)
class Joined(MaskedLayout):
    """The layout of several calls on the same examples, as that of one.

    Attributes:
        known: (N,), positions that count.
    """

    known: Tensor | None = None

    def counts(self, like: Tensor) -> Tensor:
        """(N,)"""
        assert self.known is not None
        return self.known


def shapes(recorder: Recorder, examples: int, limit: int | None) -> list[tuple[int, ...]]:
    """Of what `parts` gives of calls on so many examples; see `RowLimit` for `limit`."""
    spec, found = recorder.spec, []
    sides = zip(
        (spec.reduces_inputs, spec.reduces_outputs),
        (recorder.input_features, recorder.output_features),
        recorder.block_sizes,
        strict=True,
    )
    for reduces, features, blocks in sides:
        if reduces:
            found.append((_chosen(examples, limit).size, spec.groups, features))
        else:
            found += [(spec.groups, size, size) for size in blocks]
    return [*found, (examples,)]


def parts(recorder: Recorder, calls: list[Call]) -> tuple[list[Tensor], Scalar]:
    """Of all calls of a recorder, on the same examples, whose gradients have come: what adds up with other calls;
    rows that count in A.

    Returns:
        Of inputs, and then of output gradients, each example's sum over positions where the factor is formed of
        these, else blocks of outer products; and (N,), how many positions count.
    """
    a, b, count = recorder.products_so_far
    of_inputs = [sum_of(call.input_sums for call in calls)] if a is None else a
    of_outputs = [sum_of(call.grad_sums for call in calls)] if b is None else b
    return [*of_inputs, *of_outputs, counts_of(calls, of_inputs[0])], count


def takes_all(examples: int, limit: int | None) -> bool:
    """Whether factors are formed of the sums of all examples."""
    return _chosen(examples, limit).size == examples


def filled(tensors: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """What `parts` gives of fewer examples, with zeros for others, of the shapes of `like`."""
    return [
        F.pad(t, (*[0] * (2 * t.dim() - 1), len(whole) - len(t))) for t, whole in zip(tensors, like, strict=True)
    ]


def close(recorder: Recorder, added: Sequence[Tensor], count: Scalar, readout: str, limit: int | None) -> None:
    """Sum in a new recorder what several calls on the same examples came to.

    Args:
        recorder: saw nothing.
        added: tensors as `parts` gives them, added up.
        count: of the rows that count in A.
        readout: see `Positions`.
        limit: as in `shapes`.
    """
    *tensors, known = added
    spec = recorder.spec
    chosen = _chosen(len(known), limit)
    layout = Joined(len(known), 1, readout=readout, ragged=True, known=known)
    call = Call(layout, None, chosen, chosen, fired=True, seen=True)
    split = 1 if spec.reduces_inputs else len(recorder.block_sizes[0])
    a, b = tensors[:split], tensors[split:]
    if spec.reduces_inputs:
        call.input_sums = a[0]
    if spec.reduces_outputs:
        call.grad_sums = b[0]
    recorder.go_on(call, None if spec.reduces_inputs else a, None if spec.reduces_outputs else b, count)
    recorder.end_group()


def _chosen(examples: int, limit: int | None) -> Subset:
    """Of the rows that factors are formed of where sums over positions are."""
    return Subset.of(limit, examples, 1)
