"""The AlgoPerf Workload interface, in the official names and signatures, with what the embedded workloads add.

A submission sees a workload only through this interface, so the same file runs here and in the official harness.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from submissions.common.api import Batch, MetricsLogger, Rng, Tree
from submissions.common.spec import ForwardPassMode, LossType
from workloads import target_file
from workloads.data.queue import BatchQueue


class Workload(abc.ABC):
    """A model, its data, its loss, its metric and its target.

    Attributes:
        base: the name of the folder `workloads/NAME`.
        name: the same, or in a held-out variant the variant's: the base's, an underscore, and what is other.
        VARIANTS: last part of a held-out variant's name -> the attributes that it has other than the base, such as
            `{"silu": {"activation": "silu"}}`. The targets of a variant are its own.
        tuned_on: whether K-FAC's configuration was chosen on it; said in every result.
        suite_order: its place in the embedded suite; those without one come last.
        metrics_logger: where a submission may log (`append_scalar_metrics(metrics, global_step)`), or None.
    """

    base: str
    name: str
    VARIANTS: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    tuned_on: bool = False
    suite_order: int = 1000

    def __init__(self) -> None:
        self._param_shapes: Tree = None
        self._param_types: Tree = None
        self.metrics_logger: MetricsLogger | None = None

    def attach_metrics_logger(self, metrics_logger: MetricsLogger | None) -> None:
        """Sets where a submission may log."""
        self.metrics_logger = metrics_logger

    # The task.

    @property
    @abc.abstractmethod
    def target_metric_name(self) -> str:
        """The metric the target is set on: a key of the evaluation results after `validation/`."""

    @property
    @abc.abstractmethod
    def lower_is_better(self) -> bool:
        """Whether the target metric is to be reached from above. Not part of AlgoPerf's interface."""

    @property
    def validation_target_value(self) -> float:
        """The target metric to reach on the validation set; see `workloads.target_file`."""
        return target_file.read(self.base, self.name).validation

    @property
    def test_target_value(self) -> float:
        """The target metric to reach on the test set; see `workloads.target_file`."""
        return target_file.read(self.base, self.name).test

    @property
    @abc.abstractmethod
    def loss_type(self) -> LossType:
        """The loss the model trains on."""

    def has_reached_validation_target(self, eval_result: Mapping[str, float]) -> bool:
        """Whether an evaluation meets the validation target; NaN does not."""
        value = eval_result[f"validation/{self.target_metric_name}"]
        return self._meets(value, self.validation_target_value)

    def has_reached_test_target(self, eval_result: Mapping[str, float]) -> bool:
        """Whether an evaluation meets the test target; NaN does not."""
        return self._meets(eval_result[f"test/{self.target_metric_name}"], self.test_target_value)

    def _meets(self, value: float, target: float) -> bool:
        return value <= target if self.lower_is_better else value >= target

    # The sizes of the data.

    @property
    @abc.abstractmethod
    def num_train_examples(self) -> int:
        """The size of the training set."""

    @property
    @abc.abstractmethod
    def num_eval_train_examples(self) -> int:
        """How many training examples an evaluation looks at."""

    @property
    @abc.abstractmethod
    def num_validation_examples(self) -> int:
        """The size of the validation set."""

    @property
    @abc.abstractmethod
    def num_test_examples(self) -> int:
        """The size of the test set."""

    @property
    @abc.abstractmethod
    def batch_size(self) -> int:
        """The global batch size submissions train with. Not part of AlgoPerf's interface: there they choose it."""

    @property
    @abc.abstractmethod
    def eval_batch_size(self) -> int:
        """The batch size of evaluations."""

    @property
    @abc.abstractmethod
    def train_mean(self) -> float | None:
        """The mean the inputs were normalised with."""

    @property
    @abc.abstractmethod
    def train_stddev(self) -> float | None:
        """The standard deviation the inputs were normalised with."""

    # The budget.

    @property
    @abc.abstractmethod
    def max_allowed_runtime_sec(self) -> int:
        """Seconds of training after which a run ends. Generous here: `step_hint` is the binding limit."""

    @property
    @abc.abstractmethod
    def eval_period_time_sec(self) -> int:
        """Seconds of training between evaluations in the official harness; see `eval_period_steps`."""

    @property
    @abc.abstractmethod
    def eval_period_steps(self) -> int:
        """Steps between evaluations in the embedded runner.

        Counted in steps and not in seconds, so that steps-to-target does not depend on the machine. Not part of
        AlgoPerf's interface.
        """

    @property
    @abc.abstractmethod
    def step_hint(self) -> int:
        """Steps the reference trains for; the horizon of schedules and the runner's default step limit."""

    # The model.

    @property
    def param_shapes(self) -> Tree:
        """The parameters' shapes, once `init_model_fn` was called."""
        if self._param_shapes is None:
            raise ValueError("param_shapes is known once init_model_fn was called")
        return self._param_shapes

    @property
    def model_params_types(self) -> Tree:
        """The parameters' types, once `init_model_fn` was called."""
        if self._param_types is None:
            raise ValueError("model_params_types is known once init_model_fn was called")
        return self._param_types

    @abc.abstractmethod
    def is_output_params(self, param_key: str) -> bool:
        """Whether a parameter belongs to the output layer: in PyTorch by its name, in JAX by its module's."""

    @abc.abstractmethod
    def init_model_fn(self, rng: Rng) -> tuple[Tree, Tree]:
        """The model's initial parameters and its model state, a function of `rng`."""

    def model_inputs(self, batch: Batch) -> tuple[Tree, ...]:
        """What the model is called with, before the dropout rate, of a batch: its "inputs", unless a workload says
        otherwise. Not part of AlgoPerf's interface.
        """
        return (batch["inputs"],)

    @abc.abstractmethod
    def model_fn(
        self,
        params: Tree,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: Tree,
        mode: ForwardPassMode,
        rng: Rng,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Tree, Tree]:
        """The logits of a batch and the new model state."""

    @abc.abstractmethod
    def loss_fn(
        self,
        label_batch: Tree,
        logits_batch: Tree,
        mask_batch: Tree = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tree]:
        """The masked loss of `loss_type`, differentiable and not synchronised across devices.

        Returns:
            'summed': a scalar, the sum over valid examples (in a language model: valid tokens).
            'n_valid_examples': a scalar, how many there are.
            'per_example': the loss of each, 0 where masked.
        """

    # Data and evaluation.

    @abc.abstractmethod
    def numpy_batch(self, data_rng: np.ndarray, split: str, index: int, batch_size: int) -> dict[str, Tree]:
        """Batch `index` of a split, a function of its arguments alone and the same for every framework.

        Args:
            split: 'train' (shuffled, endless), or 'eval_train', 'validation' or 'test' (in order, padded, with
                weights).

        Returns:
            "inputs", "targets" and, where some entries do not count, "weights", as AlgoPerf names them: arrays, or
            tuples, named tuples and dictionaries of arrays.
        """

    def metrics(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """The metrics of a split from what its batches gave.

        Args:
            batches: of each batch the "loss" summed over valid examples and their number "n_valid" (float64
                scalars), and what the workload's `evaluation_of` adds.

        Returns:
            The mean "loss", and for every other scalar its mean over valid examples; a workload with another
            metric adds it.
        """
        means = {key for batch in batches for key, value in batch.items() if np.ndim(value) == 0} - {"n_valid"}
        n_valid = sum(float(batch["n_valid"]) for batch in batches)
        return {key: sum(float(batch[key]) for batch in batches) / n_valid for key in sorted(means)}

    def _build_input_queue(
        self,
        data_rng: np.ndarray,
        split: str,
        data_dir: str,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> BatchQueue:
        """The endless queue of batches of a split."""
        del data_dir, cache, repeat_final_dataset, num_batches
        return BatchQueue(lambda index: self.numpy_batch(data_rng, split, index, global_batch_size))

    @abc.abstractmethod
    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: Tree,
        model_state: Tree,
        rng: Rng,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        """The metrics on one split."""

    def eval_model(
        self,
        global_batch_size: int,
        params: Tree,
        model_state: Tree,
        rng: Rng,
        data_dir: str,
        imagenet_v2_data_dir: str | None,
        global_step: int,
    ) -> dict[str, float]:
        """The metrics on all splits, as `train/<metric>`, `validation/<metric>`, `test/<metric>`."""
        del imagenet_v2_data_dir
        splits = {
            "train": ("eval_train", self.num_eval_train_examples),
            "validation": ("validation", self.num_validation_examples),
            "test": ("test", self.num_test_examples),
        }
        results: dict[str, float] = {}
        for prefix, (split, num_examples) in splits.items():
            metrics = self._eval_model_on_split(
                split, num_examples, global_batch_size, params, model_state, rng, data_dir, global_step
            )
            results |= {f"{prefix}/{name}": value for name, value in metrics.items()}
            if prefix != "train":
                results[f"{prefix}/num_examples"] = num_examples
        return results
