"""bible_lm without a framework: data, sizes, loss, targets, batch size and budget."""

from __future__ import annotations

import numpy as np

from submissions.common.spec import LossType
from workloads.data import bible
from workloads.workload import Workload


class BibleLmTask(Workload):
    """Predicts the next character of the World English Bible from up to 64 before it."""

    base = name = "bible_lm"
    VARIANTS = {"post_ln": {"post_norm": True}}
    tuned_on = True
    suite_order = 80

    width = 64
    depth = 2
    heads = 4
    mlp_width = 256
    length = bible.LENGTH
    post_norm = False

    target_metric_name = "loss"  # nats per character
    lower_is_better = True
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    num_eval_train_examples = bible.NUM_WINDOWS["eval_train"]
    num_validation_examples = bible.NUM_WINDOWS["validation"]
    num_test_examples = bible.NUM_WINDOWS["test"]
    batch_size = 64
    eval_batch_size = 128
    train_mean = None
    train_stddev = None
    max_allowed_runtime_sec = 900
    eval_period_time_sec = 3
    eval_period_steps = 15
    step_hint = 400

    def __init__(self) -> None:
        super().__init__()
        self._text = bible.load()

    @property
    def num_train_examples(self) -> int:
        return len(self._text.parts["train"]) // self.length

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "output"

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        """Batch `index` of a split; see `workloads.data.bible` for keys and shapes."""
        if split == "train":
            return bible.train_batch(self._text.parts["train"], data_rng, index, batch_size, self.length)
        part = self._text.parts["train" if split == "eval_train" else split]
        return bible.eval_batch(part, bible.NUM_WINDOWS[split], index, batch_size, self.length)
