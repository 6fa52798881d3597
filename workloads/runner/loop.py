"""One trial: train, evaluate, log, checkpoint, by AlgoPerf's timing rules.

Timed are data selection, update_params and prepare_for_eval; evaluations, logs and checkpoints are not. The
embedded runner differs from the official one in two points: it evaluates every `workload.eval_period_steps` steps
instead of seconds, and its step limit is `workload.step_hint` unless told otherwise. Both make steps-to-target
independent of the machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from commands import atomic
from submissions.common.api import EvalResults, Hyperparameters, Tree
from submissions.common.spec import TrainingCompleteError
from workloads import seeds
from workloads.data.queue import BatchQueue
from workloads.runner import checkpoints, experiment
from workloads.runner.backend import Backend
from workloads.runner.logs import MetricsLogger, meta_data, write_hyperparameters
from workloads.runner.outcome import Outcome
from workloads.runner.progress import Progress
from workloads.runner.submission import Submission
from workloads.workload import Workload

SELF_TUNING_FACTOR = 1.5
SETTINGS = ("max_global_steps", "stop_at_target", "clock")  # flags that decide when a trial ends


@dataclass(frozen=True)
class Trial:
    """What to train and where.

    Attributes:
        max_runtime_sec: of timed work.
        clock: "wall", or "cpu" for the CPU seconds of this process.
        flags: as they were given, for the record.
    """

    workload: Workload
    workload_name: str
    submission: Submission
    backend: Backend
    hyperparameters: Hyperparameters
    folder: Path
    seed: int
    batch_size: int
    eval_batch_size: int
    max_steps: int
    max_runtime_sec: float
    data_dir: str
    stop_at_target: bool
    save_checkpoints: bool
    keep_all_checkpoints: bool
    torch_compile: bool
    clock: str
    flags: dict[str, object]


def run(trial: Trial) -> Outcome:
    """Trains a trial to its end, from its last checkpoint if there is one, and returns its outcome."""
    run_ = _Run(trial)
    run_.restore()
    run_.write_meta_data()
    run_.train()
    return run_.finish()


class _Run:
    """The state of a trial between its steps."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        data_rng, optimizer_rng, model_rng, self.rng = seeds.split(seeds.root(trial.seed), 4)
        workload, backend = trial.workload, trial.backend
        self.queue: BatchQueue = workload._build_input_queue(data_rng, "train", trial.data_dir, trial.batch_size)
        self.params, self.model_state = workload.init_model_fn(model_rng)
        if trial.torch_compile:
            self.params = backend.compiled(self.params)
        backend.seed_step(optimizer_rng)
        self.optimizer_state = trial.submission.init_optimizer_state(
            workload, self.params, self.model_state, trial.hyperparameters, backend.rng(optimizer_rng)
        )
        self.step = 0
        self.preemption_count = 0
        self.duration_before = 0.0
        self.first_step_time: float | None = None
        self.eval_results: EvalResults = []
        self.state: dict[str, float] = {
            "validation_goal_reached": False,
            "test_goal_reached": False,
            "is_time_remaining": True,
            "last_eval_time": 0.0,
            "training_complete": False,
            "accumulated_submission_time": 0.0,
            "accumulated_eval_time": 0.0,
            "accumulated_logging_time": 0.0,
            "last_step_end_time": 0.0,
        }
        self.logger = MetricsLogger(trial.folder)
        workload.attach_metrics_logger(self.logger if backend.is_main() else None)
        self.start = self.now()

    def now(self, *results: Tree) -> float:
        """Seconds on the trial's clock, once the device has made these results."""
        wall = self.trial.backend.now(*results)
        return time.process_time() if self.trial.clock == "cpu" else wall

    # Resuming.

    def restore(self) -> None:
        """Goes back to the last checkpoint; without one the trial starts anew, with the same seed."""
        backend = self.trial.backend
        if backend.is_main():
            atomic.remove_leftovers(self.trial.folder)
        saved = checkpoints.restore(
            self.trial.folder, lambda content: backend.unpack(content, self.params, self.optimizer_state)
        )
        if saved is not None:
            self.params, self.optimizer_state = saved["model_params"], saved["optimizer_state"]
            self.step = saved["global_step"]
            self.first_step_time = saved["first_step_time"]
            self.preemption_count = saved["preemption_count"] + 1
            self.duration_before = saved["total_duration"]
            # The clock starts anew with the process; what counts are the accumulated times.
            self.state = {**saved["train_state"], "last_eval_time": self.start}
            self.model_state = saved["model_state"]
            self.queue.position = saved["queue_position"]
            self.eval_results = [(step, dict(result)) for step, result in saved["eval_results"]]
            self.logger = MetricsLogger(self.trial.folder, saved["rows"], saved["eval_rows"])
            self.trial.workload.attach_metrics_logger(self.logger if backend.is_main() else None)
        if backend.is_main():
            self.logger.flush()  # repairs the tables of a run killed between its checkpoint and its rows

    def save(self) -> None:
        if not self.trial.save_checkpoints:
            return
        rest: dict[str, object] = {
            "model_state": self.model_state,
            "train_state": dict(self.state),
            "eval_results": list(self.eval_results),
            "global_step": self.step,
            "rng_seed": self.trial.seed,
            "first_step_time": self.first_step_time,
            "preemption_count": self.preemption_count,
            "total_duration": self.duration(),
            "queue_position": self.queue.position,
            "rows": self.logger.rows,
            "eval_rows": self.logger.eval_rows,
        }
        content = self.trial.backend.pack(self.params, self.optimizer_state, rest)
        checkpoints.save(self.trial.folder, self.step, content, keep_all=self.trial.keep_all_checkpoints)

    def write_meta_data(self) -> None:
        trial = self.trial
        if trial.backend.is_main():
            write_hyperparameters(trial.folder, trial.hyperparameters)
            content = meta_data(trial.workload, trial.backend.versions(), trial.seed)
            content |= {"global_batch_size": trial.batch_size, "max_global_steps": trial.max_steps}
            atomic.write_json(trial.folder / f"meta_data_{self.preemption_count}.json", content)
            atomic.write_json(trial.folder / f"flags_{self.preemption_count}.json", trial.flags)
            experiment.repair(trial.folder, "meta_data_*.json", content)
            experiment.repair(trial.folder, "flags_*.json", trial.flags)

    def duration(self) -> float:
        return self.duration_before + self.now() - self.start

    # Training.

    def is_over(self) -> bool:
        goal = self.trial.stop_at_target and self.state["validation_goal_reached"]
        return bool(goal or self.state["training_complete"] or not self.state["is_time_remaining"])

    def train(self) -> None:
        trial, backend = self.trial, self.trial.backend
        read_loss = backend.watch_loss(trial.workload)
        label = f"{trial.workload_name} {trial.folder.name}"
        progress = Progress(label, trial.max_steps, self.step, read_loss) if backend.is_main() else None
        self.state["last_step_end_time"] = self.now()
        try:
            while not self.is_over():
                rngs = seeds.split(seeds.fold_in(self.rng, self.step), 4)
                self.update(rngs[0], rngs[1])
                if self.is_eval_due():
                    self.prepare_for_eval(rngs[2])
                    self.check_time()
                    if self.state["is_time_remaining"]:
                        self.evaluate(rngs[3])
                        self.log_evaluation()
                self.state["last_step_end_time"] = self.now()
                if progress:
                    progress.metric = self.last_metric()
                    progress.update(self.step)
        finally:
            if progress:
                progress.close(self.step)
            backend.unwatch_loss(trial.workload)

    def is_eval_due(self) -> bool:
        period = self.trial.workload.eval_period_steps
        return self.step == 1 or self.step % period == 0 or bool(self.state["training_complete"])

    def update(self, data_rng: np.ndarray, update_rng: np.ndarray) -> None:
        """One timed step."""
        trial, submission = self.trial, self.trial.submission
        batch = submission.data_selection(
            trial.workload,
            self.queue,
            self.optimizer_state,
            self.params,
            self.model_state,
            trial.hyperparameters,
            self.step,
            trial.backend.rng(data_rng),
        )
        trial.backend.seed_step(update_rng)
        extra = {"train_state": MappingProxyType(self.state)} if submission.needs_train_state else {}
        try:
            self.optimizer_state, self.params, self.model_state = submission.update_params(
                workload=trial.workload,
                current_param_container=self.params,
                current_params_types=trial.workload.model_params_types,
                model_state=self.model_state,
                hyperparameters=trial.hyperparameters,
                batch=batch,
                loss_type=trial.workload.loss_type,
                optimizer_state=self.optimizer_state,
                eval_results=self.eval_results,
                global_step=self.step,
                rng=trial.backend.rng(update_rng),
                **extra,
            )
        except TrainingCompleteError:
            self.state["training_complete"] = True
        self.step += 1
        if self.step >= trial.max_steps:
            self.state["training_complete"] = True
        end = self.now(self.params, self.optimizer_state)
        # As the official runner's times, the same on all processes: schedules may follow them.
        seconds = trial.backend.same_on_all(end - self.state["last_step_end_time"])
        self.state["accumulated_submission_time"] += seconds
        if self.first_step_time is None:
            self.first_step_time = seconds

    def prepare_for_eval(self, rng: np.ndarray) -> None:
        """The submission's own preparation, timed."""
        trial = self.trial
        if trial.submission.prepare_for_eval is None:
            return
        start = self.now()
        trial.backend.seed_step(rng)
        self.optimizer_state, self.params, self.model_state = trial.submission.prepare_for_eval(
            workload=trial.workload,
            current_param_container=self.params,
            current_params_types=trial.workload.model_params_types,
            model_state=self.model_state,
            hyperparameters=trial.hyperparameters,
            loss_type=trial.workload.loss_type,
            optimizer_state=self.optimizer_state,
            eval_results=self.eval_results,
            global_step=self.step,
            rng=trial.backend.rng(rng),
        )
        end = self.now(self.params, self.optimizer_state)
        self.state["accumulated_submission_time"] += trial.backend.same_on_all(end - start)

    def check_time(self) -> None:
        time = self.trial.backend.same_on_all(self.state["accumulated_submission_time"])
        self.state["is_time_remaining"] = time < self.trial.max_runtime_sec

    def evaluate(self, rng: np.ndarray) -> None:
        """The untimed evaluation."""
        trial, state = self.trial, self.state
        start = self.now()
        trial.backend.seed_step(rng)
        result = trial.workload.eval_model(
            trial.eval_batch_size, self.params, self.model_state, rng, trial.data_dir, None, self.step
        )
        if trial.workload.has_reached_validation_target(result):
            state["validation_goal_reached"] = True
        if trial.workload.has_reached_test_target(result):
            state["test_goal_reached"] = True
        end = self.now()
        state["last_eval_time"] = end
        state["accumulated_eval_time"] += end - start
        result["score"] = state["accumulated_submission_time"]
        result["total_duration"] = self.duration()
        for name in ("submission", "eval", "logging"):
            result[f"accumulated_{name}_time"] = state[f"accumulated_{name}_time"]
        self.eval_results.append((self.step, result))

    def log_evaluation(self) -> None:
        """Checkpoint first, tables second: the checkpoint holds the rows, so nothing is lost between the two."""
        start = self.now()
        if self.trial.backend.is_main():
            self.logger.append_scalar_metrics(
                self.eval_results[-1][1], self.step, self.preemption_count, is_eval=True
            )
            self.save()
            self.logger.flush()
        self.state["accumulated_logging_time"] += self.now() - start

    # The end.

    def last_metric(self) -> str:
        name = f"validation/{self.trial.workload.target_metric_name}"
        return f"{name} {self.eval_results[-1][1][name]:.4f}" if self.eval_results else ""

    def finish(self) -> Outcome:
        """Writes the outcome, which also marks the trial as finished."""
        outcome = self.outcome()
        if self.trial.backend.is_main():
            self.logger.flush()
            atomic.write_json(self.trial.folder / "outcome.json", outcome)
        return outcome

    def outcome(self) -> Outcome:
        workload = self.trial.workload
        name = f"validation/{workload.target_metric_name}"
        hit = next(
            ((step, row) for step, row in self.eval_results if workload.has_reached_validation_target(row)), None
        )
        best = max if not workload.lower_is_better else min
        metrics = [row[name] for _, row in self.eval_results if not math.isnan(row[name])]
        if hit and self.trial.stop_at_target:
            reason = "target"
        elif not self.state["is_time_remaining"]:
            reason = "time budget"
        else:
            reason = "step limit" if self.step >= self.trial.max_steps else "submission"
        return {
            "reason": reason,
            "metric": name,
            "target": workload.validation_target_value,
            "steps_to_target": hit[0] if hit else None,
            "time_to_target": hit[1]["score"] if hit else None,
            "best_metric": best(metrics) if metrics else None,
            "final_metric": self.eval_results[-1][1][name] if self.eval_results else None,
            "global_step": self.step,
            "accumulated_submission_time": self.state["accumulated_submission_time"],
            "first_step_time": self.first_step_time,
            "ms_per_step": 1e3 * self.state["accumulated_submission_time"] / max(self.step, 1),
            "accumulated_eval_time": self.state["accumulated_eval_time"],
            "preemption_count": self.preemption_count,
            "rng_seed": self.trial.seed,
            "settings": {name: self.trial.flags[name] for name in SETTINGS},
        }
