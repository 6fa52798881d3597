"""What is observed of one step, from outside the submission."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, Self

from benchmarks.official.one_batch import OneBatch, mean_loss, unwrapped
from benchmarks.official.record import CHECK_AT, Record
from benchmarks.official.replacing import replaced
from submissions.common.api import Tree, Update
from submissions.registry import is_kfac

if TYPE_CHECKING:
    from benchmarks.official.gradient_check import CapturedGradients
    from submissions.common.kfac.jax import Run


class Watcher(Protocol):
    """Observes one step: entered around it, told its results, asked to look afterwards.

    Attributes:
        decompositions: seconds of eigendecompositions in the step, where they can be told.
    """

    decompositions: float

    def __enter__(self) -> Self: ...

    def __exit__(self, *args: object) -> None: ...

    def wait(self, result: Update, /) -> None:
        """Waits for the device."""

    def after(self, result: Update, /) -> None:
        """Writes into the record what the step showed."""


class PyTorchWatcher:
    """Loss, coverage, refresh time and captured gradients of one step in PyTorch."""

    def __init__(self, record: Record, workload: OneBatch, kwargs: dict[str, Tree]) -> None:
        self.record = record
        self.workload = workload
        self.step = kwargs["global_step"]
        self.model = kwargs["current_param_container"]
        self.optimizer = kwargs["optimizer_state"]["optimizer"]
        self.decompositions = 0.0
        self.captured: CapturedGradients | None = None
        if self.step == 0:
            record.compiled = hasattr(self.model, "_orig_mod")
            record.parameters = sum(p.numel() for p in self.model.parameters())
        if hasattr(self.optimizer, "coverage"):
            self.declared = {layer.name for layer in self.optimizer.coverage().layers}

    def __enter__(self) -> PyTorchWatcher:
        self.stack = contextlib.ExitStack()
        if hasattr(self.optimizer, "coverage"):
            from benchmarks.official.gradient_check import CapturedGradients, handing_on

            self.stack.enter_context(handing_on())
            if self.step == CHECK_AT:
                self.captured = CapturedGradients()
                self.stack.enter_context(self.captured.listening())
        self._time_decompositions()
        return self

    def _time_decompositions(self) -> None:
        """Sums up the eigendecompositions of the step."""
        import torch

        original = torch.linalg.eigh
        self.decompositions = 0.0

        def eigh(*args: Tree, **kwargs: Tree) -> Tree:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.decompositions += time.perf_counter() - start

        self.stack.enter_context(replaced(torch.linalg, "eigh", eigh))

    def __exit__(self, *args: object) -> None:
        self.stack.close()

    def wait(self, result: Update) -> None:
        """The CPU has nothing in flight."""

    def after(self, result: Update) -> None:
        record = self.record
        record.losses.append(mean_loss(self.workload, self.workload.logits))
        if not hasattr(self.optimizer, "coverage"):
            return
        coverage = self.optimizer.coverage()
        record.covered = coverage.num_covered
        record.layers = [layer.name for layer in coverage.layers]
        record.fallbacks, record.note = {f.name: f.reason for f in coverage.fallbacks}, coverage.note
        lost = self.declared - set(record.layers)
        weights = {name: reason for name, reason in record.fallbacks.items() if name.rpartition(".")[0] in lost}
        record.uncovered_later |= weights
        record.counters = self.optimizer.metrics()
        if self.captured is not None:
            errors, bounds = self.captured.errors(unwrapped(self.model))
            record.gradient_errors, record.rounding_bounds = dict(errors), dict(bounds)
            record.convolution_errors = dict(self.captured.convolution_errors(unwrapped(self.model)))


class JaxWatcher:
    """Loss, coverage and captured gradients of one step in JAX."""

    def __init__(self, record: Record, workload: OneBatch, kwargs: dict[str, Tree]) -> None:
        import jax

        self.record = record
        self.workload = workload
        self.kwargs = kwargs
        self.step = kwargs["global_step"]
        self.decompositions = 0.0
        self.logged: list[dict[str, float]] = []
        self.params: Tree = None
        if self.step == 0:
            sizes = [leaf.size for leaf in jax.tree.leaves(kwargs["current_param_container"])]
            record.parameters = sum(sizes)
        if self.step == CHECK_AT and is_kfac(record.submission, record.framework):
            # The step donates the arrays it is given; what it captures is looked at after it.
            self.params = jax.tree.map(lambda leaf: leaf.copy(), kwargs["current_param_container"])
            self.model_state = jax.tree.map(lambda leaf: leaf.copy(), kwargs["model_state"])

    def __enter__(self) -> JaxWatcher:
        from submissions.common import logs

        self.stack = contextlib.ExitStack()
        # The loss is what the submission logs, at each step: a callback in the loss function would be seen sooner,
        # but programs with one are not kept on disk, and the resumed run would compile them again.
        self.stack.enter_context(replaced(logs, "LOG_PERIOD", 1))
        self.stack.enter_context(replaced(self.workload, "metrics_logger", self))
        return self

    def append_scalar_metrics(self, metrics: dict[str, float], global_step: int) -> None:
        """In place of AlgoPerf's logger."""
        self.logged.append(metrics)

    def __exit__(self, *args: object) -> None:
        self.stack.close()

    def wait(self, result: Update) -> None:
        import jax

        jax.block_until_ready((result[0][0], result[1]))

    def after(self, result: Update) -> None:
        record = self.record
        (row,) = self.logged
        record.losses.append(row["loss"])
        if not is_kfac(record.submission, record.framework):
            return
        from algoperf_kfac.jax import metrics

        state, run = result[0]
        coverage = run.layers.coverage()
        record.covered = coverage.num_covered
        if record.layers and record.layers != [layer.name for layer in coverage.layers]:
            raise RuntimeError("the covered layers changed between two steps")  # the state holds those of the first
        record.layers = [layer.name for layer in coverage.layers]
        record.fallbacks = {f.name: f.reason for f in coverage.fallbacks}
        record.counters = metrics(state, run.layers)
        if self.params is not None:
            self._check_gradients(state, run)

    def _check_gradients(self, state: Tree, run: Run) -> None:
        from benchmarks.official import gradient_check_jax
        from submissions.common.kfac import jax as submission

        kwargs = self.kwargs
        self.record.gradient_errors, self.record.rounding_bounds = gradient_check_jax.errors(
            submission,
            run,
            self.params,
            state,
            self.model_state,
            kwargs["batch"],
            kwargs["rng"],
        )


@contextlib.contextmanager
def same_graphs(framework: str) -> Iterator[None]:
    """Around a step that is not observed: has it compile the graph that an observed one compiled.

    Graphs that are listened to have further operations, and around these a compiler may sum in another order.
    Programs of JAX are not listened to.
    """
    if framework != "pytorch":
        yield
        return
    from benchmarks.official.gradient_check import handing_on

    with handing_on():
        yield


WATCHERS: dict[str, Callable[[Record, OneBatch, dict[str, Tree]], Watcher]] = {
    "pytorch": PyTorchWatcher,
    "jax": JaxWatcher,
}
