"""Which approximation forms its statistics faster, and by how much. Arithmetic, on two measured constants.

The paper's orders (arXiv 2311.00636, section 3) with constants: products run at so many flops a second, and what
has to be gone through entry by entry at so many bytes. For N examples with R positions, a multiply-add counting
as 2, and factors of dimensions a and b:

    expand   2 N R (a^2 + b^2) flops; of a convolution the N R P_in entries of its patches and the output
             gradients are laid out as rows first
    reduce   2 N (a^2 + b^2) flops; inputs and output gradients are gone through for their sums over positions

A third constant, where it is measured, is for the patches: how fast they are laid out is the framework's affair.
`statistics_rows` leaves a share of the examples of either. What starting operations takes is in neither: of layers
whose statistics take less than a millisecond the model says nothing.
"""

from __future__ import annotations

import dataclasses
import math

from algoperf_kfac.cost import ITEM_BYTES, Load, Plan
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.seconds import Speed

# Entries laid out in another order are read and written with jumps: as often as so many sums go through them.
PATCHES, REORDERED = 6.0, 4.0


@dataclasses.dataclass(frozen=True)
class Rates:
    """The two constants, and the third.

    Attributes:
        flops_per_second: of large products.
        bytes_per_second: of a sum over positions.
        patch_bytes_per_second: of patches that are laid out; None for `bytes_per_second` by `PATCHES`.
    """

    flops_per_second: float
    bytes_per_second: float
    patch_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        if not all(value is None or 0 < value < math.inf for value in dataclasses.astuple(self)):
            raise ValueError(f"rates must be positive and finite, got {self}")

    @classmethod
    def of(cls, speed: Speed) -> Rates:
        """Those of a calibrated device: its best product, and its sum."""
        return cls(max(2 * size**3 / seconds for size, seconds in speed.products.items()), speed.bytes_per_second)

    def seconds(self, work: Work) -> float:
        """What some work takes."""
        patches = self.patch_bytes_per_second or self.bytes_per_second / PATCHES
        return work.flops / self.flops_per_second + work.bytes / self.bytes_per_second + work.patch_bytes / patches


@dataclasses.dataclass(frozen=True)
class Work:
    """What forming A and B of a layer comes to.

    Attributes:
        flops: of products.
        bytes: gone through entry by entry, what is reordered counted `REORDERED` times.
        patch_bytes: of the patches of a convolution.
    """

    flops: float
    bytes: float
    patch_bytes: float = 0.0


def work_of(spec: LayerSpec, load: Load, *, reduces: bool, rows: int | None = None) -> Work:
    """The work of one statistics step of a layer.

    Args:
        spec: the layer; its own approximation does not matter.
        load: what it sees.
        reduces: by reduce, or by expand.
        rows: from `KFACConfig.row_limit`.
    """
    share = load.share(rows, spec, reduces=reduces)
    entries = spec.groups * sum(size**2 for size in spec.block_sizes)
    is_conv = spec.kind.startswith("conv")
    if reduces:
        inputs = load.input_elements * (REORDERED if is_conv else 1)
        return Work(2 * share * load.examples * entries, ITEM_BYTES * share * (inputs + load.output_elements))
    all_rows = share * load.examples * load.positions
    flops = 2 * all_rows * entries
    if not is_conv:
        return Work(flops, 0.0)
    patches = ITEM_BYTES * all_rows * spec.groups * spec.in_dim
    return Work(flops, ITEM_BYTES * REORDERED * share * load.output_elements, patches)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Both approximations beside each other, in seconds per step.

    Attributes:
        expand: of A and B of all layers by K-FAC-expand.
        reduce: by K-FAC-reduce.
        best: with each layer in the faster of the two.
        reduced: number of layers of which reduce is the faster.
    """

    expand: float
    reduce: float
    best: float
    reduced: int

    @property
    def saved(self) -> float:
        """What reduce takes less than expand; negative where it takes more."""
        return self.expand - self.reduce


def compare(plan: Plan, rates: Rates, interval: int | None = None) -> Compared:
    """What statistics take by either approximation, averaged over their interval.

    Args:
        plan: of a configuration; a layer of which no load is known counts as nothing.
        rates: of the device.
        interval: steps from one statistics step to the next; default: the configuration's.

    Raises:
        ValueError: if the interval is not positive.
    """
    every = plan.config.factor_interval if interval is None else interval
    if every < 1:
        raise ValueError(f"interval must be at least 1, got {every}")
    pairs = []
    for layer in plan.layers:
        if layer.load is not None:
            rows = plan.config.row_limit.of(layer.spec.block_sizes)
            expand, reduce = (
                rates.seconds(work_of(layer.spec, layer.load, reduces=reduces, rows=rows))
                for reduces in (False, True)
            )
            pairs.append((expand, reduce))
    return Compared(
        sum(expand for expand, _ in pairs) / every,
        sum(reduce for _, reduce in pairs) / every,
        sum(map(min, pairs)) / every,
        sum(reduce < expand for expand, reduce in pairs),
    )
