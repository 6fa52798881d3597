"""One layer's statistics: sums over the groups of calls in a capture, over captures, and what checks them."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from algoperf_kfac.layers import LayerSpec

Scalar = Tensor | float


@dataclasses.dataclass
class Statistics:
    """What one or more captures gathered for one layer, as sums.

    Attributes:
        a: sums of input outer products, a (groups, b, b) matrix per block of A.
        b: sums of output-gradient outer products of the per-example loss, per block of B.
        a_count: what `a` is divided by: valid positions (expand) or examples (reduce).
        examples: what `b` is divided by.
        rounding: the coarsest eps among the dtypes that inputs and output gradients came in.
        vanished: share of the output features whose sums of gradients vanish, times `examples`.
    """

    a: list[Tensor]
    b: list[Tensor]
    a_count: Scalar
    examples: Scalar
    rounding: float = 0.0
    vanished: Scalar = 0.0

    @classmethod
    def zeros(cls, spec: LayerSpec, like: Tensor) -> Statistics:
        """Those of a layer that saw nothing, to be added to others'."""

        def blocks(sizes: tuple[int, ...]) -> list[Tensor]:
            return [like.new_zeros(spec.groups, size, size) for size in sizes]

        return cls(blocks(spec.in_blocks), blocks(spec.out_blocks), 0.0, 0.0)

    def averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B per example; not numbers where nothing counted."""
        return [m / self.a_count for m in self.a], [m / self.examples for m in self.b]

    def add(self, other: Statistics) -> None:
        self.a = [x + y for x, y in zip(self.a, other.a, strict=True)]
        self.b = [x + y for x, y in zip(self.b, other.b, strict=True)]
        self.a_count = self.a_count + other.a_count
        self.examples = self.examples + other.examples
        self.vanished = self.vanished + other.vanished
        self.rounding = max(self.rounding, other.rounding)


@dataclasses.dataclass
class Product:
    """What the captured inputs and output gradients say of the weight's gradient.

    Attributes:
        matrix: sum of g a^T over rows, (groups, P_out, P_in).
        bound: sum over calls of the norms of both, which rounding is relative to, ().
        eps: the coarsest rounding unit among the dtypes they came in.
    """

    matrix: Tensor
    bound: Tensor
    eps: float

    def __add__(self, other: Product) -> Product:
        return Product(self.matrix + other.matrix, self.bound + other.bound, max(self.eps, other.eps))


class LayerSums:
    """A layer's sums over groups of calls: those of one forward pass and its backward passes.

    Attributes:
        a: sums of input outer products, a (groups, b, b) matrix per block of A; None without a group.
        b: sums of output-gradient outer products as they came, per block of B.
        a_count: what `a` is divided by: valid positions (expand) or examples (reduce).
        examples: those that count, what `b` is divided by.
        rows: examples, whether or not any of their positions counts.
        vanished: see `Statistics.vanished`.
    """

    def __init__(self) -> None:
        self.a: list[Tensor] | None = None
        self.b: list[Tensor] | None = None
        self.a_count: Scalar = 0.0
        self.examples: Scalar = 0.0
        self.rows = 0
        self.vanished: Scalar = 0.0
        # Where several groups have losses of their own, see `statistics`.
        self._first: Scalar | None = None
        self._own: list[Tensor] | None = None

    def add(
        self,
        a: list[Tensor],
        b: list[Tensor],
        a_count: Scalar,
        examples: Scalar,
        vanished: Scalar,
        rows: int,
        own: Scalar | None = None,
    ) -> None:
        """Add a group's sums.

        Args:
            a, b, a_count, examples, vanished, rows: see the attributes; the first groups' matrices are written to.
            own: what a loss of the group's own asks `b` to be multiplied by, None if unknown.
        """
        self.examples = self.examples + examples
        self.rows += rows
        self.vanished = self.vanished + vanished
        if self.a is None or self.b is None:
            self.a, self.b, self.a_count, self._first = a, b, a_count, own
            return
        if self._first is not None and own is not None:
            earlier = self._own or [m * self._first for m in self.b]
            self._own = [x + y * own for x, y in zip(earlier, b, strict=True)]
        else:
            self._own = self._first = None
        self.a, self.b = accumulate(self.a, a), accumulate(self.b, b)
        self.a_count = self.a_count + a_count

    def statistics(self, factor: Scalar, rounding: float, *, by_loss: bool = False) -> Statistics:
        """The sums of what was added, at least one group.

        Args:
            factor: scales squares of output gradients to the per-example loss.
            rounding: see `Statistics.rounding`.
            by_loss: where several groups have losses of their own, scale each by what its loss was divided by, as
                far as that could be seen.
        """
        assert self.a is not None
        assert self.b is not None
        b = self._own if by_loss and self._own is not None else [matrix * factor for matrix in self.b]
        return Statistics(self.a, b, self.a_count, self.examples, rounding, self.vanished)


def accumulate(total: list[Tensor] | None, new: list[Tensor]) -> list[Tensor]:
    """The sums, written into the first ones."""
    return new if total is None else [x.add_(y) for x, y in zip(total, new, strict=True)]
