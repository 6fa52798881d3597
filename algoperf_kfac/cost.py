"""What a K-FAC configuration costs on a model: state and peak memory, flops per step. Arithmetic, no framework.

A plan takes the coverage of a model and the load of each layer (how many examples and positions it sees in a step
on one device). The flops are those of the leading matrix products of one device (Eschenhagen et al. 2023, arXiv
2311.00636, section 3), a multiply-add counting as 2:

    model's step     6 N R P_in P_out per layer: forward pass, gradient of the input, gradient of the weight
    statistics       expand 2 N R (P_in^2 + P_out^2); reduce N R (P_in + P_out) + 2 N (P_in^2 + P_out^2), N the
                     examples that `statistics_rows` leaves
    refresh          9 n^3 per eigendecomposition, 6.7 n^3 per step of orthogonal iteration, either plus 2 n^3 for
                     the operator; n^3 per damped inverse
    preconditioning  2 P_out P_in (P_in + P_out) per layer, for scalings that are operators

9 n^3 is the symmetric QR algorithm with vectors, 6.7 n^3 two products (2 n^3 each) and Householder's QR with its Q
(8 n^3 / 3), n^3 Cholesky (n^3 / 3) and the inverse from its root (2 n^3 / 3) (Golub and Van Loan, Matrix
Computations, sections 8.3, 5.2 and 4.2). Flops are not seconds: on a GPU decompositions run
at a fraction of the speed of matrix products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from algoperf_kfac.assignment import largest_load
from algoperf_kfac.config import TABLE, KFACConfig
from algoperf_kfac.layers import Coverage, LayerSpec
from algoperf_kfac.subset import RowLimit, Subset

ITEM_BYTES = 4  # float32: parameters, moments and factors alike
EIGH_FLOPS = 9.0  # times n^3
FOLLOWING_FLOPS = 20 / 3
INVERSE_FLOPS = 1.0
OPERATOR_FLOPS = 2.0
# AlgoPerf's competition hardware from version 1.0 on: 4 GPUs of 40 GB.
DEVICES = 4
DEVICE_BYTES = 40e9
LOSS_COPIES = 3  # of the outputs, see `Memory.loss`


def decomposition_flops(config: KFACConfig, *, uses_bases: bool = True) -> float:
    """Of the refresh of a matrix, times n^3: what a configuration's decomposition takes, or an inverse."""
    if not uses_bases:
        return INVERSE_FLOPS
    return FOLLOWING_FLOPS if config.decomposition == "qr" else EIGH_FLOPS


@dataclasses.dataclass(frozen=True)
class Load:
    """What one layer sees in a training step on one device, all its calls together.

    Attributes:
        examples: N.
        positions: R, per example; an average where it varies.
        products: how often a step multiplies each entry of the weight in the forward pass: N R, but for transposed
            convolutions N times the input positions.
        input_elements: entries of the layer's inputs.
        output_elements: entries of its outputs.
        kernel: extent of a convolution's kernel in its first spatial dimension.
        in_segments: whether rows are put together to examples by segments, so that statistics take all of them.
    """

    examples: float
    positions: float
    products: float
    input_elements: float
    output_elements: float
    kernel: int = 1
    in_segments: bool = False

    def scaled(self, factor: float) -> Load:
        """The load of a batch `factor` times as large."""
        return Load(
            self.examples * factor,
            self.positions,
            self.products * factor,
            self.input_elements * factor,
            self.output_elements * factor,
            self.kernel,
            self.in_segments,
        )

    def of_examples(self, examples: float) -> Load:
        """The same rows, as positions of so many examples."""
        rows = self.examples * self.positions
        return dataclasses.replace(self, examples=examples, positions=rows / examples, in_segments=True)

    def share(self, rows: int | None, spec: LayerSpec, *, reduces: bool) -> float:
        """The share of the rows that a factor is formed of.

        Args:
            rows: from `KFACConfig.row_limit`; several calls are taken for one of all their positions.
            spec: of the layer; a tied table takes all positions of an example.
            reduces: whether the factor has one row per example, and not one per position.
        """
        limit, each = None if self.in_segments else rows, 1 if reduces else max(1, round(self.positions))
        thins = spec.kind != TABLE
        return 1 / Subset.of(limit, max(1, round(self.examples)), each, thins=thins).weight

    def __add__(self, other: Load) -> Load:
        """The load of two calls on the same examples."""
        return Load(
            self.examples,
            self.positions + other.positions,
            self.products + other.products,
            self.input_elements + other.input_elements,
            self.output_elements + other.output_elements,
            self.kernel,
            self.in_segments,
        )


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A model as it was seen through one training step, on one device.

    Attributes:
        coverage: what K-FAC covers of it.
        config: the configuration.
        loads: by weight parameter name.
        activation_bytes: what the model keeps for its backward pass.
        capture_bytes: what a statistics step keeps in addition.
        output_bytes: of the model's outputs.
        examples: of the step.
        note: how it was seen, if not with the real shapes, or not uncompiled; empty otherwise.
    """

    coverage: Coverage
    config: KFACConfig
    loads: Mapping[str, Load]
    activation_bytes: float
    capture_bytes: float
    output_bytes: float
    examples: int
    note: str = ""


class Scaling(Protocol):
    """What a plan asks a scaling of; the frameworks' `scalings` have it."""

    def num_bytes(self, spec: LayerSpec, itemsize: int) -> StateBytes:
        """What a layer keeps beside its factors, after its first refresh."""

    def flops(self, spec: LayerSpec) -> ScalingFlops:
        """What a layer's refresh and its direction at every step take."""

    def dealt(self, specs: Sequence[LayerSpec], workers: int) -> list[list[int]]:
        """The numbers of the layers whose directions each of some data-parallel devices makes at every step."""


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes that a layer keeps between steps beside its factors.

    Attributes:
        bases: eigenvectors and eigenvalues, or inverses.
        operators: what the momentum is multiplied by, and what else a scaling keeps.
        counts: weights of the averages, counters and what is monitored, in tensors.
    """

    bases: float
    operators: float
    counts: float


@dataclasses.dataclass(frozen=True)
class ScalingFlops:
    """Flops of one layer.

    Attributes:
        refresh: of one refresh.
        step: of the direction at every step.
    """

    refresh: float
    step: float


def cubes(spec: LayerSpec) -> int:
    """Work of one pass over a layer's factors of matrix products or decompositions: the block sizes cubed."""
    return spec.groups * sum(size**3 for size in spec.block_sizes)


def squares(spec: LayerSpec) -> int:
    """Entries of a layer's factors."""
    return spec.groups * sum(size**2 for size in spec.block_sizes)


def widths(spec: LayerSpec) -> int:
    """Eigenvalues of a layer's factors."""
    return spec.groups * sum(spec.block_sizes)


def product_flops(spec: LayerSpec) -> int:
    """Flops of multiplying a layer's gradient by a matrix on either side."""
    a, b = (sum(size**2 for size in blocks) for blocks in (spec.in_blocks, spec.out_blocks))
    return 2 * spec.groups * (spec.out_dim * a + spec.factor_in_dim * b)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One covered layer and its flops, on one device.

    Attributes:
        spec: the layer.
        load: what it sees, None if nothing is known; its statistics and model flops count as zero then.
        model: flops of its forward and backward pass, per step.
        statistics: flops of one statistics step.
        refresh: flops of one refresh.
        preconditioning: flops of every step.
    """

    spec: LayerSpec
    load: Load | None
    model: float
    statistics: float
    refresh: float
    preconditioning: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; state is replicated on each (data parallel).

    Attributes:
        parameters: the model's.
        gradients: of the parameters, and their copies (the buckets of DistributedDataParallel).
        moments: first and second moment of NadamW.
        factors: moving averages of A and B, and a few scalars.
        bases: eigenvectors and eigenvalues, or inverses, where the framework keeps them.
        operators: what the momentum is multiplied by (eigenvectors with scaled eigenvalues), or what a scaling
            keeps in their place.
        accumulators: sums of outer products of the statistics step at hand.
        activations: what the model keeps for its backward pass; an estimate.
        loss: the model's outputs, what the loss keeps of them for its backward pass (log-probabilities or the
            like, as large as the outputs), and their gradient, which is there before the first activation is freed.
        capture: what a statistics step holds beside the activations: inputs and sums over positions until the
            gradients are there (reduce), or the sums of outer products, which then grow within the passes (expand).
        refresh: temporary matrices of the largest refresh, that of all layers at once.
        update: temporary directions of the update.
        averaging: flat copy of the accumulators for the all-reduce; 0 on one device.
    """

    parameters: float
    gradients: float
    moments: float
    factors: float
    bases: float
    operators: float
    accumulators: float
    activations: float
    loss: float
    capture: float
    refresh: float
    update: float
    averaging: float

    @property
    def kfac_state(self) -> float:
        """What K-FAC keeps between steps beside NadamW's moments."""
        return self.factors + self.bases + self.operators

    @property
    def state(self) -> float:
        """What the optimizer keeps between steps: the tensors of its state_dict, without the random generator."""
        return self.moments + self.kfac_state

    @property
    def peak(self) -> float:
        """State, parameters and gradients, and the largest of the phases of a step, which follow one another."""
        phases = (
            self.activations + self.loss + self.capture,
            self.accumulators + self.averaging,
            self.refresh,
            self.update,
        )
        return self.parameters + self.gradients + self.state + max(phases)

    @property
    def first_order_peak(self) -> float:
        """The peak of NadamW alone, on the same model and batch.

        It has two moments of every parameter, and its update holds direction and momentum of every parameter.
        """
        step = max(self.activations + self.loss, 2 * self.parameters)
        return self.parameters + self.gradients + 2 * self.parameters + step


@dataclasses.dataclass(frozen=True)
class Flops:
    """Flops per step of one device as shares of the model's own forward and backward pass, averaged over intervals.

    Attributes:
        model: flops of the model's weighted operations per step, the unit of the others; attention products and
            element-wise operations are not in it, so the shares are upper bounds.
        statistics: A and B, every `factor_interval` steps.
        refresh: decompositions every `refresh_interval` steps, of the device with the most work: the layers are
            divided over the devices, the most expensive first, each to the device with the least work.
        preconditioning: every step, of the device that makes the directions that cost the most: they are divided
            over the devices, too, where the scaling allows it.
    """

    model: float
    statistics: float
    refresh: float
    preconditioning: float

    @property
    def total(self) -> float:
        """What K-FAC adds to the model's own flops, as a share of them."""
        return self.statistics + self.refresh + self.preconditioning


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a configuration on a model.

    Attributes:
        coverage: covered layers and fallbacks.
        layers: the covered layers with their loads and flops.
        config: the configuration.
        devices: data-parallel processes.
        memory: bytes per device.
        flops: per step.
        measured_activations: whether the activation memory is a sum over arrays kept for the backward pass, or
            estimated from the inputs and outputs of the layers.
        dealt: by device, the numbers of the layers whose directions it makes.
    """

    coverage: Coverage
    layers: tuple[LayerPlan, ...]
    config: KFACConfig
    devices: int
    memory: Memory
    flops: Flops
    measured_activations: bool
    dealt: tuple[tuple[int, ...], ...]

    def fits(self, device_bytes: float = DEVICE_BYTES) -> bool:
        """Whether the peak stays below the memory of a device."""
        return self.memory.peak <= device_bytes


def make_plan(
    coverage: Coverage,
    loads: Mapping[str, Load],
    config: KFACConfig,
    scaling: Scaling,
    *,
    devices: int = 1,
    activation_bytes: float | None = None,
    capture_bytes: float = 0.0,
    output_bytes: float = 0.0,
    gradient_copies: int = 1,
    moments_of_covered: int = 2,
    counts: int = 0,
) -> Plan:
    """The plan of a configuration on a model.

    Args:
        coverage: covered layers and fallbacks, as `KFAC.coverage()` gives them.
        loads: by `LayerSpec.load_name`, and by name of other parameters; these count for the model's flops
            and the activations. A layer that is missing is taken as idle.
        config: the configuration.
        scaling: the framework's, for this configuration.
        devices: data-parallel processes; loads are those of one of them.
        activation_bytes: what the model keeps for its backward pass; estimated as the layers' inputs and outputs
            if None.
        capture_bytes: what a statistics step keeps of them in addition; sums come on top.
        output_bytes: of the model's outputs.
        gradient_copies: how often the gradients are held: 2 with DistributedDataParallel and its buckets.
        moments_of_covered: NadamW moments that are kept of a covered parameter: 1 where nothing needs the second.
        counts: scalars that the optimizer keeps beside those of the layers.

    Raises:
        ValueError: if `devices` is not positive.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    limit = config.row_limit
    layers = tuple(_layer_plan(spec, loads.get(spec.load_name), scaling, limit) for spec in coverage.layers)
    dealt = tuple(tuple(numbers) for numbers in scaling.dealt(coverage.layers, devices))
    shapes = {f.name: f.shape for f in coverage.fallbacks}
    others = sum(
        6 * load.products * math.prod(shapes[name])
        for name, load in loads.items()
        if load.products and name in shapes
    )
    if activation_bytes is None:
        elements = sum(load.input_elements + load.output_elements for load in loads.values())
    total, covered = coverage.num_parameters, coverage.num_covered
    memory = Memory(
        parameters=float(ITEM_BYTES * total),
        moments=float(ITEM_BYTES * (2 * (total - covered) + moments_of_covered * covered)),
        **_state_bytes(coverage, scaling, counts),
        **_temporary_bytes(coverage, devices, gradient_copies, sends=len(set(dealt)) > 1),
        activations=ITEM_BYTES * elements if activation_bytes is None else activation_bytes,
        loss=LOSS_COPIES * output_bytes,
        capture=capture_bytes + ITEM_BYTES * sum(_captured_elements(layer, limit) for layer in layers),
    )
    model = sum(layer.model for layer in layers) + others
    share = 1 / model if model else 0.0
    flops = Flops(
        model=model,
        statistics=share * sum(layer.statistics for layer in layers) / config.factor_interval,
        refresh=share * largest_load([layer.refresh for layer in layers], devices) / config.refresh_interval,
        preconditioning=share * max(sum(layers[i].preconditioning for i in numbers) for numbers in dealt),
    )
    return Plan(coverage, layers, config, devices, memory, flops, activation_bytes is not None, dealt)


def _layer_plan(spec: LayerSpec, load: Load | None, scaling: Scaling, limit: RowLimit) -> LayerPlan:
    own = scaling.flops(spec)
    model = statistics = 0.0
    if load is not None:
        model = 6 * load.products * spec.groups * spec.out_dim * spec.in_dim
        a, b = (spec.groups * sum(size**2 for size in blocks) for blocks in (spec.in_blocks, spec.out_blocks))
        # Convolutions sum the input by a small matrix product for each spatial dimension; the first dominates.
        each = 2 * load.kernel if spec.kind.startswith("conv") else 1
        of_input, of_output = load.input_elements * each, load.output_elements
        for reduces, entries, summed in (
            (spec.reduces_inputs, a, of_input),
            (spec.reduces_outputs, b, of_output * (1 + spec.watches_sums)),
        ):
            share = load.share(limit.of(spec.block_sizes), spec, reduces=reduces)
            products = 2 * load.examples * (1 if reduces else load.positions) * entries
            statistics += share * (products + (summed if reduces else 0))
    return LayerPlan(spec, load, model, statistics, own.refresh, own.step)


def _captured_elements(layer: LayerPlan, limit: RowLimit) -> float:
    """Entries of the sums that a statistics step of a layer holds together with the activations.

    Reduce sums inputs and output gradients over each example's positions, and makes outer products of them once the
    backward pass is over and the activations are gone.
    """
    spec, load = layer.spec, layer.load
    held = 0.0
    for reduces, blocks, dim in (
        (spec.reduces_inputs, spec.in_blocks, spec.in_dim),
        (spec.reduces_outputs, spec.out_blocks, spec.out_dim),
    ):
        if not reduces:
            held += spec.groups * sum(size**2 for size in blocks)
        elif load is not None:
            held += load.share(limit.of(spec.block_sizes), spec, reduces=True) * load.examples * spec.groups * dim
    return held


def _state_bytes(coverage: Coverage, scaling: Scaling, counts: int) -> dict[str, float]:
    """K-FAC's state after the first refresh."""
    kept = [scaling.num_bytes(spec, ITEM_BYTES) for spec in coverage.layers]
    matrices = ITEM_BYTES * sum(squares(spec) for spec in coverage.layers)
    return {
        "factors": matrices + sum(k.counts for k in kept) + float(ITEM_BYTES * counts),
        "bases": sum(k.bases for k in kept) + 0.0,
        "operators": sum(k.operators for k in kept) + 0.0,
    }


def _temporary_bytes(coverage: Coverage, devices: int, gradient_copies: int, *, sends: bool) -> dict[str, float]:
    """Gradients, and what lives only within a step.

    A refresh of all layers, as in the first steps, holds the new bases of all; of the layers a device takes, the
    corrected and the damped factors; of its largest stack of matrices of equal shape the copy, the masked copy and
    the workspace of the decomposition; and with several devices the bases a second time, as they are sent. An
    update holds direction and momentum of every parameter, and both as matrices for covered layers; where devices
    send each other directions, these once more.
    """
    total = coverage.num_parameters
    sizes = [squares(spec) for spec in coverage.layers]
    matrices, mine = sum(sizes), largest_load(sizes, devices)
    stacks: dict[int, int] = {}
    for spec in coverage.layers:
        for size in spec.block_sizes:
            stacks[size] = stacks.get(size, 0) + spec.groups * size * size
    stack = min(max(stacks.values(), default=0), mine)
    elements = {
        "gradients": total * gradient_copies,
        "accumulators": matrices,
        "averaging": 0 if devices == 1 else matrices,
        "refresh": (1 if devices == 1 else 2) * matrices + 2 * mine + 3 * stack,
        "update": 2 * total + (3 if sends else 2) * coverage.num_covered,
    }
    return {name: float(ITEM_BYTES * count) for name, count in elements.items()}
