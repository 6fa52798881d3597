"""The JAX part of a workload: model set-up, forward pass, loss, batches and evaluation."""

from __future__ import annotations

import abc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from submissions.common.api import Batch, Rng, Tree
from submissions.common.spec import ForwardPassMode, LossType
from workloads.data.queue import BatchQueue
from workloads.data.trees import map_arrays
from workloads.jax import devices
from workloads.jax.losses import LOSSES
from workloads.jax.parameter_types import parameter_shapes, parameter_types
from workloads.workload import Workload


class JaxWorkload(Workload):
    """A model and its loss, to be combined with a framework-free task.

    Parameters are nested dicts of arrays on all devices. The model state holds the other collections of Flax
    variables, such as {"batch_stats": ...}; None where there are none.

    Attributes:
        init_batch_size: examples that the model is initialised on.
    """

    init_batch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self._model = self.build_model()
        self._init = jax.jit(self._model.init, static_argnames="train", out_shardings=devices.replicated())
        self._evaluate = jax.jit(self._evaluated)

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The model, called as model(*model_inputs(batch), dropout_rate, train)."""

    def init_model_fn(self, rng: Rng) -> tuple[Tree, Tree]:
        batch = map_arrays(_narrow, self.numpy_batch(np.zeros(2, np.int32), "validation", 0, self.init_batch_size))
        variables = dict(self._init(_key(rng), *self.model_inputs(batch), 0.0, train=False))
        params = variables.pop("params")
        self._param_shapes = parameter_shapes(params)
        self._param_types = parameter_types(params)
        return params, variables or None

    def model_fn(
        self,
        params: Tree,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: Tree,
        mode: ForwardPassMode,
        rng: Rng,
        update_batch_norm: bool,
        dropout_rate: float | jax.Array = 0.0,
    ) -> tuple[Tree, Tree]:
        """The model's outputs and the new model state. `dropout_rate` may be traced."""
        train = mode == ForwardPassMode.TRAIN
        inputs = self.model_inputs(augmented_and_preprocessed_input_batch)
        rngs = {"dropout": _key(rng)} if train else None
        variables = {"params": params, **(model_state or {})}
        if not (train and model_state):
            return self._model.apply(variables, *inputs, dropout_rate, train=train, rngs=rngs), model_state
        logits, new_state = self._model.apply(
            variables, *inputs, dropout_rate, train=train, rngs=rngs, mutable=list(model_state)
        )
        return logits, new_state if update_batch_norm else model_state

    def loss_fn(
        self,
        label_batch: Tree,
        logits_batch: Tree,
        mask_batch: jax.Array | None = None,
        label_smoothing: float | jax.Array = 0.0,
    ) -> dict[str, jax.Array]:
        """The loss of `loss_type`; for shapes see its function in `workloads.jax.losses`."""
        return LOSSES[self.loss_type](label_batch, logits_batch, mask_batch, label_smoothing)

    def evaluation_of(self, logits: Tree, batch: Batch) -> dict[str, jax.Array]:
        """What an evaluation needs of a batch beside its loss: scalars, to be averaged over valid examples, or
        arrays that the task's `metrics` makes something of.

        Without an override: under softmax cross-entropy the number of correct predictions as "accuracy".
        """
        if self.loss_type is not LossType.SOFTMAX_CROSS_ENTROPY:
            return {}
        return {"accuracy": ((logits.argmax(axis=-1) == batch["targets"]) * batch["weights"]).sum()}

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
        """As the base class, as global arrays, sharded over all devices on the first axis."""
        del data_dir, cache, repeat_final_dataset, num_batches

        def batch_at(index: int) -> dict[str, Tree]:
            batch = map_arrays(_narrow, self.numpy_batch(data_rng, split, index, global_batch_size))
            moved: dict[str, Tree] = jax.device_put(batch, devices.sharded())
            return moved

        return BatchQueue(batch_at)

    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: Tree,
        model_state: None,
        rng: np.ndarray,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        """The task's metrics of the split."""
        del global_step
        queue = self._build_input_queue(rng, split, data_dir, global_batch_size)
        count = -(-num_examples // global_batch_size)
        batches = [self._evaluate(params, model_state, next(queue)) for _ in range(count)]
        # The only wait for the device.
        fetched = jax.device_get(batches)
        return self.metrics([{key: np.asarray(value) for key, value in batch.items()} for batch in fetched])

    def _evaluated(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Sums over a batch of the loss and of valid examples, and what `evaluation_of` adds."""
        logits, _ = self.model_fn(params, batch, model_state, ForwardPassMode.EVAL, None, update_batch_norm=False)
        loss = self.loss_fn(batch["targets"], logits, batch["weights"])
        return {"loss": loss["summed"], "n_valid": loss["n_valid_examples"], **self.evaluation_of(logits, batch)}


def _key(rng: Rng) -> Rng:
    """The raw key JAX takes, of the runner's rng, an integer array of shape (2,); a typed key is handed on."""
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng.astype(np.uint32)


def _narrow(array: np.ndarray) -> np.ndarray:
    """64-bit integers as 32-bit ones, the widest JAX has by default."""
    return array.astype(np.int32) if array.dtype == np.int64 else array
