"""bible_translation without a framework: data, sizes, loss, targets, batch size and budget."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from submissions.common.api import Batch, Tree
from submissions.common.spec import LossType
from workloads.bible_translation import data
from workloads.workload import Workload


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What the model is made of, named as in AlgoPerf's wmt.

    Attributes:
        num_pieces: of the vocabulary.
        width, heads, mlp_width: sizes of model, attention and MLP.
        depth: blocks of the encoder, and of the decoder.
        pre_ln: layer norm before attention and MLP, and at the end of both stacks; otherwise after each sum.
        attention_temp: what the inputs of queries are multiplied by.
        activation: of the MLP: "relu" or "tanh".
        glu: whether the MLP's hidden values are multiplied by a second linear layer's.
    """

    num_pieces: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    pre_ln: bool
    attention_temp: float
    activation: str
    glu: bool


class BibleTranslationTask(Workload):
    """Translates a verse of Wycliffe's Bible, up to 48 pieces, to that of the World English Bible."""

    base = name = "bible_translation"
    VARIANTS: ClassVar = {
        "post_ln": {"pre_ln": False},
        "attention_temp": {"attention_temp": 4.0},
        "glu_tanh": {"glu": True, "activation": "tanh"},
    }
    suite_order = 50

    num_pieces = data.NUM_PIECES
    width = 64
    depth = 2
    heads = 4
    mlp_width = 256
    pre_ln = True
    attention_temp = 1.0
    activation = "relu"
    glu = False

    target_metric_name = "loss"  # nats per piece
    lower_is_better = True
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    num_eval_train_examples = data.NUM_EXAMPLES["eval_train"]
    num_validation_examples = data.NUM_EXAMPLES["validation"]
    num_test_examples = data.NUM_EXAMPLES["test"]
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
        self._verses = data.load()

    @property
    def num_train_examples(self) -> int:
        return len(self._verses.parts["train"].numbers)

    @property
    def config(self) -> TransformerConfig:
        """What the model is made of."""
        fields = dataclasses.fields(TransformerConfig)
        return TransformerConfig(**{field.name: getattr(self, field.name) for field in fields})

    def is_output_params(self, param_key: str) -> bool:
        return param_key.split(".")[0] == "shared_embedding"

    def model_inputs(self, batch: Batch) -> tuple[Tree, ...]:
        """Sources and targets; the decoder sees the targets before each position."""
        return batch["inputs"], batch["targets"]

    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, np.ndarray]:
        """Batch `index` of a split; see `workloads.bible_translation.data` for keys and shapes."""
        parts = self._verses.parts
        if split == "train":
            return data.train_batch(parts["train"], data_rng, index, batch_size)
        part = parts["train" if split == "eval_train" else split]
        return data.eval_batch(part, data.NUM_EXAMPLES[split], index, batch_size)
