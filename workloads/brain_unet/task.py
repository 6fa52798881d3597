"""brain_unet without a framework: data, sizes, loss, metric, targets, batch size and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from submissions.common.spec import LossType
from workloads.brain_unet import data
from workloads.brain_unet.ssim import structural_similarity
from workloads.workload import Workload


class BrainUnetTask(Workload):
    """Reconstructs images of 64 x 64 pixels from a fourth of their k-space with a small U-Net."""

    base = name = "brain_unet"
    suite_order = 40
    # The first three as AlgoPerf's fastmri_tanh, _layernorm and _model_size: half the resolutions, wider layers.
    VARIANTS: ClassVar = {
        "tanh": {"activation": "tanh"},
        "layernorm": {"layer_norm": True},
        "model_size": {"pools": 2, "channels": 16},
        "mse": {"loss_type": LossType.MEAN_SQUARED_ERROR},
    }

    pools = 3
    channels = 8  # of the highest resolution; twice as many after every pooling
    activation = "leaky_relu"
    layer_norm = False

    target_metric_name = "ssim"
    lower_is_better = False
    loss_type = LossType.MEAN_ABSOLUTE_ERROR
    num_train_examples = 71  # slices, of which batches hold random crops
    num_eval_train_examples = 8
    num_validation_examples = 32
    num_test_examples = 18
    batch_size = 12
    eval_batch_size = 32
    train_mean = None
    train_stddev = None
    max_allowed_runtime_sec = 900
    eval_period_time_sec = 3
    eval_period_steps = 15
    step_hint = 300

    def __init__(self) -> None:
        super().__init__()
        parts = data.load()
        self._train = parts["train"]
        sizes = {
            "eval_train": self.num_eval_train_examples,
            "validation": self.num_validation_examples,
            "test": self.num_test_examples,
        }
        self._examples = {
            split: data.eval_examples(parts["train" if split == "eval_train" else split], count, seed)
            for seed, (split, count) in enumerate(sizes.items())
        }

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "output"

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        """Batch `index` of a split; see `workloads.brain_unet.data` for keys and shapes."""
        if split == "train":
            return data.train_batch(self._train, data_rng, index, batch_size)
        return data.eval_batch(self._examples[split], index, batch_size)

    def metrics(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """The mean "loss" and the mean structural similarity "ssim" of the images as they were before normalising.

        Args:
            batches: with the "outputs" and "targets" (N, 64, 64) of each, and its "mean", "std", "volume_max" and
                "weights" (N,).
        """
        values = []
        for batch in batches:
            valid = np.asarray(batch["weights"]) > 0
            mean, std = (batch[key][valid][:, None, None] for key in ("mean", "std"))
            outputs, targets = (batch[key][valid] * std + mean for key in ("outputs", "targets"))
            values.append(structural_similarity(outputs, targets, batch["volume_max"][valid]))
        return {**super().metrics(batches), "ssim": float(np.concatenate(values).mean())}
