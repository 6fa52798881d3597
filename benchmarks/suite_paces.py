"""Times of a race at the pace that its submissions have alone on the machine.

A race runs for hours, several trials at a time, beside whatever else the machine does. A step takes as long as it
takes alone, which the suite's stage `pace` measures at the best point of each submission, one trial at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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


def read(directory: Path) -> dict[Place, Pace]:
    """The paces measured in a suite's directory; empty without the stage."""
    found = {}
    for path in sorted(directory.glob("pace/*/*/*/trial_*/outcome.json")):
        outcome = experiment.outcome(path.parent)
        if outcome is None or outcome["global_step"] < 2 or outcome["first_step_time"] is None:
            continue
        first = outcome["first_step_time"]
        later = (outcome["accumulated_submission_time"] - first) / (outcome["global_step"] - 1)
        workload, _, framework = path.parents[1].name.rpartition("_")
        found[path.parents[3].name, workload, framework] = Pace(first, later)
    return found


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
