"""mnist_resnet without a framework: data, sizes, loss, targets, batch size and budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from submissions.common.spec import LossType
from workloads.data import mnist
from workloads.mnist_resnet import data
from workloads.workload import Workload


class MnistResnetTask(Workload):
    """Classifies noisy 28 x 28 images of digits with a small residual network."""

    base = name = "mnist_resnet"
    tuned_on = True
    VARIANTS: ClassVar[Mapping[str, Mapping[str, object]]] = {"silu": {"activation": "silu"}}
    suite_order = 20

    filters = 16  # of the stem and of the first stage's bottlenecks; doubled from stage to stage
    stages = (1, 2, 1)  # blocks of each
    activation = "relu"

    target_metric_name = "accuracy"
    lower_is_better = False
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    num_train_examples = mnist.NUM_EXAMPLES["train"]
    num_eval_train_examples = 100
    num_validation_examples = 800
    num_test_examples = 100
    batch_size = 192
    eval_batch_size = 100
    train_mean = mnist.MEAN
    train_stddev = mnist.STDDEV
    max_allowed_runtime_sec = 600
    eval_period_time_sec = 2
    eval_period_steps = 10
    step_hint = 320

    def __init__(self) -> None:
        super().__init__()
        self._parts = data.load(
            {
                "eval_train": self.num_eval_train_examples,
                "validation": self.num_validation_examples,
                "test": self.num_test_examples,
            }
        )

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "head"

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        """Batch `index` of a split; for keys and shapes see `workloads.data.mnist`."""
        if split == "train":
            return data.train_batch(self._parts["train"], data_rng, index, batch_size)
        return mnist.eval_batch(self._parts[split], index, batch_size)
