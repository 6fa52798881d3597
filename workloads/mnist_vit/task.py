"""mnist_vit without a framework: data, sizes, loss, targets, batch size and budget."""

from __future__ import annotations

import numpy as np

from submissions.common.spec import LossType
from workloads.data import mnist
from workloads.workload import Workload


class MnistVitTask(Workload):
    """Classifies 28 x 28 images of digits with a small vision transformer."""

    base = name = "mnist_vit"
    VARIANTS = {"glu": {"glu": True}}
    tuned_on = True
    suite_order = 70

    patch = 7  # pixels; 4 x 4 = 16 positions
    width = 64
    depth = 3
    heads = 4
    mlp_width = 256
    glu = False

    target_metric_name = "accuracy"
    lower_is_better = False
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    num_train_examples = mnist.NUM_EXAMPLES["train"]
    num_eval_train_examples = 500
    num_validation_examples = mnist.NUM_EXAMPLES["validation"]
    num_test_examples = mnist.NUM_EXAMPLES["test"]
    batch_size = 128
    eval_batch_size = 250
    train_mean = mnist.MEAN
    train_stddev = mnist.STDDEV
    max_allowed_runtime_sec = 600
    eval_period_time_sec = 2
    eval_period_steps = 10
    step_hint = 400

    def __init__(self) -> None:
        super().__init__()
        self._parts = mnist.load()

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "head"

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        """Batch `index` of a split; see `workloads.data.mnist` for keys and shapes."""
        if split == "train":
            return mnist.train_batch(self._parts["train"], data_rng, index, batch_size)
        if split == "eval_train":
            full = self._parts["train"]
            count = self.num_eval_train_examples
            part = mnist.Part(full.images[:count], full.labels[:count], full.rows[:count])
        else:
            part = self._parts[split]
        return mnist.eval_batch(part, index, batch_size)
