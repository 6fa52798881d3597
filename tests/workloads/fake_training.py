"""Trials that take no time: what a job would leave, worked out from the point it was given."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from algoperf_kfac.config import as_mapping
from workloads.runner import jobs, logs, tuning
from workloads.studies import facts

EVERY, EVALUATIONS = 10, 8


class Ended:
    """A process that has ended."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing, as to any process that has ended."""

    def wait(self) -> int:
        return self.returncode


class Trainer:
    """Takes the place of `jobs._start`.

    A trial comes to its target at step 1 / learning_rate, plus one evaluation on an odd seed, or not at all beyond
    the last evaluation; its metric there depends on the seed.

    Attributes:
        started: the names of the jobs, in order.
        failing: a part of the names of those that fail.
        interrupt_at: how many jobs may start before Ctrl-C.
        busy: name of a job -> how many more times another process has it.
    """

    def __init__(self) -> None:
        self.started: list[str] = []
        self.failing = "nothing"
        self.interrupt_at: int | None = None
        self.busy: dict[str, int] = {}

    def __call__(self, job: jobs.Job) -> Ended | None:
        if self.busy.get(job.name):
            self.busy[job.name] -= 1
            return None
        if len(self.started) == self.interrupt_at:
            raise KeyboardInterrupt
        self.started.append(job.name)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text("the reason\n")
        if self.failing in job.name:
            return Ended(1)
        flags = dict(part.removeprefix("--").partition("=")[::2] for part in job.command[3:])
        points = tuning.read_points(flags["tuning_search_space"], int(flags["num_tuning_trials"]))
        start = int(flags["hparam_start_index"])
        for folder, point in zip(job.folders, points[start : int(flags["hparam_end_index"])], strict=True):
            if not (folder / "outcome.json").exists():
                train(folder, flags, dict(as_mapping(point)), job.settings)
        return Ended(0)


def train(folder: Path, flags: dict[str, str], point: dict[str, object], settings: dict[str, object]) -> None:
    workload, seed = flags["workload"], int(flags["rng_seed"])
    task, target = facts.task(workload), facts.validation_target(workload)
    lower, metric = task.lower_is_better, task.target_metric_name
    needed = 1 / float(point["learning_rate"]) + EVERY * (seed % 2)
    sign = 1 if lower else -1
    rows = []
    for k in range(1, EVALUATIONS + 1):
        step = EVERY * k
        value = target + sign * 0.01 * (needed - step) / EVERY
        rows.append(
            {
                "global_step": step,
                "accumulated_submission_time": step * 0.123456789,
                "score": step * 0.123456789,
                "accumulated_eval_time": 0.1 * k,
                "accumulated_logging_time": 0.0,
                "total_duration": step * 0.2,
                "preemption_count": 0,
                f"train/{metric}": value,
                f"validation/{metric}": value,
                f"test/{metric}": value + sign * 0.001 * (seed % 10),
            }
        )
        reached = value <= target if lower else value >= target
        if reached and settings["stop_at_target"]:
            break
    name = f"validation/{metric}"
    hit = next((row for row in rows if (row[name] <= target if lower else row[name] >= target)), None)
    values = [row[name] for row in rows]
    outcome = {
        "reason": "target" if hit else "step limit",
        "metric": name,
        "target": target,
        "steps_to_target": hit["global_step"] if hit else None,
        "time_to_target": hit["score"] if hit else None,
        "best_metric": min(values) if lower else max(values),
        "final_metric": values[-1],
        "global_step": rows[-1]["global_step"],
        "accumulated_submission_time": rows[-1]["score"],
        "first_step_time": 0.1,
        "ms_per_step": 123.456789,
        "accumulated_eval_time": rows[-1]["accumulated_eval_time"],
        "preemption_count": 0,
        "rng_seed": seed,
        "settings": settings,
    }
    meta = {
        "workload.target_metric_name": metric,
        "workload.validation_target_value": target,
        "workload.lower_is_better": lower,
        "workload.max_allowed_runtime_sec": 600,
        "workload.step_hint": EVERY * EVALUATIONS,
        "os_platform": "Machine-1.2.3",
        "torch_version": "2",
        "rng_seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    logs.write_table(folder / "eval_measurements.csv", rows)
    given = {**flags, "max_global_steps": None}
    for file, content in {"hparams": point, "meta_data_0": meta, "flags_0": given, "outcome": outcome}.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
