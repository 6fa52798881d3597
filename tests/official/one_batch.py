"""AlgoPerf's workloads with one repeated batch in place of their data, to be trained by AlgoPerf's own loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from tests.official import batches

NEVER = 1e18  # seconds


def make_workload(runner: Any, name: str, framework: str, eval_steps: tuple[int, ...], data_parallel: bool) -> Any:
    """A workload of AlgoPerf's registry that repeats one batch; its model, loss and everything else are official.

    Args:
      runner: the module `submission_runner`.
      eval_steps: the steps after which AlgoPerf's loop finds that it is time to evaluate.
      data_parallel: wrap the PyTorch model in DataParallel, as AlgoPerf does on several GPUs.

    The caller sets `steps` to the number of steps made. For whoever watches the workload: `batch`; `logits`, of the
    last training pass (PyTorch alone: in JAX they never leave the compiled step); `eval_seconds`.
    """
    entry = runner.WORKLOADS[name]
    path = os.path.join(runner.BASE_WORKLOADS_DIR, f"{entry['workload_path']}_{framework}", "workload.py")
    official = runner.workloads.import_workload(path, entry["workload_class_name"], return_class=True)

    class OneBatch(official):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(**({"use_specaug": False} if "librispeech" in name else {}))
            self.batch = batches.make_batch(name, framework)
            self.logits: Any = None
            self.eval_seconds: list[float] = []
            self.steps = 0
            if name.startswith("criteo1tb"):
                # The true table needs 12 GB to train; this is the one of criteo1tb_test, AlgoPerf's own small
                # variant.
                self.vocab_size = 32 * 128 * 16

        @property
        def eval_period_time_sec(self) -> float:
            """The loop asks after each step; others read it too, so this must not count."""
            return 0 if self.steps in eval_steps else NEVER

        @property
        def max_allowed_runtime_sec(self) -> float:
            """None: mnist's minute would be over on a busy machine before its five steps."""
            return NEVER

        def _build_input_queue(self, *args: Any, **kwargs: Any) -> Iterator[batches.Batch]:
            def queue() -> Iterator[batches.Batch]:
                while True:
                    yield dict(self.batch)

            return queue()

        def init_model_fn(self, *args: Any, **kwargs: Any) -> Any:
            model, state = super().init_model_fn(*args, **kwargs)
            if data_parallel:
                import torch

                model = torch.nn.DataParallel(model)
            return model, state

        def model_fn(
            self,
            params: Any,
            augmented_and_preprocessed_input_batch: batches.Batch,
            model_state: Any,
            mode: Any,
            rng: Any,
            update_batch_norm: bool,
            **kwargs: Any,
        ) -> Any:
            batch = augmented_and_preprocessed_input_batch
            result = super().model_fn(params, batch, model_state, mode, rng, update_batch_norm, **kwargs)
            if framework == "pytorch" and mode.name == "TRAIN":
                self.logits = detached(result[0])
            return result

        def eval_model(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """One forward pass in evaluation mode over the batch, and its loss."""
            _, params, model_state, rng = args[:4]
            start = time.perf_counter()
            loss = evaluate(self, params, model_state, rng)
            self.eval_seconds.append(time.perf_counter() - start)
            return {"train/loss": loss, "validation/loss": loss}

        def has_reached_validation_target(self, eval_result: Any) -> bool:
            return False

        def has_reached_test_target(self, eval_result: Any) -> bool:
            return False

    return OneBatch()


def detached(tree: Any) -> Any:
    """Tensors, or a tuple of them, cut off from their graph and from later changes in place."""
    return tuple(detached(item) for item in tree) if isinstance(tree, tuple) else tree.detach().clone()


def mean_loss(workload: Any, logits: Any) -> float:
    """The official loss of the batch, never compiled."""
    losses = type(workload).loss_fn(workload, workload.batch["targets"], logits, workload.batch.get("weights"))
    return float(losses["summed"]) / float(losses["n_valid_examples"])


def evaluate(workload: Any, params: Any, model_state: Any, rng: Any) -> float:
    """The mean loss in evaluation mode."""
    from algoperf import spec

    logits, _ = workload.model_fn(
        params, workload.batch, model_state, spec.ForwardPassMode.EVAL, rng, update_batch_norm=False
    )
    return mean_loss(workload, logits)
