"""What intervals cost by the model: statistics by `crossover`, refreshes by `seconds`, counted by `cadence`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch

from algoperf_kfac import cadence, crossover
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Plan
from algoperf_kfac.crossover import Rates
from algoperf_kfac.seconds import TABLES, Speed, seconds_of
from benchmarks.paper.complexity import layers, model, records
from commands import atomic
from commands.errors import UserError
from submissions.cli import calibration, pytorch_probe, pytorch_subjects
from workloads.studies import facts

SIZES = (64, 128, 256, 512)  # of matrices; the factors of these workloads are no larger
SUMMED, REPEATS = 2**22, 5


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does, whatever the machine.

    Attributes:
        statistics: steps that take statistics.
        refreshes: of a layer, the mean over layers.
    """

    statistics: int
    refreshes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """CPU seconds by the model.

    Attributes:
        statistics: of a statistics step.
        refresh: of a refresh of all layers.
    """

    statistics: float
    refresh: float

    def of(self, work: Work, steps: int) -> float:
        """What they add to a step, in ms, averaged over a run."""
        return 1e3 * (work.statistics * self.statistics + work.refreshes * self.refresh) / steps


def work_of(config: KFACConfig, steps: int, number: int) -> Work:
    """Counts a run's statistics steps, and the refreshes of so many layers.

    Args:
        config: the configuration.
        steps: of the run.
        number: of layers.
    """
    taken = [step for step in range(steps) if cadence.is_statistics_step(config, step)]
    refreshes = [0] * number
    for step in taken:
        for layer in range(number):
            refreshes[layer] += cadence.is_due(config, step, layer, refreshes[layer])
    return Work(len(taken), sum(refreshes) / number)


def costs_of(plan: Plan, rates: Rates, speed: Speed) -> Costs:
    """Of a plan, whatever its intervals."""
    compared, config = crossover.compare(plan, rates, interval=1), plan.config
    statistics = compared.reduce if config.approximation == "reduce" else compared.expand
    return Costs(statistics, config.refresh_interval * seconds_of(plan, speed).refresh)


def plan_of(workload: str, config: KFACConfig) -> Plan:
    """The plan of a configuration on a workload."""
    subject = pytorch_subjects.embedded(workload, facts.task(workload).batch_size)
    return pytorch_probe.plan_of(pytorch_probe.sight(subject, config), devices=1)


def rates(folder: Path) -> Rates:
    """The constants of `crossover`, of what is kept of `complexity`."""
    results = records.read(folder / "complexity.jsonl")
    found = model.fit("pytorch", results, layers.layers_of(layers.GRID))
    return model.with_patches("pytorch", results, found) or found


def speed(path: Path) -> Speed:
    """The kept times of matrices; measured, in CPU time, where there are none.

    Raises:
        UserError: the file cannot be read.
    """
    if not path.is_file():
        atomic.write_text(path, json.dumps(dataclasses.asdict(_measured()), indent=1) + "\n")
    try:
        found = json.loads(path.read_text())
        tables = {name: {int(size): float(value) for size, value in found[name].items()} for name in TABLES}
        return Speed(found["device"], **tables, bytes_per_second=float(found["bytes_per_second"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and it is measured again") from None


def _measured() -> Speed:
    torch.set_num_threads(1)  # as in the runs; and the seconds of several threads would count several times
    here = calibration.device("pytorch")
    times: dict[str, dict[int, float]] = {name: {} for name in TABLES}
    for size in SIZES:
        for name, operation in here.operations(size).items():
            times[name][size] = _least(operation)
    return Speed(here.name(), **times, bytes_per_second=4 * SUMMED / _least(here.sum_of(SUMMED)))


def _least(operation: calibration.Operation) -> float:
    operation()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(REPEATS):
            operation()
        seconds.append((time.process_time() - start) / REPEATS)
    return max(min(seconds), 1e-9)
