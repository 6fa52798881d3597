"""The JAX part of a workload: model set-up, forward pass, masked cross-entropy, batches and evaluation."""

from __future__ import annotations

import abc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from submissions.common.api import Batch, Rng, Tree
from submissions.common.spec import ForwardPassMode
from workloads.data.queue import BatchQueue
from workloads.jax import devices
from workloads.jax.parameter_types import parameter_shapes, parameter_types
from workloads.workload import Workload


class JaxWorkload(Workload):
    """A classifier of examples or of positions, to be combined with a framework-free workload.

    Parameters are nested dicts of arrays on all devices; the model state is None.
    """

    def __init__(self) -> None:
        super().__init__()
        self._model = self.build_model()
        self._init = jax.jit(self._model.init, static_argnames="train", out_shardings=devices.replicated())
        self._evaluate = jax.jit(self._evaluation_sums)

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The model, called as model(inputs, dropout_rate, train)."""

    def init_model_fn(self, rng: Rng) -> tuple[Tree, None]:
        inputs = self.numpy_batch(np.zeros(2, np.int32), "validation", 0, 1)["inputs"]
        params = self._init(_key(rng), _narrow(inputs), 0.0, train=False)["params"]
        self._param_shapes = parameter_shapes(params)
        self._param_types = parameter_types(params)
        return params, None

    def model_fn(
        self,
        params: Tree,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: None,
        mode: ForwardPassMode,
        rng: Rng,
        update_batch_norm: bool,
        dropout_rate: float | jax.Array = 0.0,
    ) -> tuple[jax.Array, None]:
        """Logits (N, classes), or (N, R, classes). `dropout_rate` may be traced."""
        del model_state, update_batch_norm
        train = mode == ForwardPassMode.TRAIN
        inputs = augmented_and_preprocessed_input_batch["inputs"]
        rngs = {"dropout": _key(rng)} if train else None
        logits: Tree = self._model.apply({"params": params}, inputs, dropout_rate, train=train, rngs=rngs)
        return logits, None

    def loss_fn(
        self,
        label_batch: jax.Array,
        logits_batch: jax.Array,
        mask_batch: jax.Array | None = None,
        label_smoothing: float | jax.Array = 0.0,
    ) -> dict[str, jax.Array]:
        """Softmax cross-entropy of labels (...), or distributions (..., C), with logits (..., C) and mask (...)."""
        labels = jnp.asarray(label_batch)
        if labels.ndim != logits_batch.ndim:
            labels = jax.nn.one_hot(labels, logits_batch.shape[-1], dtype=logits_batch.dtype)
        losses = optax.softmax_cross_entropy(logits_batch, optax.smooth_labels(labels, label_smoothing))
        if mask_batch is None:
            n_valid = jnp.full((), losses.size, losses.dtype)
        else:
            mask = jnp.asarray(mask_batch).astype(losses.dtype)
            losses = losses * mask
            n_valid = mask.sum()
        return {"summed": losses.sum(), "n_valid_examples": n_valid, "per_example": losses}

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

        def batch_at(index: int) -> dict[str, jax.Array]:
            batch = self.numpy_batch(data_rng, split, index, global_batch_size)
            return jax.device_put({key: _narrow(value) for key, value in batch.items()}, devices.sharded())

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
        """Means of loss and accuracy over the split."""
        del global_step
        queue = self._build_input_queue(rng, split, data_dir, global_batch_size)
        batches = range(-(-num_examples // global_batch_size))
        sums = [self._evaluate(params, model_state, next(queue)) for _ in batches]
        # The only wait for the device.
        total = np.asarray(jax.device_get(sums), dtype=np.float64).sum(axis=0)
        summed, correct, n_valid = (float(value) for value in total)
        return {"loss": summed / n_valid, "accuracy": correct / n_valid}

    def _evaluation_sums(self, params: Tree, model_state: None, batch: Batch) -> jax.Array:
        """Sums over a batch of the loss, of correct predictions and of valid examples: (3,)."""
        logits, _ = self.model_fn(params, batch, model_state, ForwardPassMode.EVAL, None, update_batch_norm=False)
        loss = self.loss_fn(batch["targets"], logits, batch["weights"])
        correct = ((logits.argmax(axis=-1) == batch["targets"]) * batch["weights"]).sum()
        return jnp.stack([loss["summed"], correct, loss["n_valid_examples"]])


def _key(rng: Rng) -> Rng:
    """The raw key JAX takes, of the runner's rng, an integer array of shape (2,); a typed key is handed on."""
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng.astype(np.uint32)


def _narrow(array: np.ndarray) -> np.ndarray:
    """64-bit integers as 32-bit ones, the widest JAX has by default."""
    return array.astype(np.int32) if array.dtype == np.int64 else array
