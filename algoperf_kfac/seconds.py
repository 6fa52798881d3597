"""Seconds of what K-FAC adds to a step, from a plan's shapes and the measured speed of a device. Arithmetic alone.

Flops do not say them: a decomposition runs at a fraction of the speed of a product, and small matrices at a
fraction of that of large ones. A `Speed` holds measured times of square matrices. In between, logarithms are
interpolated along straight lines; beyond the largest size, times grow as its cube, and below the smallest they are
those of the smallest, where starting the operation is what counts.

A product of (m, k) by (k, n) takes the time of one of square matrices with as many flops; those of channel groups,
which are made in one call, that of one with the flops of all. Decompositions are made one after the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from algoperf_kfac.assignment import assign
from algoperf_kfac.cadence import cycle
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import ITEM_BYTES, LayerPlan, Plan, cubes, decomposition_flops, product_flops
from algoperf_kfac.layers import LayerSpec, split_blocks
from algoperf_kfac.pace import pace_of
from algoperf_kfac.subset import RowLimit


@dataclasses.dataclass(frozen=True)
class Speed:
    """Measured times of one device, in seconds; float32.

    Attributes:
        device: its name.
        products: of the product of two n x n matrices, by n.
        decompositions: of the eigendecomposition of one symmetric n x n matrix, by n.
        iterations: of one step of orthogonal iteration of one symmetric n x n matrix, by n.
        inverses: of the inverse of one positive definite n x n matrix by its Cholesky root, by n.
        bytes_per_second: that sums over the positions of a large array read.
    """

    device: str
    products: Mapping[int, float]
    decompositions: Mapping[int, float]
    iterations: Mapping[int, float]
    inverses: Mapping[int, float]
    bytes_per_second: float

    def __post_init__(self) -> None:
        for name in TABLES:
            table = getattr(self, name)
            if not table or not all(value > 0 for value in (*table, *table.values())):
                raise ValueError(f"a speed needs positive times of {name}, by positive size")
        if not self.bytes_per_second > 0:
            raise ValueError(f"bytes_per_second={self.bytes_per_second}: must be positive")

    def product(self, m: float, k: float, n: float) -> float:
        """Of a product of an (m, k) by a (k, n) matrix."""
        return interpolated(self.products, (m * k * n) ** (1 / 3)) if m and k and n else 0.0


TABLES = ("products", "decompositions", "iterations", "inverses")
"""The fields of a `Speed` that are measured by size."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What K-FAC adds to a step of one device, averaged over its intervals.

    Attributes:
        statistics: A and B.
        refresh: decompositions, on the device with the most work.
        preconditioning: the products of every step, on the device with the most of them.
    """

    statistics: float
    refresh: float
    preconditioning: float

    @property
    def total(self) -> float:
        return self.statistics + self.refresh + self.preconditioning


def interpolated(times: Mapping[int, float], size: float) -> float:
    """The time at a size, from those measured; see the head of this file."""
    sizes = sorted(times)
    if size <= sizes[0]:
        return times[sizes[0]]
    if size >= sizes[-1]:
        return times[sizes[-1]] * (size / sizes[-1]) ** 3
    upper = next(i for i, known in enumerate(sizes) if known >= size)
    low, high = sizes[upper - 1], sizes[upper]
    share = math.log(size / low) / math.log(high / low)
    return times[low] * (times[high] / times[low]) ** share


def seconds_of(plan: Plan, speed: Speed) -> Seconds:
    """What the plan's configuration adds to a step on a device of this speed."""
    config = plan.config
    refreshes = [_refresh(layer, speed, config) for layer in plan.layers]
    owners = assign([layer.refresh for layer in plan.layers], plan.devices)
    busiest = max((sum(_of(refreshes, owners, owner)) for owner in range(plan.devices)), default=0.0)
    products = [_preconditioning(layer, speed) for layer in plan.layers]
    return Seconds(
        sum(_statistics(layer, speed, config.row_limit) for layer in plan.layers) / config.factor_interval,
        busiest / config.refresh_interval,
        max(sum(products[i] for i in numbers) for numbers in plan.dealt),
    )


@dataclasses.dataclass(frozen=True)
class Paced:
    """What a `refresh_budget` makes of the refresh interval, by the seconds of a plan.

    Attributes:
        refresh: seconds of a refresh of all layers in their turns, each of the device with the most work.
        share: of the time, at the configured interval.
        interval: in force, in steps.
        share_then: of the time, at that.
    """

    refresh: float
    share: float
    interval: int
    share_then: float


def paced(plan: Plan, speed: Speed, step: float, budget: float) -> Paced:
    """The interval that `refresh_budget` comes to; see `pace.py`, which measures what is planned here.

    Args:
        plan: of a configuration on a model.
        speed: of its devices.
        step: seconds of a step without refreshes.
        budget: the share of the time that refreshes may take.
    """
    refresh, configured = refresh_in_turns(plan, speed), plan.config.refresh_interval
    interval = configured * -(-pace_of(refresh, step, budget) // configured)
    return Paced(
        refresh,
        refresh / (refresh + configured * step),
        interval,
        refresh / (refresh + interval * step),
    )


def refresh_in_turns(plan: Plan, speed: Speed) -> float:
    """Seconds of a refresh of all layers, one turn after the other, the work of each divided over the devices."""
    turns = cycle(plan.config)
    seconds = 0.0
    for turn in range(turns):
        layers = plan.layers[turn::turns]
        owners = assign([cubes(layer.spec) for layer in layers], plan.devices)
        times = [_refresh(layer, speed, plan.config) for layer in layers]
        seconds += max((sum(_of(times, owners, owner)) for owner in range(plan.devices)), default=0.0)
    return seconds


def with_blocks(plan: Plan, max_factor_dim: int) -> Plan:
    """The plan's layers with factors cut into smaller blocks: for their seconds; memory and flops stay behind."""

    def cut(blocks: Sequence[int]) -> tuple[int, ...]:
        return tuple(part for block in blocks for part in split_blocks(block, max_factor_dim, "block"))

    layers = []
    for layer in plan.layers:
        before, spec = layer.spec, layer.spec
        spec = dataclasses.replace(spec, in_blocks=cut(spec.in_blocks), out_blocks=cut(spec.out_blocks))
        share = cubes(spec) / cubes(before) if cubes(before) else 1.0
        layers.append(dataclasses.replace(layer, spec=spec, refresh=layer.refresh * share))
    return dataclasses.replace(plan, layers=tuple(layers))


def _of(values: Sequence[float], owners: Sequence[int], owner: int) -> list[float]:
    return [value for value, own in zip(values, owners, strict=True) if own == owner]


def _statistics(layer: LayerPlan, speed: Speed, limit: RowLimit) -> float:
    """Outer products of rows: of all positions (expand), or of sums over them, which are read first (reduce)."""
    spec, load = layer.spec, layer.load
    if load is None:
        return 0.0
    seconds = 0.0
    for reduces, blocks, elements in (
        (spec.reduces_inputs, spec.in_blocks, load.input_elements),
        (spec.reduces_outputs, spec.out_blocks, load.output_elements),
    ):
        share = load.share(limit.of(spec.block_sizes), spec, reduces=reduces)
        taken = share * load.examples * (1 if reduces else load.positions)
        seconds += sum(speed.product(size, spec.groups * taken, size) for size in blocks)
        if reduces:
            seconds += ITEM_BYTES * share * elements / speed.bytes_per_second
    return seconds


def _refresh(layer: LayerPlan, speed: Speed, config: KFACConfig) -> float:
    """Decompositions, and what the scaling makes of them, by its flops beyond the decomposition's own."""
    spec = layer.spec
    inverse = config.preconditioner == "inverse"
    bases = speed.iterations if config.decomposition == "qr" else speed.decompositions
    table, each = speed.inverses if inverse else bases, decomposition_flops(config, uses_bases=not inverse)
    decompositions = spec.groups * sum(interpolated(table, size) for size in spec.block_sizes)
    products = sum(speed.product(size, spec.groups * size, size) for size in spec.block_sizes)
    made_of_them = (layer.refresh - each * cubes(spec)) / (2 * cubes(spec)) if cubes(spec) else 0.0
    return decompositions + made_of_them * products


def _preconditioning(layer: LayerPlan, speed: Speed) -> float:
    """The products on either side, as often as the scaling has them."""
    spec = layer.spec
    once = _both_sides(spec, speed)
    return once * layer.preconditioning / product_flops(spec) if product_flops(spec) else 0.0


def _both_sides(spec: LayerSpec, speed: Speed) -> float:
    right = sum(speed.product(spec.out_dim, spec.groups * size, size) for size in spec.in_blocks)
    left = sum(speed.product(size, spec.groups * size, spec.factor_in_dim) for size in spec.out_blocks)
    return left + right
