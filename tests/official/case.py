"""One case: a submission trains on a workload of AlgoPerf in its own loop, with all that is asserted of it.

    python -m tests.official.case --workload=ogbg --framework=pytorch --submission=kfac_reduce

Two runs: one of `STEPS` steps without interruption, with a checkpoint after `RESUME_AT` steps, between two
statistics steps; and one that resumes from that checkpoint and must end in the same bits. Prints one line of JSON,
see `Record`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import resource
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.official import batches, environment

SUBMISSIONS = ("nadamw", "kfac_expand", "kfac_reduce")
STEPS = 5
RESUME_AT = 2
INTERVAL = 3  # statistics and refresh at steps 0 and 3
# Where G^T A is compared with the gradient. Not at step 0: while a head or the last scale of each residual block is
# still zero, as in imagenet_vit and the ResNets, most layers have no gradient, and any capture would do.
CHECK_AT = INTERVAL
# No warm-up: the official horizons are so long that five steps of one would not move. No clipping: the gradient is
# compared with the captured one. Everything else is the submission's own point.
POINT = {"learning_rate": 1e-4, "warmup_factor": 0.0, "horizon_factor": 1.0, "grad_clip": None}
KFAC_POINT = {"factor_interval": INTERVAL, "refresh_interval": INTERVAL, "initial_statistics": 1}


# AlgoPerf's runner compiles it, but at torch 2.13 inductor cannot on a CPU, whatever the submission and the image
# size ("cannot determine truth value of Relational").
NOT_COMPILED = ("fastmri",)


@dataclasses.dataclass
class Record:
    """What a case found.

    Attributes:
      data_parallel: the PyTorch model was wrapped in DataParallel.
      max_factor_dim: K-FAC's, where it was not the submission's own.
      losses: of the repeated batch in training mode, one for each step, before its update; and, last, after all
        steps in evaluation mode, where batch normalisation makes it another quantity.
      seconds: of a "plain" step (the fastest), the "first_plain" one (with compilation), a "statistics" step (the
        fastest, with the refresh), its eigendecompositions alone ("decompositions"), an "evaluation", a
        "checkpoint".
      covered, parameters: of the model.
      layers: that K-FAC covers.
      fallbacks: parameters it does not cover, with the reason.
      uncovered_later: layers that were declared and then moved to the fallback, with the reason (in JAX none can:
        all of them are known before the first step).
      counters: the optimizer's own, after the last step.
      gradient_errors, rounding_bounds: layer -> error of G^T A against its gradient at step `CHECK_AT`, and how
        large float32 alone may make it, see `gradient_check` and `gradient_check_jax`.
      compiled: the model was compiled by the runner.
      unoptimized: JAX compiled its programs with JAX_DISABLE_MOST_OPTIMIZATIONS: quickly, for slow steps.
      resumed: the resumed run began at the checkpoint's step and ended in the same bits.
      restore_error: what AlgoPerf's own restore raised, if it did.
      peak_rss_mb: of the whole process.
      total_seconds: of the whole process but its imports.
    """

    workload: str
    framework: str
    submission: str
    data_parallel: bool
    max_factor_dim: int | None = None
    steps: int = STEPS
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    covered: int = 0
    parameters: int = 0
    layers: list[str] = dataclasses.field(default_factory=list)
    fallbacks: dict[str, str] = dataclasses.field(default_factory=dict)
    uncovered_later: dict[str, str] = dataclasses.field(default_factory=dict)
    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    gradient_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    rounding_bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    compiled: bool = False
    unoptimized: bool = False
    resumed: bool = False
    restore_error: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    peak_rss_mb: float = 0.0
    total_seconds: float = 0.0


def submission_module(submission: str, framework: str) -> str:
    """The module AlgoPerf's runner would import."""
    return f"submissions.{submission}.{framework}.submission"


def exists(submission: str, framework: str) -> bool:
    """Whether the repository has that submission for that framework."""
    return (Path("submissions") / submission / framework / "submission.py").exists()


def run(
    workload_name: str,
    framework: str,
    submission: str,
    data_parallel: bool = False,
    max_factor_dim: int | None = None,
) -> Record:
    """Runs the case in this process."""
    return _Case(Record(workload_name, framework, submission, data_parallel, max_factor_dim)).run()


class _Case:
    def __init__(self, record: Record) -> None:
        self.record = record
        workload_name, framework, submission = record.workload, record.framework, record.submission
        self.framework = framework
        not_compiled = framework == "pytorch" and batches.base_of(workload_name) in NOT_COMPILED
        self.runner = environment.load_runner(framework, workload_name, ["--notorch_compile"] * not_compiled)
        self.module = importlib.import_module(submission_module(submission, framework))
        point = POINT | (KFAC_POINT if submission.startswith("kfac") else {})
        if submission.startswith("kfac") and record.max_factor_dim is not None:
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

    def train(self, folder: str, watch: bool) -> str:
        """One run through AlgoPerf's `train_once`; returns the digest of everything at its end.

        Args:
          folder: where its checkpoint is or will be.
          watch: it is the uninterrupted run: observe it, and write the checkpoint.
        """
        from algoperf import checkpoint_utils, profiler
        from algoperf import random_utils as prng

        from tests.official import one_batch

        record, runner = self.record, self.runner
        workload = one_batch.make_workload(
            runner, record.workload, self.framework, (RESUME_AT,) if watch else (), record.data_parallel
        )
        end: dict[str, Any] = {}
        save, restore = checkpoint_utils.save_checkpoint, checkpoint_utils.maybe_restore_checkpoint

        def save_checkpoint(**kwargs: Any) -> None:
            digest = self.digest(kwargs)
            if watch and kwargs["global_step"] == RESUME_AT:
                self.digest_at_resume = digest
                start = time.perf_counter()
                save(**kwargs)
                record.seconds["checkpoint"] = time.perf_counter() - start
            end["digest"] = digest  # the last call is at the end of training; its file is not needed

        def maybe_restore_checkpoint(*args: Any, **kwargs: Any) -> Any:
            if watch or self.framework == "pytorch":
                return restore(*args, **kwargs)
            return self.restore_jax(restore, *args, **kwargs)

        steps: list[int] = []

        def update_params(**kwargs: Any) -> Any:
            steps.append(kwargs["global_step"])
            workload.steps = kwargs["global_step"] + 1
            workload.watch = True
            result = self.step(workload, kwargs) if watch else self.module.update_params(**kwargs)
            workload.watch = False
            return result

        with (
            mock.patch.object(checkpoint_utils, "save_checkpoint", save_checkpoint),
            mock.patch.object(checkpoint_utils, "maybe_restore_checkpoint", maybe_restore_checkpoint),
        ):
            _, metrics = runner.train_once(
                workload,
                record.workload,
                batches.SIZES[batches.base_of(record.workload)],
                batches.SIZES[batches.base_of(record.workload)],
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
        return str(end["digest"])

    def step(self, workload: Any, kwargs: dict[str, Any]) -> Any:
        """One observed step."""
        watcher = _WATCHERS[self.framework](self.record, workload, kwargs)
        start = time.perf_counter()
        with watcher:
            result = self.module.update_params(**kwargs)
            watcher.wait(result)
        seconds = time.perf_counter() - start
        takes_statistics = self.record.submission.startswith("kfac") and kwargs["global_step"] % INTERVAL == 0
        (self.statistics if takes_statistics else self.plain).append(seconds)
        watcher.after(result)
        if takes_statistics and watcher.decompositions:
            best = self.record.seconds.get("decompositions", watcher.decompositions)
            self.record.seconds["decompositions"] = min(best, watcher.decompositions)
        return result

    # Checkpoints.

    def digest(self, content: dict[str, Any]) -> str:
        """Of parameters, model state and optimizer state, bit for bit."""
        state, params = content["optimizer_state"], content["model_params"]
        if self.framework == "pytorch":
            params = getattr(params, "_orig_mod", params)
            params = getattr(params, "module", params)
            trees = [params.state_dict(), {key: value.state_dict() for key, value in state.items()}]
        else:
            from flax import serialization

            # Plain dictionaries, as a restored state is one until the submission has built its own types again.
            trees = [serialization.to_state_dict(tree) for tree in (params, state[0], content["model_state"])]
        hasher = hashlib.sha256()
        for tree in trees:
            _feed(hasher, tree)
        return hasher.hexdigest()

    def restore_jax(self, restore: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
        if batches.base_of(self.record.workload) == "cifar":
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


def _feed(hasher: Any, tree: Any) -> None:
    """Everything in a tree of containers, tensors, arrays and plain values.

    None counts as an empty dictionary: flax gives back one for the other (the model state of imagenet_vit).
    """
    if tree is None:
        return
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            hasher.update(str(key).encode())
            _feed(hasher, tree[key])
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            hasher.update(field.name.encode())
            _feed(hasher, getattr(tree, field.name))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _feed(hasher, item)
    elif hasattr(tree, "detach"):
        import torch

        hasher.update(str((tree.dtype, tuple(tree.shape))).encode())
        hasher.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif hasattr(tree, "shape"):
        import numpy as np

        array = np.ascontiguousarray(tree)
        hasher.update(str((str(array.dtype), array.shape)).encode() + array.tobytes())
    else:
        hasher.update(repr(tree).encode())


def _cache_programs(folder: str) -> bool:
    """The resumed run takes the whole one's compiled programs; compiling is most of a case's time.

    Returns whether they are compiled without most optimizations.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return bool(jax.config.values["jax_disable_most_optimizations"])


class _PyTorchWatcher:
    """Loss, coverage, refresh time and captured gradients of one step in PyTorch."""

    def __init__(self, record: Record, workload: Any, kwargs: dict[str, Any]) -> None:
        self.record = record
        self.workload = workload
        self.step = kwargs["global_step"]
        self.model = kwargs["current_param_container"]
        self.optimizer = kwargs["optimizer_state"]["optimizer"]
        self.decompositions = 0.0
        self.captured: Any = None
        if self.step == 0:
            record.compiled = hasattr(self.model, "_orig_mod")
            record.parameters = sum(p.numel() for p in self.model.parameters())
        if hasattr(self.optimizer, "coverage"):
            self.declared = {layer.name for layer in self.optimizer.coverage().layers}

    def __enter__(self) -> _PyTorchWatcher:
        import contextlib

        self.stack = contextlib.ExitStack()
        if self.step == CHECK_AT and hasattr(self.optimizer, "coverage"):
            from tests.official.gradient_check import CapturedGradients

            self.captured = CapturedGradients()
            self.stack.enter_context(self.captured.listening())
        self._time_decompositions()
        return self

    def _time_decompositions(self) -> None:
        """Sums up the eigendecompositions of the step."""
        import torch

        original = torch.linalg.eigh
        self.decompositions = 0.0

        def eigh(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.decompositions += time.perf_counter() - start

        self.stack.enter_context(mock.patch.object(torch.linalg, "eigh", eigh))

    def __exit__(self, *args: Any) -> None:
        self.stack.close()

    def wait(self, result: Any) -> None:
        """The CPU has nothing in flight."""

    def after(self, result: Any) -> None:
        from tests.official import one_batch

        record = self.record
        record.losses.append(one_batch.mean_loss(self.workload, self.workload.logits))
        if not hasattr(self.optimizer, "coverage"):
            return
        coverage = self.optimizer.coverage()
        record.covered = coverage.num_covered
        record.layers = [layer.name for layer in coverage.layers]
        record.fallbacks = {f.name: f.reason for f in coverage.fallbacks}
        lost = self.declared - set(record.layers)
        weights = {name: reason for name, reason in record.fallbacks.items() if name.rpartition(".")[0] in lost}
        record.uncovered_later |= weights
        record.counters = self.optimizer.metrics()
        if self.captured is not None:
            model = getattr(self.model, "_orig_mod", self.model)
            model = getattr(model, "module", model)
            record.gradient_errors, record.rounding_bounds = self.captured.errors(model)


class _JaxWatcher:
    """Loss, coverage and captured gradients of one step in JAX."""

    def __init__(self, record: Record, workload: Any, kwargs: dict[str, Any]) -> None:
        import jax

        self.record = record
        self.workload = workload
        self.kwargs = kwargs
        self.step = kwargs["global_step"]
        self.decompositions = 0.0
        self.before = len(workload.losses)
        self.params: Any = None
        if self.step == 0:
            sizes = [leaf.size for leaf in jax.tree.leaves(kwargs["current_param_container"])]
            record.parameters = sum(sizes)
        if self.step == CHECK_AT and record.submission.startswith("kfac"):
            # The step donates the arrays it is given; what it captures is looked at after it.
            self.params = jax.tree.map(lambda leaf: leaf.copy(), kwargs["current_param_container"])
            self.model_state = jax.tree.map(lambda leaf: leaf.copy(), kwargs["model_state"])

    def __enter__(self) -> _JaxWatcher:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def wait(self, result: Any) -> None:
        import jax

        jax.block_until_ready((result[0][0], result[1]))
        jax.effects_barrier()

    def after(self, result: Any) -> None:
        record = self.record
        record.losses.append(self.workload.losses[self.before])
        if not record.submission.startswith("kfac"):
            return
        from algoperf_kfac.jax import metrics

        state, training = result[0]
        coverage = training.layers.coverage()
        record.covered = coverage.num_covered
        if record.layers and record.layers != [layer.name for layer in coverage.layers]:
            raise RuntimeError("the covered layers changed between two steps")  # the state holds those of the first
        record.layers = [layer.name for layer in coverage.layers]
        record.fallbacks = {f.name: f.reason for f in coverage.fallbacks}
        record.counters = metrics(state, training.layers)
        if self.params is not None:
            self._check_gradients(state, training)

    def _check_gradients(self, state: Any, training: Any) -> None:
        import submissions.kfac.jax
        from tests.official import gradient_check_jax

        kwargs = self.kwargs
        self.workload.watch = False  # its loss was the training step's own
        self.record.gradient_errors, self.record.rounding_bounds = gradient_check_jax.errors(
            submissions.kfac.jax, training, self.params, state, self.model_state, kwargs["batch"], kwargs["rng"]
        )


_WATCHERS: dict[str, Any] = {"pytorch": _PyTorchWatcher, "jax": _JaxWatcher}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one case and prints its record; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.official.case", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--workload", required=True, help="of AlgoPerf's registry, variants included")
    parser.add_argument("--framework", required=True, choices=environment.FRAMEWORKS)
    parser.add_argument("--submission", required=True, choices=SUBMISSIONS)
    parser.add_argument("--data_parallel", action="store_true", help="wrap the PyTorch model in DataParallel")
    parser.add_argument("--max_factor_dim", type=int, help="K-FAC's; default: the submission's own")
    args = parser.parse_args(argv)
    if not environment.INSTALLED:
        print(f"error: {environment.REASON}.", file=sys.stderr)
        return 2
    try:
        batches.base_of(args.workload)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not exists(args.submission, args.framework):
        print(f"error: there is no {args.submission} for {args.framework}.", file=sys.stderr)
        return 2
    record = run(args.workload, args.framework, args.submission, args.data_parallel, args.max_factor_dim)
    print(json.dumps(dataclasses.asdict(record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
