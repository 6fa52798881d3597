"""What K-FAC would add to a step of the published models: arithmetic on plans and an assumed device, not measured.

Data parallel as the library is: every GPU has the whole model and all factors; statistics are of its own part of
the batch, refreshes and directions are divided over the GPUs. What is sent between them is not counted.
"""

from __future__ import annotations

import dataclasses

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Plan
from algoperf_kfac.polar import polar_flops
from algoperf_kfac.pytorch.probe import plan_of
from algoperf_kfac.seconds import paced, seconds_of
from benchmarks.paper.size.shapes import Shape, whole
from submissions import registry
from submissions.cli.assumed import A100_FLOPS, REACHED_FLOPS, a100

TOKENS = 16_384  # of a step on one GPU
BUDGET = 0.1  # share of the time that refreshes may take
FORMS = {"expand": "kfac_expand", "part": "kfac_expand", "reduce": "kfac_reduce"}  # of the statistics; submissions


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one form of K-FAC, per GPU. Shares are of the flops of a model's step.

    Attributes:
        statistics: of a statistics step, share.
        refresh: of a refresh of all layers, share.
        directions: of every step, of all layers, share.
        polar: of the polar factors in these, share.
        dealt: of the directions that the GPU with the most work forms, share.
        factor_interval: steps between statistics steps.
        seconds: of the model's step, of a statistics step, of a refresh of all layers, of a step's directions; of
            the last two on the GPU with the most work.
        all_directions: seconds of those of all layers.
        interval: between refreshes, such that these take no more than `BUDGET` of the time.
    """

    statistics: float
    refresh: float
    directions: float
    polar: float
    dealt: float
    factor_interval: int
    seconds: tuple[float, float, float, float]
    all_directions: float
    interval: int

    @property
    def step(self) -> float:
        """Seconds of a step over those of the model's own, with refreshes at `interval`."""
        return self._with(self.seconds[3])

    @property
    def step_alone(self) -> float:
        """The same if each GPU formed all directions (`share_directions=False`)."""
        return self._with(self.all_directions)

    def _with(self, directions: float) -> float:
        model, statistics, refresh, _ = self.seconds
        return 1 + (statistics / self.factor_interval + refresh / self.interval + directions) / model


@dataclasses.dataclass(frozen=True)
class Sized:
    """A published model, planned.

    Attributes:
        parameters: as counted.
        gpus: so many that each has `TOKENS` of a step.
        layers: that K-FAC covers.
        split: of them, those with a factor in blocks.
        blocks: the dimensions of the largest factor's blocks.
        model: flops of a step on one GPU.
        moments: bytes, of NadamW.
        factors: bytes.
        bases: bytes.
        costs: by form.
    """

    shape: Shape
    parameters: int
    gpus: int
    layers: int
    split: int
    blocks: tuple[int, ...]
    model: float
    moments: float
    factors: float
    bases: float
    costs: dict[str, Cost]

    @property
    def sequences(self) -> int:
        """Of a step, on all GPUs: the rows that a statistics step of reduce has."""
        return round(self.shape.batch_tokens / self.shape.context)


def config_of(form: str) -> KFACConfig:
    """The submission's own point; expand from all rows, or from a part of them as it is shipped."""
    config = registry.kfac_config(FORMS[form], "pytorch")
    return dataclasses.replace(config, statistics_rows=None) if form == "expand" else config


def sized(shape: Shape) -> Sized:
    """A published model, planned with each form."""
    gpus = round(shape.batch_tokens / TOKENS)
    expand, reduce = (
        whole(shape, config_of(form), sequences=TOKENS // shape.context) for form in ("expand", "reduce")
    )
    # Which rows are taken shows in no layer.
    part = dataclasses.replace(expand, config=config_of("part"))
    sightings = dict(zip(FORMS, (expand, part, reduce), strict=True))
    plans = {form: plan_of(sighting, devices=gpus) for form, sighting in sightings.items()}
    first = plans["expand"]
    split = [layer for layer in first.layers if max(map(len, (layer.spec.in_blocks, layer.spec.out_blocks))) > 1]
    largest = max(
        (blocks for layer in first.layers for blocks in (layer.spec.in_blocks, layer.spec.out_blocks)), key=sum
    )
    return Sized(
        shape,
        first.coverage.num_parameters,
        gpus,
        len(first.layers),
        len(split),
        largest,
        first.flops.model,
        2 * first.memory.parameters,
        first.memory.factors,
        first.memory.bases + first.memory.operators,
        {form: _cost(plan) for form, plan in plans.items()},
    )


def _cost(plan: Plan) -> Cost:
    speed, config, flops = a100(), plan.config, plan.flops
    model = flops.model / (REACHED_FLOPS * A100_FLOPS)
    seconds = seconds_of(plan, speed)
    statistics = seconds.statistics * config.factor_interval
    other = model + seconds.statistics + seconds.preconditioning
    found = paced(plan, speed, other, BUDGET)
    everything = dataclasses.replace(plan, dealt=(tuple(range(len(plan.layers))),))
    return Cost(
        flops.statistics * config.factor_interval,
        flops.refresh * config.refresh_interval,
        sum(layer.preconditioning for layer in plan.layers) / flops.model,
        sum(polar_flops(layer.spec, config.polar_steps) for layer in plan.layers) / flops.model,
        flops.preconditioning,
        config.factor_interval,
        (model, statistics, found.refresh, seconds.preconditioning),
        seconds_of(everything, speed).preconditioning,
        found.interval,
    )
