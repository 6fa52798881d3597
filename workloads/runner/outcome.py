"""How a trial ended, as its `outcome.json` has it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict


class Outcome(TypedDict):
    """The end of a trial.

    Attributes:
        reason: what ended it: "target", "time budget", "step limit" or "submission".
        metric: the name of the target metric.
        steps_to_target, time_to_target: of the first evaluation that met the target; seconds.
        best_metric, final_metric: over all evaluations, and at the last; None without one.
        first_step_time: seconds; it compiles, in JAX and under --torch_compile, and counts as any other.
        settings: the values of `workloads.runner.loop.SETTINGS`.
    """

    reason: str
    metric: str
    target: float
    steps_to_target: int | None
    time_to_target: float | None
    best_metric: float | None
    final_metric: float | None
    global_step: int
    accumulated_submission_time: float
    first_step_time: float | None
    ms_per_step: float
    accumulated_eval_time: float
    preemption_count: int
    rng_seed: int
    settings: dict[str, object]


def settings_of(outcome: Outcome) -> dict[str, object]:
    """The settings of a trial; one of before there was a choice of clocks has that on the wall."""
    return {"clock": "wall", **outcome["settings"]}


def describe(outcome: Outcome) -> str:
    """An outcome in words."""
    metric, target = outcome["metric"], outcome["target"]
    if outcome["steps_to_target"] is not None:
        head = f"target {metric} {target} reached at step {outcome['steps_to_target']}"
        head += f" after {outcome['time_to_target']:.1f} s of training"
    else:
        head = f"target {metric} {target} not reached in {outcome['global_step']} steps"
    best = "none" if outcome["best_metric"] is None else f"{outcome['best_metric']:.4f}"
    return f"{head}; best {best}, {outcome['ms_per_step']:.1f} ms per step (ended by: {outcome['reason']})"


def describe_several(outcomes: Sequence[Outcome]) -> str:
    """Several outcomes of one workload in words."""
    steps = [outcome["steps_to_target"] for outcome in outcomes if outcome["steps_to_target"] is not None]
    metric, target = outcomes[0]["metric"], outcomes[0]["target"]
    fewest = f", the first at step {min(steps)}" if steps else ""
    pace = statistics.median(outcome["ms_per_step"] for outcome in outcomes)
    return f"{len(steps)} of {len(outcomes)} trials reached {metric} {target}{fewest}; {pace:.1f} ms per step"
