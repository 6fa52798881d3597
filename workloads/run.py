"""Trains a submission on an embedded workload, with the flags, rules and files of AlgoPerf's runner.

    python -m workloads.run --workload=mnist_vit --framework=pytorch \\
        --submission_path=submissions/nadamw/pytorch/submission.py \\
        --tuning_search_space=tuning_search_spaces/nadamw.json --num_tuning_trials=2 \\
        --experiment_dir=runs --experiment_name=first
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl.flags import FlagValues

from algoperf_kfac.config import as_mapping
from commands import errors, frameworks
from commands.errors import UserError, tell
from commands.flags import parse
from submissions.common.api import Hyperparameters
from workloads import registry, seeds
from workloads.runner import checkpoints, experiment, loop, tuning
from workloads.runner import flags as runner_flags
from workloads.runner import submission as submissions
from workloads.runner.backend import Backend
from workloads.runner.logs import read_hyperparameters
from workloads.runner.outcome import Outcome, describe, settings_of
from workloads.workload import Workload

REQUIRED = ("workload", "framework", "submission_path", "experiment_dir", "experiment_name")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""

    def command() -> None:
        flags = runner_flags.define()
        parse(sys.argv[1:] if argv is None else argv, flags, "python -m workloads.run", REQUIRED)
        run(flags)

    return errors.run(command, interrupted="interrupted; go on with --resume_last_run")


def run(flags: FlagValues) -> list[Outcome]:
    """Trains all trials; returns their outcomes.

    Raises:
        UserError: something the user can put right, before any training if it can be known then.
    """
    workload_name, framework = flags.workload, flags.framework
    points = _points(flags)
    registry.check(workload_name)
    backend = _backend(framework)
    workload = registry.load(workload_name, framework)
    submissions.check_framework(flags.submission_path, framework)
    submission = submissions.load(flags.submission_path)
    batch_size = submissions.batch_size(submission, workload_name, backend.device_count())
    eval_batch_size = workload.eval_batch_size
    if submission.get_eval_batch_size is not None:
        eval_batch_size = submission.get_eval_batch_size(workload_name)
        submissions.check_divides("evaluation batch size", eval_batch_size, backend.device_count())
    if flags.overwrite and flags.resume_last_run:
        raise UserError("--overwrite and --resume_last_run exclude each other; give one of them.")
    if flags.torch_compile and framework != "pytorch":
        raise UserError("--torch_compile is for --framework=pytorch; leave it out.")
    backend.start()
    if flags.clock == "cpu" and not backend.is_one_process_on_cpu():
        raise UserError(
            "--clock=cpu counts the CPU seconds of one process, but the work is done by other devices, or several "
            "processes; leave it out."
        )
    _check_points(workload, submission, backend, points, save_checkpoints=flags.save_checkpoints)
    if not backend.is_main():
        backend.same_on_all(0.0)  # the main process decides whether the folder may be taken
    folder = experiment.open_folder(
        flags.experiment_dir,
        flags.experiment_name,
        workload_name,
        framework,
        [f"trial_{index + 1}" for index, _ in points],
        whole=flags.hparam_start_index is None and flags.hparam_end_index is None,
        overwrite=flags.overwrite and backend.is_main(),
        resume=flags.resume_last_run or not backend.is_main(),
    )
    if backend.is_main():
        backend.same_on_all(0.0)
    for index, point in points:
        _check_earlier_run(folder / f"trial_{index + 1}", point, flags)
    outcomes = []
    for index, point in points:
        trial_folder = folder / f"trial_{index + 1}"
        with _disk_errors_explained(trial_folder):
            outcome = experiment.outcome(trial_folder)
            if outcome is None:
                with experiment.lock(trial_folder) if backend.is_main() else contextlib.nullcontext():
                    outcome = experiment.outcome(trial_folder)  # of another process, which held it until now
                    if not backend.same_on_all(outcome is not None):
                        _check_earlier_run(trial_folder, point, flags)
                        outcome = loop.run(
                            loop.Trial(
                                workload=workload,
                                workload_name=workload_name,
                                submission=submission,
                                backend=backend,
                                hyperparameters=point,
                                folder=trial_folder,
                                seed=int(backend.same_on_all(_seed(flags.rng_seed, trial_folder, backend))),
                                batch_size=batch_size,
                                eval_batch_size=eval_batch_size,
                                max_steps=flags.max_global_steps or workload.step_hint,
                                max_runtime_sec=_runtime(workload, flags.tuning_ruleset),
                                data_dir=flags.data_dir or "",
                                stop_at_target=flags.stop_at_target,
                                save_checkpoints=flags.save_checkpoints,
                                keep_all_checkpoints=flags.save_intermediate_checkpoints,
                                torch_compile=flags.torch_compile,
                                clock=flags.clock,
                                flags=flags.flag_values_dict(),
                            )
                        )
        if outcome is not None:  # on the main process
            outcomes.append(outcome)
            if backend.is_main():
                tell(f"{trial_folder}: {describe(outcome)}")
    backend.stop()
    return outcomes


def _points(flags: FlagValues) -> list[tuple[int, Hyperparameters]]:
    if flags.tuning_ruleset not in ("external", "self"):
        raise UserError(f"Unknown --tuning_ruleset '{flags.tuning_ruleset}'. Known: external, self.")
    if flags.tuning_ruleset == "self":
        if flags.tuning_search_space is not None:
            raise UserError("--tuning_search_space does not go with --tuning_ruleset=self; leave one out.")
        return [(0, None)]
    if flags.tuning_search_space is None:
        raise UserError(
            "The flag --tuning_search_space is missing; give a JSON file, or --tuning_ruleset=self for the "
            "submission's own point."
        )
    points = tuning.read_points(flags.tuning_search_space, flags.num_tuning_trials)
    return tuning.select(points, flags.hparam_start_index, flags.hparam_end_index)


def _backend(framework: str) -> Backend:
    frameworks.check(framework)
    try:
        if framework == "jax":
            from workloads.runner.jax import JaxBackend

            return JaxBackend()
        from workloads.runner.pytorch import PyTorchBackend

        return PyTorchBackend()
    except ModuleNotFoundError as error:
        raise frameworks.missing(error, framework) from None


def _check_points(
    workload: Workload,
    submission: submissions.Submission,
    backend: Backend,
    points: list[tuple[int, Hyperparameters]],
    *,
    save_checkpoints: bool,
) -> None:
    """Lets the submission refuse a point now, not after hours of training the points before it."""
    for index, point in points:
        params, model_state = workload.init_model_fn(seeds.root(0))
        try:
            rng = backend.rng(seeds.root(0))
            state = submission.init_optimizer_state(workload, params, model_state, point, rng)
        except ValueError as error:
            where = "its own point" if point is None else f"point {index}"
            raise UserError(f"The submission refuses {where}: {error}.") from None
        if save_checkpoints:
            backend.check_optimizer_state(state)


def _check_earlier_run(trial_folder: Path, point: Hyperparameters, flags: FlagValues) -> None:
    """Refuses to take an earlier run of other settings for this one."""
    remedy = "choose another --experiment_name, or replace it by --overwrite"
    saved = read_hyperparameters(trial_folder)
    if saved is not None and saved != (None if point is None else as_mapping(point)):
        raise UserError(f"The trial {trial_folder} has other hyperparameters (hparams.json); {remedy}.")
    outcome = experiment.outcome(trial_folder)
    if outcome is not None:
        for name in loop.SETTINGS:
            before, now = settings_of(outcome)[name], flags[name].value
            if before != now:
                raise UserError(
                    f"The trial {trial_folder} was finished with --{name}={before}, not {now}; {remedy}."
                )


def _seed(given: int | None, trial_folder: Path, backend: Backend) -> int:
    recorded = experiment.recorded_seed(trial_folder)
    if recorded is None:  # a new trial, or one whose records a crash damaged
        recorded = (checkpoints.restore(trial_folder, backend.peek) or {}).get("rng_seed")
    if recorded is not None:
        if given is not None and given != recorded:
            raise UserError(
                f"The trial {trial_folder} was begun with --rng_seed={recorded}; resume it with that seed or none."
            )
        return recorded
    return struct.unpack("I", os.urandom(4))[0] if given is None else given


def _runtime(workload: Workload, ruleset: str) -> float:
    return workload.max_allowed_runtime_sec * (loop.SELF_TUNING_FACTOR if ruleset == "self" else 1.0)


@contextlib.contextmanager
def _disk_errors_explained(trial_folder: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into a line that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(
            f"Cannot write to {trial_folder}: {error.strerror}. Results up to the last evaluation are kept; "
            "make room and go on with --resume_last_run."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
