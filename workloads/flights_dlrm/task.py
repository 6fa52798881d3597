"""flights_dlrm without a framework: data, sizes, loss, targets, batch size and budget."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from submissions.common.spec import LossType
from workloads.flights_dlrm import data
from workloads.workload import Workload


class FlightsDlrmTask(Workload):
    """Predicts whether a flight will arrive more than 15 minutes late, with a small DLRM."""

    base = name = "flights_dlrm"
    tuned_on = True
    suite_order = 30
    # As AlgoPerf's criteo1tb_layernorm, _embed_init and _resnet; the last has its sizes as well.
    VARIANTS: ClassVar = {
        "layernorm": {"layer_norm": True},
        "embed_init": {"embedding_scale": 1.0},
        "resnet": {"resnet": True, "bottom": (256, 256, 256), "top": (256, 256, 256, 256)},
    }

    embedding_width = 32
    bottom = (128, 64, 32)
    top = (512, 512, 256)
    layer_norm = False
    resnet = False
    embedding_scale = data.VOCABULARY**-0.5

    target_metric_name = "loss"  # nats per flight
    lower_is_better = True
    loss_type = LossType.SIGMOID_CROSS_ENTROPY
    num_eval_train_examples = 512
    num_validation_examples = 4_096
    num_test_examples = 1_536
    batch_size = 1_536
    eval_batch_size = 2_048
    train_mean = None
    train_stddev = None
    max_allowed_runtime_sec = 900
    eval_period_time_sec = 3
    eval_period_steps = 10
    step_hint = 160  # 95 % of a pass over the training part, behind which validation losses rise again

    def __init__(self) -> None:
        super().__init__()
        self._parts = data.load()

    @property
    def num_train_examples(self) -> int:
        return len(self._parts["train"]["targets"])

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "output"

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        """Batch `index` of a split; see `workloads.flights_dlrm.data` for keys and shapes."""
        if split == "train":
            return data.train_batch(self._parts["train"], data_rng, index, batch_size)
        counts = {
            "eval_train": self.num_eval_train_examples,
            "validation": self.num_validation_examples,
            "test": self.num_test_examples,
        }
        part = self._parts["train" if split == "eval_train" else split]
        return data.eval_batch(part, counts[split], index, batch_size)
