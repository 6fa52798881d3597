"""Times of a race at the pace that its submissions have alone on the machine.

A race runs for hours, several trials at a time, beside whatever else the machine does. A step takes as long as it
takes alone, which the suite's stage `pace` measures at the best point of each submission, one trial at a time.

A machine that is shared is faster in one minute than in another. Evaluations are the same work for every
submission, and stand between the steps: so steps are measured in evaluations, those at both ends of an interval,
and told in seconds by the one length that an evaluation has on the workload, in the median over submissions.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

import scoring
from workloads.runner import experiment

Place = tuple[str, str, str]  # submission, workload, framework


@dataclass(frozen=True)
class Pace:
    """What a submission's steps take on a workload.

    Attributes:
        first: seconds of the first step, which compiles in JAX.
        later: seconds of each that follows, the mean up to the target.
    """

    first: float
    later: float

    def seconds(self, steps: np.ndarray) -> np.ndarray:
        """The time of so many steps."""
        return self.first + self.later * (steps - 1)


@dataclass(frozen=True)
class Evaluations:
    """How fast the machine was while a pace was measured.

    Attributes:
        during: seconds of an evaluation, the harmonic mean over the seconds of training between them.
        median: over all but the first one, which may compile or load.
    """

    during: float
    median: float


def read(directory: Path, *, one_speed: bool = True) -> dict[Place, Pace]:
    """The paces measured in a suite's directory, at one speed of the machine; empty without the stage.

    Where the evaluations of a submission do not tell that speed, those of its workload are as they were measured.
    """
    found, speeds = {}, {}
    for path in sorted(directory.glob("pace/*/*/*/trial_*/outcome.json")):
        outcome = experiment.outcome(path.parent)
        if outcome is None or outcome["global_step"] < 2 or outcome["first_step_time"] is None:
            continue
        first = outcome["first_step_time"]
        later = (outcome["accumulated_submission_time"] - first) / (outcome["global_step"] - 1)
        workload, _, framework = path.parents[1].name.rpartition("_")
        place = path.parents[3].name, workload, framework
        found[place] = Pace(first, later)
        speeds[place] = evaluations(pd.read_csv(path.with_name("eval_measurements.csv")))
    return {place: _at_one_speed(place, pace, speeds) for place, pace in found.items()} if one_speed else found


def evaluations(table: pd.DataFrame) -> Evaluations | None:
    """From a trial's evaluations, in the order of its steps; None if they are too few or took no time."""
    if "accumulated_eval_time" not in table:
        return None
    trained, taken = (
        np.diff(table[name].to_numpy(dtype=float))
        for name in ("accumulated_submission_time", "accumulated_eval_time")
    )
    if not len(taken) or taken.min() <= 0 or trained.sum() <= 0:
        return None
    before = np.concatenate([taken[:1], taken[:-1]])
    during = trained.sum() / (trained / ((before + taken) / 2)).sum()
    return Evaluations(float(during), float(np.median(taken)))


def _at_one_speed(place: Place, pace: Pace, speeds: dict[Place, Evaluations | None]) -> Pace:
    of_workload = [speed for other, speed in speeds.items() if other[1:] == place[1:]]
    mine, known = speeds[place], [speed.median for speed in of_workload if speed is not None]
    if mine is None or len(known) < len(of_workload):
        return pace
    return Pace(pace.first, pace.later * statistics.median(known) / mine.during)


def at_pace(logs: scoring.Logs, paces: dict[Place, Pace]) -> tuple[scoring.Logs, list[tuple[str, str]]]:
    """The logs with the times of steps as measured alone, and the workloads and frameworks of which that is so.

    A workload of which a submission was not measured keeps the times of its race, because they are compared with
    each other.
    """
    trials, evals = logs.trials, logs.evals.copy()
    places = list(zip(trials["submission"], trials["workload"], trials["framework"], strict=True))
    lacking = {
        (workload, framework) for name, workload, framework in places if (name, workload, framework) not in paces
    }
    times = evals["time"].to_numpy(dtype=float, copy=True)
    steps, of_trial = evals["step"].to_numpy(dtype=float), evals["trial_id"].to_numpy()
    measured = set()
    for identity, place in zip(trials["trial_id"], places, strict=True):
        if place[1:] not in lacking:
            measured.add(place[1:])
            mine = of_trial == identity
            times[mine] = paces[place].seconds(steps[mine])
    evals["time"] = times
    return replace(logs, evals=evals), sorted(measured)
