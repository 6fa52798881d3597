"""What is observed of one step, from outside the submission."""

from __future__ import annotations

import contextlib
import time
from typing import Any
from unittest import mock

from tests.official.record import CHECK_AT, Record


class PyTorchWatcher:
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

    def __enter__(self) -> PyTorchWatcher:
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


class JaxWatcher:
    """Loss, coverage and captured gradients of one step in JAX."""

    def __init__(self, record: Record, workload: Any, kwargs: dict[str, Any]) -> None:
        import jax

        self.record = record
        self.workload = workload
        self.kwargs = kwargs
        self.step = kwargs["global_step"]
        self.decompositions = 0.0
        self.logged: list[dict[str, float]] = []
        self.params: Any = None
        if self.step == 0:
            sizes = [leaf.size for leaf in jax.tree.leaves(kwargs["current_param_container"])]
            record.parameters = sum(sizes)
        if self.step == CHECK_AT and record.submission.startswith("kfac"):
            # The step donates the arrays it is given; what it captures is looked at after it.
            self.params = jax.tree.map(lambda leaf: leaf.copy(), kwargs["current_param_container"])
            self.model_state = jax.tree.map(lambda leaf: leaf.copy(), kwargs["model_state"])

    def __enter__(self) -> JaxWatcher:
        from submissions.common import logs

        self.stack = contextlib.ExitStack()
        # The loss is what the submission logs, at each step: a callback in the loss function would be seen sooner,
        # but programs with one are not kept on disk, and the resumed run would compile them again.
        self.stack.enter_context(mock.patch.object(logs, "LOG_PERIOD", 1))
        self.stack.enter_context(mock.patch.object(self.workload, "metrics_logger", self))
        return self

    def append_scalar_metrics(self, metrics: dict[str, float], global_step: int) -> None:
        """In place of AlgoPerf's logger."""
        self.logged.append(metrics)

    def __exit__(self, *args: Any) -> None:
        self.stack.close()

    def wait(self, result: Any) -> None:
        import jax

        jax.block_until_ready((result[0][0], result[1]))

    def after(self, result: Any) -> None:
        record = self.record
        (row,) = self.logged
        record.losses.append(row["loss"])
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
        from submissions.common.kfac import jax as submission
        from tests.official import gradient_check_jax

        kwargs = self.kwargs
        self.record.gradient_errors, self.record.rounding_bounds = gradient_check_jax.errors(
            submission,
            training,
            self.params,
            state,
            self.model_state,
            kwargs["batch"],
            kwargs["rng"],
        )


WATCHERS: dict[str, Any] = {"pytorch": PyTorchWatcher, "jax": JaxWatcher}
