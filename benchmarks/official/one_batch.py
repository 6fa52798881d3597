"""AlgoPerf's workloads with one repeated batch in place of their data, to be trained by AlgoPerf's own loop."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Protocol

from benchmarks.official.batches import LANGUAGE_MODELS, OTHER_CUTS, make_batch
from submissions.common import api
from submissions.common.api import Batch, Rng, Tree

NEVER = 1e18  # seconds


class OneBatch(api.Workload, Protocol):
    """A workload that repeats one batch.

    Attributes:
        steps: made so far; set by the caller, because the loop asks whether to evaluate after each.
        batch: the batch.
        logits: of the last training pass; PyTorch alone: in JAX they never leave the compiled step.
        eval_seconds: of each evaluation.
    """

    steps: int
    batch: Batch
    logits: Tree
    eval_seconds: list[float]


def make_workload(
    runner: ModuleType, name: str, framework: str, eval_steps: tuple[int, ...], *, data_parallel: bool
) -> OneBatch:
    """A workload of AlgoPerf's registry that repeats one batch; its model, loss and everything else are official.

    Args:
        runner: the module `submission_runner`.
        name: of the registry, or of `OTHER_CUTS`.
        eval_steps: the steps after which AlgoPerf's loop finds that it is time to evaluate.
        data_parallel: wrap the PyTorch model in DataParallel, as AlgoPerf does on several GPUs.
    """
    entry = runner.WORKLOADS[OTHER_CUTS.get(name, name)]
    path = os.path.join(runner.BASE_WORKLOADS_DIR, f"{entry['workload_path']}_{framework}", "workload.py")
    official = runner.workloads.import_workload(path, entry["workload_class_name"], return_class=True)

    class Made(official):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(**({"use_specaug": False} if "librispeech" in name else {}))
            self.batch = make_batch(name, framework)
            self.logits: Tree = None
            self.eval_seconds: list[float] = []
            self.steps = 0
            if name.startswith("criteo1tb"):
                # The true table needs 12 GB to train; this is the one of criteo1tb_test, AlgoPerf's own small
                # variant.
                self.vocab_size = 32 * 128 * 16
            if name in LANGUAGE_MODELS:
                size = LANGUAGE_MODELS[name]  # by AlgoPerf's own configuration
                self._n_layers, self._seq_len, self._vocab_size = size.layers, size.length, size.vocabulary

        @property
        def eval_period_time_sec(self) -> float:
            """The loop asks after each step; others read it too, so this must not count."""
            return 0 if self.steps in eval_steps else NEVER

        @property
        def max_allowed_runtime_sec(self) -> float:
            """None: mnist's minute would be over on a busy machine before its five steps."""
            return NEVER

        def _build_input_queue(self, *args: Tree, **kwargs: Tree) -> Iterator[Batch]:
            def queue() -> Iterator[Batch]:
                while True:
                    yield dict(self.batch)

            return queue()

        def init_model_fn(self, *args: Tree, **kwargs: Tree) -> Tree:
            model, state = super().init_model_fn(*args, **kwargs)
            if data_parallel:
                import torch

                model = torch.nn.DataParallel(model)
            return model, state

        def model_fn(self, *args: Tree, **kwargs: Tree) -> Tree:
            """As it is called: names of arguments of its own would hide that AlgoPerf's differ."""
            result = super().model_fn(*args, **kwargs)
            mode = inspect.signature(super().model_fn).bind(*args, **kwargs).arguments["mode"]
            if framework == "pytorch" and mode.name == "TRAIN":
                self.logits = detached(result[0])
            return result

        def eval_model(self, *args: Tree, **kwargs: Tree) -> dict[str, float]:
            """One forward pass in evaluation mode over the batch, and its loss."""
            _, params, model_state, rng = args[:4]
            start = time.perf_counter()
            loss = evaluate(self, params, model_state, rng)
            self.eval_seconds.append(time.perf_counter() - start)
            return {"train/loss": loss, "validation/loss": loss}

        def has_reached_validation_target(self, eval_result: Tree) -> bool:
            return False

        def has_reached_test_target(self, eval_result: Tree) -> bool:
            return False

    made: OneBatch = Made()
    return made


def unwrapped(model: Tree) -> Tree:
    """The module inside torch.compile and DataParallel."""
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "module", model)


def detached(tree: Tree) -> Tree:
    """Tensors, or a tuple of them, cut off from their graph and from later changes in place."""
    return tuple(detached(item) for item in tree) if isinstance(tree, tuple) else tree.detach().clone()


def mean_loss(workload: OneBatch, logits: Tree) -> float:
    """The official loss of the batch, never compiled."""
    losses = type(workload).loss_fn(workload, workload.batch["targets"], logits, workload.batch.get("weights"))
    return float(losses["summed"]) / float(losses["n_valid_examples"])


def evaluate(workload: OneBatch, params: Tree, model_state: Tree, rng: Rng) -> float:
    """The mean loss in evaluation mode."""
    from algoperf import spec

    logits, _ = workload.model_fn(
        params, workload.batch, model_state, spec.ForwardPassMode.EVAL, rng, update_batch_norm=False
    )
    return mean_loss(workload, logits)
