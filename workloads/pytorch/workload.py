"""The PyTorch part of a workload: model set-up, forward pass, loss, batches and evaluation."""

from __future__ import annotations

import abc
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from submissions.common.api import Batch, Rng, Tree
from submissions.common.spec import ForwardPassMode, LossType
from workloads.data.queue import BatchQueue
from workloads.data.trees import map_arrays
from workloads.pytorch import batch_norm, devices
from workloads.pytorch.losses import LOSSES
from workloads.pytorch.parameter_types import parameter_shapes, parameter_types
from workloads.workload import Workload


class PyTorchWorkload(Workload):
    """A model and its loss, to be combined with a framework-free task.

    The model state is None: what a model keeps beside parameters are its buffers.
    """

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, initialised from PyTorch's global generator.

        It is called as model(*model_inputs(batch), dropout_rate).
        """

    def prepare_inputs(self, inputs: Tree) -> Tree:
        """The inputs of a batch in the layout the model expects; as they are, unless a workload says otherwise."""
        return inputs

    def share_of(self, batch: dict[str, Tree], rank: int, count: int) -> dict[str, Tree]:
        """One process's share of a training batch.

        Examples lie on the first axis, unless a workload says otherwise.

        Raises:
            UserError: where a workload's batch cannot be shared.
        """

        def mine(array: np.ndarray) -> np.ndarray:
            share = len(array) // count
            return array[rank * share : (rank + 1) * share]

        shared: dict[str, Tree] = map_arrays(mine, batch)
        return shared

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
    ) -> tuple[Tree, None]:
        """The model's outputs. `rng` is not used: the runner seeds PyTorch at each step."""
        del model_state, rng
        training = mode == ForwardPassMode.TRAIN
        params.train(training)
        frozen = training and not update_batch_norm
        with torch.set_grad_enabled(training), batch_norm.frozen(params) if frozen else nullcontext():
            return params(*self.model_inputs(augmented_and_preprocessed_input_batch), dropout_rate), None

    def loss_fn(
        self,
        label_batch: Tree,
        logits_batch: Tree,
        mask_batch: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """The loss of `loss_type`; for shapes see its function in `workloads.pytorch.losses`."""
        return LOSSES[self.loss_type](label_batch, logits_batch, mask_batch, label_smoothing)

    def evaluation_of(self, logits: Tree, batch: Batch) -> dict[str, torch.Tensor]:
        """What an evaluation needs of a batch beside its loss: scalars, to be averaged over valid examples, or
        arrays that the task's `metrics` makes something of.

        Without an override: under softmax cross-entropy the number of correct predictions as "accuracy".
        """
        if self.loss_type is not LossType.SOFTMAX_CROSS_ENTROPY:
            return {}
        return {"accuracy": ((logits.argmax(dim=-1) == batch["targets"]) * batch["weights"]).sum()}

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

        def batch_at(index: int) -> dict[str, Tree]:
            batch = self.numpy_batch(data_rng, split, index, global_batch_size)
            batch["inputs"] = self.prepare_inputs(batch["inputs"])
            if split == "train" and devices.world_size() > 1:
                batch = self.share_of(batch, devices.rank(), devices.world_size())
            # torch.tensor copies into aligned memory; on NumPy's, BLAS may round differently from run to run.
            moved: dict[str, Tree] = map_arrays(lambda value: torch.tensor(value).to(devices.device()), batch)
            return moved

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
        """The task's metrics of the split. Under torchrun every process computes the same."""
        del global_step
        # Without the wrapper: evaluation is no collective operation.
        model = params.module if isinstance(params, nn.parallel.DistributedDataParallel) else params
        queue = self._build_input_queue(rng, split, data_dir, global_batch_size)
        batches = [
            self._evaluated(model, next(queue), model_state, rng)
            for _ in range(-(-num_examples // global_batch_size))
        ]
        # The only wait for the device.
        return self.metrics([{key: value.cpu().numpy() for key, value in batch.items()} for batch in batches])

    def _evaluated(self, model: nn.Module, batch: Batch, model_state: None, rng: Rng) -> dict[str, torch.Tensor]:
        """Sums over a batch of the loss and of valid examples, in float64, and what `evaluation_of` adds."""
        logits, _ = self.model_fn(model, batch, model_state, ForwardPassMode.EVAL, rng, update_batch_norm=False)
        loss = self.loss_fn(batch["targets"], logits, batch["weights"])
        found = {"loss": loss["summed"], "n_valid": loss["n_valid_examples"], **self.evaluation_of(logits, batch)}
        return {key: value.double() if value.ndim == 0 else value for key, value in found.items()}
