"""molecules_gnn without a framework: data, sizes, loss, metric, targets, batch size and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from submissions.common.api import Tree
from submissions.common.spec import LossType
from workloads.molecules_gnn import data
from workloads.workload import Workload


class MoleculesGnnTask(Workload):
    """Tells by a graph network which molecules the blood-brain barrier keeps out."""

    base = name = "molecules_gnn"
    VARIANTS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "gelu": {"activation": "gelu"},
        "model_size": {"width": 64, "hops": 2},
    }
    suite_order = 10

    width = 48
    hops = 3
    activation = "relu"

    target_metric_name = "mean_average_precision"
    lower_is_better = False
    loss_type = LossType.SIGMOID_CROSS_ENTROPY
    num_eval_train_examples = 64
    num_validation_examples = data.NUM_EXAMPLES["validation"]
    num_test_examples = data.NUM_EXAMPLES["test"]
    batch_size = 96
    eval_batch_size = 64
    train_mean = None
    train_stddev = None
    max_allowed_runtime_sec = 600
    eval_period_time_sec = 2
    eval_period_steps = 12
    step_hint = 400

    def __init__(self) -> None:
        super().__init__()
        self._parts = data.load()
        # Spread over the file, whose order is not by chance.
        spread = np.linspace(0, self.num_train_examples - 1, self.num_eval_train_examples).astype(np.int64)
        self._parts["eval_train"] = self._parts["train"].chosen(spread)

    @property
    def num_train_examples(self) -> int:
        return len(self._parts["train"].labels)

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "decoder"

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, Tree]:
        """Batch `index` of a split; see `workloads.molecules_gnn.data` for keys and shapes."""
        if split == "train":
            return data.train_batch(self._parts["train"], data_rng, index, batch_size)
        room = data.room_for([self._parts[name] for name in ("eval_train", "validation", "test")], batch_size)
        return data.eval_batch(self._parts[split], index, batch_size, room)

    def metrics(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Adds the mean over tasks of the average precision; here there is one task."""
        scores, labels, weights = (
            np.concatenate([batch[key] for batch in batches]) for key in ("scores", "labels", "weights")
        )
        tasks = [
            average_precision(labels[counts, task], scores[counts, task])
            for task, counts in enumerate((weights > 0).T)
        ]
        return {**super().metrics(batches), self.target_metric_name: float(np.mean(tasks))}


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """The sum over thresholds of precision times what recall gains there; NaN without positives.

    Equal scores share a threshold. As the Open Graph Benchmark measures ogbg-molpcba.

    Args:
        labels: 0 or 1, (N,).
        scores: larger for what is more likely positive, (N,).
    """
    if not (labels > 0).any() or not np.isfinite(scores).all():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each threshold
    hits = labels[order].cumsum(dtype=np.float64)[last]
    recall = hits / hits[-1]
    return float((np.diff(recall, prepend=0.0) * hits / (last + 1)).sum())
