"""The PyTorch part of a workload: model set-up, forward pass, masked cross-entropy, batches and evaluation."""

from __future__ import annotations

import abc

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from submissions.common.api import Batch, Rng
from submissions.common.spec import ForwardPassMode
from workloads.data.queue import BatchQueue
from workloads.pytorch import devices
from workloads.pytorch.parameter_types import parameter_shapes, parameter_types
from workloads.workload import Workload


class PyTorchWorkload(Workload):
    """A classifier of examples or of positions, to be combined with a framework-free workload.

    The model state is None: what a model keeps beside parameters are its buffers.
    """

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, initialised from PyTorch's global generator; called as model(inputs, dropout_rate)."""

    def prepare_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """The inputs of a batch in the layout the model expects; as they are, unless a workload says otherwise."""
        return inputs

    def init_model_fn(self, rng: Rng) -> tuple[nn.Module, None]:
        torch.manual_seed(int(rng[0]))
        model = self.build_model()
        self._param_shapes = parameter_shapes(model)
        self._param_types = parameter_types(model)
        model.to(devices.device())
        if devices.world_size() > 1:
            ids = [devices.device().index] if torch.cuda.is_available() else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        return model, None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: None,
        mode: ForwardPassMode,
        rng: Rng,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[torch.Tensor, None]:
        """Logits (N, classes), or (N, R, classes). `rng` is not used: the runner seeds PyTorch at each step."""
        del model_state, rng, update_batch_norm
        training = mode == ForwardPassMode.TRAIN
        params.train(training)
        with torch.set_grad_enabled(training):
            return params(augmented_and_preprocessed_input_batch["inputs"], dropout_rate), None

    def loss_fn(
        self,
        label_batch: torch.Tensor,
        logits_batch: torch.Tensor,
        mask_batch: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Softmax cross-entropy of labels (...), or distributions (..., C), with logits (..., C) and mask (...)."""
        flat = logits_batch.flatten(0, -2)
        soft = label_batch.ndim == logits_batch.ndim
        labels = label_batch.flatten(0, -2) if soft else label_batch.flatten()
        losses = F.cross_entropy(flat, labels, reduction="none", label_smoothing=label_smoothing)
        losses = losses.view(logits_batch.shape[:-1])
        if mask_batch is None:
            n_valid = torch.full((), losses.numel(), device=losses.device, dtype=losses.dtype)
        else:
            mask = mask_batch.to(losses.dtype)
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
        """As the base class, as tensors on this process's device; under torchrun its share of each train batch."""
        del data_dir, cache, repeat_final_dataset, num_batches

        def batch_at(index: int) -> dict[str, torch.Tensor]:
            batch = self.numpy_batch(data_rng, split, index, global_batch_size)
            batch["inputs"] = self.prepare_inputs(batch["inputs"])
            if split == "train":
                share = global_batch_size // devices.world_size()
                mine = slice(devices.rank() * share, (devices.rank() + 1) * share)
                batch = {key: value[mine] for key, value in batch.items()}
            # torch.tensor copies into aligned memory; on NumPy's, BLAS may round differently from run to run.
            return {key: torch.tensor(value).to(devices.device()) for key, value in batch.items()}

        return BatchQueue(batch_at)

    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: nn.Module,
        model_state: None,
        rng: np.ndarray,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        """Means of loss and accuracy over the split. Under torchrun every process computes the same."""
        del global_step
        # Without the wrapper: evaluation is no collective operation.
        model = params.module if isinstance(params, nn.parallel.DistributedDataParallel) else params
        queue = self._build_input_queue(rng, split, data_dir, global_batch_size)
        sums = torch.zeros(3, dtype=torch.float64, device=devices.device())
        for _ in range(-(-num_examples // global_batch_size)):
            sums += self._evaluation_sums(model, next(queue), rng)
        summed, correct, n_valid = sums.tolist()  # the only wait for the device
        return {"loss": summed / n_valid, "accuracy": correct / n_valid}

    def _evaluation_sums(self, model: nn.Module, batch: Batch, rng: Rng) -> torch.Tensor:
        """Sums over a batch of the loss, of correct predictions and of valid examples: (3,)."""
        logits, _ = self.model_fn(model, batch, None, ForwardPassMode.EVAL, rng, update_batch_norm=False)
        loss = self.loss_fn(batch["targets"], logits, batch["weights"])
        correct = ((logits.argmax(dim=-1) == batch["targets"]) * batch["weights"]).sum()
        return torch.stack([loss["summed"], correct, loss["n_valid_examples"]])
