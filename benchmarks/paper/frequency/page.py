"""The page: steps and time by interval, as the experiment measured them and as the cost model has them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Plan
from benchmarks.experiments import runs
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.notebook import EXPERIMENTS
from benchmarks.paper.frequency.costs import Costs, Work, work_of
from submissions.registry import describe

MARGIN = 1.1  # times the base's mean loss at the end: what all are to reach
EXPERIMENT = next(one for one in EXPERIMENTS if one.name == "frequency")

HEAD = """# How often statistics and refreshes

Open question 4 of arXiv 2311.00636. Written by `python -m benchmarks.paper frequency` from the runs of
`python -m benchmarks.experiments run frequency` ([the kept results](../results/experiments.jsonl), paired losses in
[experiments](../experiments.md)). K-FAC-expand in PyTorch, horizons of {horizon:g} of the step hint, seeds {seeds}.

Statistics at every n-th step (with refreshes at every 30th, or with the statistics where these are rarer), or
refreshes at every n-th step with statistics at every one. The averages remember 80 steps in all. *Taken* and
*refreshed* count what a run really does, the first steps included. Steps are to {margin:g} times the base's
mean loss at the end, along a straight line between evaluations ten steps apart: median (least to most) over
seeds, *missed* where it was not reached. Milliseconds are of the processor, medians over seeds, beside other
programs. *Model*: those of the base less what the model says the base adds, and what it says this one adds
(`crossover` with the constants of [complexity](complexity.md), `seconds` with [times of
matrices](../results/frequency_speed.json)). Seconds are steps times milliseconds, medians.
"""
READING = """## What to hold against it

The first steps take statistics whatever the interval, and this point refreshes at every statistics step until
the first refresh interval is over (`initial_refreshes="every"`). So *refresh 100* is no rare refresh: in a run
this short it refreshes nearly as often as *refresh 1*, and *refresh 30* more often than *refresh 10*. The
column *refreshed* is what to read. Truly rare refreshes with statistics at every step were not tried.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant on a workload.

    Attributes:
        work: what a run of it does.
        steps: to the common loss, by seed; infinite where it was missed.
        losses: at the end less the base's, by seed.
        ms: of a step, measured, by seed.
        model: ms of a step, by the model.
    """

    work: Work
    steps: tuple[float, ...]
    losses: tuple[float, ...]
    ms: tuple[float, ...]
    model: float

    @property
    def seconds(self) -> float:
        """To the common loss, measured."""
        return statistics.median(steps * ms for steps, ms in zip(self.steps, self.ms, strict=True)) / 1e3

    @property
    def model_seconds(self) -> float:
        """The same with the model's time of a step."""
        return statistics.median(self.steps) * self.model / 1e3


def page(
    kept: Mapping[str, dict[str, Any]], plan: Callable[[str, KFACConfig], Plan], costs: Callable[[Plan], Costs]
) -> str:
    """The whole page.

    Args:
        kept: of the experiments, by key.
        plan: of a configuration on a workload.
        costs: of a plan.
    """
    seeds = ", ".join(map(str, EXPERIMENT.seeds))
    lines = [HEAD.format(horizon=EXPERIMENT.horizon, seeds=seeds, margin=MARGIN)]
    for workload in EXPERIMENT.workloads:
        found = rows(EXPERIMENT, workload, kept, plan, costs)
        if found:
            lines += list(_section(workload, found))
    return "\n".join([*lines, READING])


def rows(
    one: Experiment,
    workload: str,
    kept: Mapping[str, dict[str, Any]],
    plan: Callable[[str, KFACConfig], Plan],
    costs: Callable[[Plan], Costs],
) -> dict[str, Row]:
    """By variant, the base first; only those of which all seeds are kept, and none without the base."""
    wanted = runs.runs_of(one)
    results = {
        name: [kept.get(runs.key(runs.identity(wanted[name, workload, seed]))) for seed in one.seeds]
        for name in one.all_variants()
    }
    whole = {name: [r for r in found if r is not None] for name, found in results.items() if all(found)}
    if "base" not in whole:
        return {}
    base, horizon = whole["base"], wanted["base", workload, one.seeds[0]].steps
    common = MARGIN * statistics.fmean(result["loss"] for result in base)
    first = plan(workload, _config(one.all_variants()["base"].point))
    cost, number = costs(first), len(first.layers)
    works = {name: work_of(_config(one.all_variants()[name].point), horizon, number) for name in whole}
    bare = statistics.median(result["ms_per_step"] for result in base) - cost.of(works["base"], horizon)
    return {
        name: Row(
            works[name],
            tuple(reached(result["curve"], common) for result in found),
            tuple(_loss(mine) - _loss(its) for mine, its in zip(found, base, strict=True)),
            tuple(result["ms_per_step"] for result in found),
            bare + cost.of(works[name], horizon),
        )
        for name, found in whole.items()
    }


def reached(curve: list[list[float | None]], wanted: float) -> float:
    """Steps until the loss is `wanted`, along a straight line; infinite if it never is.

    The first evaluation kept counts where it is as low: earlier ones are not kept.
    """
    before = None
    for step, loss in curve:
        assert step is not None
        if loss is not None and loss <= wanted:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - wanted) / (before[1] - loss)
        before = None if loss is None else (step, loss)
    return math.inf


def _config(point: Mapping[str, object]) -> KFACConfig:
    description = describe(EXPERIMENT.submission, EXPERIMENT.framework)
    _, config = description.configure({**description.defaults, **point})
    assert isinstance(config, KFACConfig)
    return config


def _loss(result: Mapping[str, Any]) -> float:
    return math.inf if result["loss"] is None else float(result["loss"])


def _section(workload: str, found: Mapping[str, Row]) -> Iterator[str]:
    yield f"## {workload}"
    yield ""
    yield (
        "| variant | taken | refreshed | steps | loss less the base's | ms a step | model | seconds | "
        "seconds by the model |"
    )
    yield "|---" * 9 + "|"
    for name, row in found.items():
        cells = [
            str(row.work.statistics),
            f"{row.work.refreshes:.0f}",
            _steps(row.steps),
            f"{statistics.fmean(row.losses):+.3f} ({min(row.losses):+.3f} to {max(row.losses):+.3f})",
            f"{statistics.median(row.ms):.0f}",
            f"{row.model:.0f}",
            _seconds(row.seconds),
            _seconds(row.model_seconds),
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for axis in ("statistics", "refresh"):
        of_axis = {name: row for name, row in found.items() if name.startswith(axis)}
        there = {name: row for name, row in of_axis.items() if math.isfinite(row.seconds)}
        if there:
            measured = min(there, key=lambda name: there[name].seconds)
            said = min(there, key=lambda name: there[name].model_seconds)
            yield (
                f"- Fewest seconds along *{axis}*: {measured} ({there[measured].seconds:.1f} s); by the model "
                f"{said} ({there[said].model_seconds:.1f} s; measured {there[said].seconds:.1f} s)."
            )
    off = [abs(row.model / statistics.median(row.ms) - 1) for name, row in found.items() if name != "base"]
    if off:
        yield (
            "- The model's milliseconds are off by "
            f"{100 * statistics.median(off):.0f} % (median), at most "
            f"{100 * max(off):.0f} %."
        )
    yield ""


def _steps(steps: tuple[float, ...]) -> str:
    middle = statistics.median(steps)
    if not math.isfinite(middle):
        return "missed"
    high = f"{max(steps):.0f}" if math.isfinite(max(steps)) else "missed"
    return f"{middle:.0f} ({min(steps):.0f} to {high})"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"
