"""vowels_conformer without a framework: data, sizes, loss, metric, targets, batch size and budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from submissions.common.api import Batch, Tree
from submissions.common.spec import LossType
from workloads.vowels_conformer import data
from workloads.workload import Workload


@dataclasses.dataclass(frozen=True)
class RecognizerConfig:
    """What the model is made of.

    Attributes:
        num_features: of a frame.
        num_classes: labels and the blank.
        channels: of the convolutions that halve the number of frames.
        width, heads, mlp_width: sizes of model, attention and feed-forward parts.
        depth: blocks.
        kernel_size: of a block's convolution, in positions.
        encoder: what the blocks are: "conformer" or "lstm".
        activation: of feed-forward parts and convolutions: "swish" or "gelu".
        convolution_norm: of a block's convolution: "batch" or "layer".
    """

    num_features: int
    num_classes: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    kernel_size: int
    encoder: str
    activation: str
    convolution_norm: str


class VowelsConformerTask(Workload):
    """Writes down who speaks in three to eight joined recordings, one after the other."""

    base = name = "vowels_conformer"
    VARIANTS: ClassVar = {
        "lstm": {"encoder": "lstm"},
        "gelu": {"activation": "gelu"},
        "layernorm": {"convolution_norm": "layer"},
    }
    suite_order = 60

    num_features = data.NUM_FEATURES
    num_classes = data.NUM_SPEAKERS + 1
    channels = 16
    width = 64
    depth = 2
    heads = 4
    mlp_width = 192
    kernel_size = 5
    encoder = "conformer"
    activation = "swish"
    convolution_norm = "batch"

    target_metric_name = "loss"  # of CTC, nats per label
    lower_is_better = True
    loss_type = LossType.CTC_LOSS
    num_eval_train_examples = data.NUM_SEQUENCES["eval_train"]
    num_validation_examples = data.NUM_SEQUENCES["validation"]
    num_test_examples = data.NUM_SEQUENCES["test"]
    batch_size = 32
    eval_batch_size = 32
    train_mean = None
    train_stddev = None
    max_allowed_runtime_sec = 900
    eval_period_time_sec = 3
    eval_period_steps = 10
    step_hint = 400

    def __init__(self) -> None:
        super().__init__()
        self._parts = data.load()

    @property
    def num_train_examples(self) -> int:
        """How many utterances there are to join."""
        return len(self._parts["train"].lengths)

    @property
    def config(self) -> RecognizerConfig:
        """What the model is made of."""
        fields = dataclasses.fields(RecognizerConfig)
        return RecognizerConfig(**{field.name: getattr(self, field.name) for field in fields})

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "output"

    def model_inputs(self, batch: Batch) -> tuple[Tree, ...]:
        """Features and their paddings."""
        features, paddings = batch["inputs"]
        return features, paddings

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, Tree]:
        """Batch `index` of a split; see `workloads.vowels_conformer.data` for keys and shapes."""
        if split == "train":
            return data.train_batch(self._parts["train"], data_rng, index, batch_size)
        part = self._parts["train" if split == "eval_train" else split]
        return data.eval_batch(part, data.NUM_SEQUENCES[split], index, batch_size)

    def metrics(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """The mean "loss" per label, and the "label_error_rate", as a word error rate is counted: insertions,
        deletions and substitutions that make what was written down of what was said, per label of the latter.

        Args:
            batches: of each batch, beside the loss, "best", the most likely class at each position (N, R), its
                "paddings" (N, R), "labels" (N, L), their "label_paddings" (N, L), and "weights" (N,).
        """
        errors = total = 0
        for batch in batches:
            rows = zip(*(batch[key] for key in ("best", "paddings", "labels", "label_paddings")), strict=True)
            for (best, paddings, labels, label_paddings), weight in zip(rows, batch["weights"], strict=True):
                if weight:
                    said = labels[label_paddings == 0].tolist()
                    errors += edit_distance(collapsed(best[paddings == 0].tolist()), said)
                    total += len(said)
        return {**super().metrics(batches), "label_error_rate": errors / total}


def collapsed(path: Sequence[int]) -> list[int]:
    """What a path of CTC stands for: repetitions once, then without blanks."""
    return [label for label, before in zip(path, [0, *path], strict=False) if label not in (0, before)]


def edit_distance(found: Sequence[int], expected: Sequence[int]) -> int:
    """The least number of insertions, deletions and substitutions between two sequences (Levenshtein)."""
    above = list(range(len(expected) + 1))
    for i, label in enumerate(found, start=1):
        row = [i]
        for j, other in enumerate(expected, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (label != other)))
        above = row
    return above[-1]
