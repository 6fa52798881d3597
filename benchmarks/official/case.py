"""One case: a submission trains on a workload of AlgoPerf in its own loop, with all that is asserted of it.

    python -m benchmarks.official.case --workload=ogbg --framework=pytorch --submission=kfac_reduce

Two runs: one of `STEPS` steps without interruption, with a checkpoint after `RESUME_AT` steps, between two
statistics steps; and one that resumes from that checkpoint and must end in the same bits. Prints one line of JSON,
see `Record`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import resource
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence

from benchmarks.official import one_batch
from benchmarks.official.batches import OTHER_CUTS, RECIPES, recipe_name
from benchmarks.official.digest import digest
from benchmarks.official.environment import load_runner, versions
from benchmarks.official.record import (
    INTERVAL,
    KFAC_POINT,
    NOT_COMPILED,
    POINT,
    RESUME_AT,
    STEPS,
    SUBMISSIONS,
    Record,
)
from benchmarks.official.replacing import replaced
from benchmarks.official.watchers import WATCHERS, same_graphs
from commands import errors
from commands.arguments import Parser
from commands.errors import UserError
from commands.frameworks import FRAMEWORKS
from submissions import registry
from submissions.common.api import Tree, Update
from workloads import algoperf


def run(
    workload_name: str,
    framework: str,
    submission: str,
    *,
    data_parallel: bool = False,
    max_factor_dim: int | None = None,
) -> Record:
    """Runs the case in this process."""
    record = Record(
        workload_name, framework, submission, data_parallel=data_parallel, max_factor_dim=max_factor_dim
    )
    record.algoperf, record.environment = algoperf.version(), versions()
    return _Case(record).run()


class _Case:
    def __init__(self, record: Record) -> None:
        self.record = record
        workload_name, framework, submission = record.workload, record.framework, record.submission
        self.framework = framework
        self.official_name = OTHER_CUTS.get(workload_name, workload_name)
        not_compiled = framework == "pytorch" and algoperf.base_of(workload_name) in NOT_COMPILED
        self.runner = load_runner(framework, self.official_name, ["--notorch_compile"] * not_compiled)
        self.module = registry.load(submission, framework)
        self.is_kfac = registry.is_kfac(submission, framework)
        point = POINT | (KFAC_POINT if self.is_kfac else {})
        if self.is_kfac and record.max_factor_dim is not None:
            point = point | {"max_factor_dim": record.max_factor_dim}
        self.hyperparameters = namedtuple("Hyperparameters", point)(**point)
        self.plain: list[float] = []
        self.statistics: list[float] = []
        self.digest_at_resume = ""

    def run(self) -> Record:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.framework == "jax":
                import jax

                self.record.devices = jax.device_count()
                self.record.unoptimized = _cache_programs(folder)
            whole = self.train(folder, watch=True)
            self.runner.flags.FLAGS.resume_last_run = True
            resumed = self.train(folder, watch=False)
        self.record.resumed = whole == resumed
        self.record.warnings = sorted({str(w.message)[:300] for w in caught if "K-FAC" in str(w.message)})
        seconds = self.record.seconds
        if len(self.plain) > 1:
            seconds["first_plain"] = self.plain[0]
        seconds["plain"] = min(self.plain)
        if self.statistics:
            seconds["statistics"] = min(self.statistics)
        self.record.total_seconds = time.perf_counter() - start
        self.record.peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return self.record

    # Training.

    def train(self, folder: str, *, watch: bool) -> str:
        """One run through AlgoPerf's `train_once`; returns the digest of everything at its end.

        Args:
            folder: where its checkpoint is or will be.
            watch: it is the uninterrupted run: observe it, and write the checkpoint.
        """
        from algoperf import checkpoint_utils, profiler
        from algoperf import random_utils as prng

        record, runner = self.record, self.runner
        eval_steps = (RESUME_AT,) if watch else ()
        workload = one_batch.make_workload(
            runner, record.workload, self.framework, eval_steps, data_parallel=record.data_parallel
        )
        end = ""
        save, restore = checkpoint_utils.save_checkpoint, checkpoint_utils.maybe_restore_checkpoint

        def save_checkpoint(**kwargs: Tree) -> None:
            nonlocal end
            digest = self.digest(kwargs)
            if watch and kwargs["global_step"] == RESUME_AT:
                self.digest_at_resume = digest
                start = time.perf_counter()
                save(**kwargs)
                record.seconds["checkpoint"] = time.perf_counter() - start
            end = digest  # the last call is at the end of training; its file is not needed

        def maybe_restore_checkpoint(*args: Tree, **kwargs: Tree) -> Tree:
            if watch or self.framework == "pytorch":
                return restore(*args, **kwargs)
            return self.restore_jax(restore, *args, **kwargs)

        steps: list[int] = []
        examples = RECIPES[recipe_name(record.workload)].examples

        def update_params(**kwargs: Tree) -> Update:
            steps.append(kwargs["global_step"])
            workload.steps = kwargs["global_step"] + 1
            if watch:
                return self.step(workload, kwargs)
            with same_graphs(self.framework):
                result: Update = self.module.update_params(**kwargs)
            return result

        with (
            replaced(checkpoint_utils, "save_checkpoint", save_checkpoint),
            replaced(checkpoint_utils, "maybe_restore_checkpoint", maybe_restore_checkpoint),
        ):
            _, metrics = runner.train_once(
                workload,
                self.official_name,
                examples,
                examples,
                "",
                None,
                self.module.init_optimizer_state,
                update_params,
                self.module.data_selection,
                self.module.prepare_for_eval,
                self.hyperparameters,
                0,
                prng.split(prng.PRNGKey(1), 2)[0],
                profiler.PassThroughProfiler(),
                STEPS,
                folder,
            )
        # Without this a checkpoint that was never written would pass for a perfect resume: two equal runs.
        expected = list(range(0 if watch else RESUME_AT, STEPS))
        if steps != expected or metrics["global_step"] != STEPS:
            raise RuntimeError(f"the run made the steps {steps}, not {expected}")
        if watch and "checkpoint" not in record.seconds:
            raise RuntimeError("no checkpoint was written")
        if watch:
            record.losses.append(metrics["eval_results"][-1][1]["validation/loss"])
            record.seconds["evaluation"] = min(workload.eval_seconds)
        return end

    def step(self, workload: one_batch.OneBatch, kwargs: dict[str, Tree]) -> Update:
        """One observed step."""
        watcher = WATCHERS[self.framework](self.record, workload, kwargs)
        start = time.perf_counter()
        with watcher:
            result: Update = self.module.update_params(**kwargs)
            watcher.wait(result)
        seconds = time.perf_counter() - start
        takes_statistics = self.is_kfac and kwargs["global_step"] % INTERVAL == 0
        (self.statistics if takes_statistics else self.plain).append(seconds)
        watcher.after(result)
        if takes_statistics and watcher.decompositions:
            best = self.record.seconds.get("decompositions", watcher.decompositions)
            self.record.seconds["decompositions"] = min(best, watcher.decompositions)
        return result

    # Checkpoints.

    def digest(self, content: dict[str, Tree]) -> str:
        """Of parameters, model state and optimizer state, bit for bit."""
        state, params = content["optimizer_state"], content["model_params"]
        if self.framework == "pytorch":
            trees = [
                one_batch.unwrapped(params).state_dict(),
                {key: value.state_dict() for key, value in state.items()},
            ]
        else:
            from flax import serialization

            # Plain dictionaries, as a restored state is one until the submission has built its own types again.
            trees = [serialization.to_state_dict(tree) for tree in (params, state[0], content["model_state"])]
        return digest(*trees)

    def restore_jax(self, restore: Callable[..., Tree], *args: Tree, **kwargs: Tree) -> Tree:
        """AlgoPerf's restore where it works; else what it does up to the point where it fails, and then goes on.

        At its pinned flax and orbax AlgoPerf restores no JAX checkpoint, whatever the submission.
        """
        names = ("framework", "optimizer_state", "model_params", "model_state", "train_state", "eval_results")
        given = dict(zip((*names, "global_step", "preemption_count"), args, strict=False)) | kwargs
        try:
            return restore(*args, **kwargs)
        except Exception as error:
            self.record.restore_error = f"{type(error).__name__}: {error}"
        from flax.training import checkpoints

        target = {
            "model_params": given["model_params"],
            "optimizer_state": given["optimizer_state"][0],
            "model_state": given["model_state"],
            "train_state": given["train_state"],
            "eval_results": None,
            "global_step": -1,
            "preemption_count": -1,
        }
        if algoperf.base_of(self.record.workload) == "cifar":
            # AlgoPerf's cifar returns its parameters as the initial model state, into which flax restores no batch
            # statistics: without a word they would be lost. The saved structure takes its place.
            target["model_state"] = checkpoints.restore_checkpoint(given["checkpoint_dir"], None)["model_state"]
        saved = checkpoints.restore_checkpoint(given["checkpoint_dir"], target=target)
        restored = (saved["optimizer_state"], given["optimizer_state"][1])
        content = {
            "optimizer_state": restored,
            "model_params": saved["model_params"],
            "model_state": saved["model_state"],
        }
        if self.digest(content) != self.digest_at_resume:
            raise RuntimeError("the state changed on its way through flax's checkpoint")
        step = int(saved["global_step"])
        state = saved["train_state"]
        return restored, saved["model_params"], saved["model_state"], state, [], step, 1


def _cache_programs(folder: str) -> bool:
    """The resumed run takes the whole one's compiled programs; compiling is most of a case's time.

    Where JAX_COMPILATION_CACHE_DIR is set, later cases take them too. Returns whether they are compiled without
    most optimizations.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return bool(jax.config.values["jax_disable_most_optimizations"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one case and prints its record; returns the exit code."""
    parser = Parser("python -m benchmarks.official.case", __doc__)
    parser.add_argument("--workload", required=True, help="of AlgoPerf's registry, or finewebedu_lm_all_words")
    parser.add_argument("--framework", required=True, choices=list(FRAMEWORKS))
    parser.add_argument("--submission", required=True, choices=SUBMISSIONS)
    parser.add_argument("--data_parallel", action="store_true", help="wrap the PyTorch model in DataParallel")
    parser.add_argument("--max_factor_dim", type=int, help="K-FAC's; default: the submission's own")
    return errors.run(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if not algoperf.installed():
        raise UserError(algoperf.NOT_INSTALLED)
    algoperf.base_of(args.workload)
    registry.check(args.submission, args.framework)
    # Tracing a model in JAX makes millions of objects, hardly any of them garbage.
    gc.set_threshold(100_000, 50, 100)
    record = run(
        args.workload,
        args.framework,
        args.submission,
        data_parallel=args.data_parallel,
        max_factor_dim=args.max_factor_dim,
    )
    print(json.dumps(dataclasses.asdict(record)))


if __name__ == "__main__":
    sys.exit(main())
