"""The part of a training step that does not depend on the optimizer, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from submissions.common.api import Batch, Rng, Tree, Workload
from submissions.common.logs import is_log_step
from submissions.common.spec import ForwardPassMode, LossType


class Capture(Protocol):
    """What gathers curvature while a forward and a backward pass run inside of it; KFAC.capture() gives one."""

    loss_normalizer: torch.Tensor | float | None

    def backward_fisher(
        self,
        outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        loss_type: Enum | str,
        mask: torch.Tensor | None,
        /,
    ) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """What a forward and backward pass gave; the gradients lie in `.grad`. Nothing here was waited for.

    Attributes:
        loss: mean over the valid examples of all devices, a detached scalar.
        n_valid: valid examples (in a language model: tokens) of all devices, a scalar.
        new_model_state: from model_fn.
    """

    loss: torch.Tensor
    n_valid: torch.Tensor
    new_model_state: Tree


def compute_gradient(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    model_state: Tree,
    rng: Rng,
    dropout_rate: float | None = None,
    label_smoothing: float = 0.0,
    context: AbstractContextManager[Capture] | None = None,
    loss_type: LossType | None = None,
    *,
    update_batch_norm: bool = True,
    may_be_empty: bool = False,
) -> StepResult:
    """One forward and backward pass in training mode: the gradient of the mean loss over all devices, in `.grad`.

    Args:
        dropout_rate: None for the workload's own.
        context: a K-FAC capture, entered around the forward and the backward pass; it is told the divisor of the
            summed loss, and makes its own backward passes where its Fisher needs them.
        loss_type: of the workload; needed with a context.
        update_batch_norm: whether running statistics take the batch in.
        may_be_empty: whether there may be no valid example, and then a loss of zero.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    dropout = {} if dropout_rate is None else {"dropout_rate": dropout_rate}
    with context if context is not None else nullcontext() as capture:
        logits, new_model_state = workload.model_fn(
            model,
            batch,
            model_state=model_state,
            mode=ForwardPassMode.TRAIN,
            rng=rng,
            update_batch_norm=update_batch_norm,
            **dropout,
        )
        losses = workload.loss_fn(
            batch["targets"],
            logits,
            mask_batch=batch.get("weights"),
            label_smoothing=label_smoothing,
        )
        n_valid = _summed_over_devices(torch.as_tensor(losses["n_valid_examples"]))
        if may_be_empty:
            n_valid = n_valid.clamp(min=1)
        if capture is not None:
            # What this process's gradients are scaled by, see below.
            capture.loss_normalizer = n_valid / _world_size()
            capture.backward_fisher(logits, loss_type or "", batch.get("weights"))
        # A language model's are gigabytes, which its backward pass does without.
        del logits
        # DistributedDataParallel averages gradients over devices, hence the factor; the sum over all devices is
        # divided by the count over all devices, so shards of unequal size weigh what they hold.
        (losses["summed"] * (_world_size() / n_valid)).backward()
    return StepResult(
        loss=_summed_over_devices(losses["summed"].detach()) / n_valid,
        n_valid=n_valid,
        new_model_state=new_model_state,
    )


def rehearse(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    model_state: Tree,
    rng: Rng,
    dropout_rate: float | None,
    context: AbstractContextManager[Capture],
) -> None:
    """A forward and backward pass that leaves nothing behind but what `context` saw.

    Args:
        batch: a part of one.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        compute_gradient(
            workload,
            model,
            batch,
            model_state,
            rng,
            dropout_rate,
            context=context,
            update_batch_norm=False,
            may_be_empty=True,
        )
    model.zero_grad(set_to_none=True)


def first_part(batch: Batch, parts: int) -> Batch | None:
    """The first of so many equal parts of a batch; None where examples are not rows of all of its tensors."""
    leaves = [leaf for leaf in tree_leaves(batch) if leaf is not None]
    sizes = {len(leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() else 0 for leaf in leaves}
    if len(sizes) != 1 or not (size := min(sizes)) or size % parts:
        return None
    return tree_map(lambda leaf: None if leaf is None else leaf[: size // parts], batch)


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float | None) -> None:
    """Scales all gradients so that their global norm is at most `max_norm`; None leaves them."""
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def log_step(workload: Workload, model: nn.Module, loss: torch.Tensor, global_step: int, **metrics: float) -> None:
    """Logs loss, gradient norm and other metrics every 100 steps, if the workload has a logger."""
    if workload.metrics_logger is None or not is_log_step(workload, global_step):
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # torch.nn.utils.get_total_norm needs torch 2.6.
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else torch.zeros(())
    row = {"loss": loss.item(), "grad_norm": norm.item(), **metrics}
    workload.metrics_logger.append_scalar_metrics(row, global_step)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _summed_over_devices(value: torch.Tensor) -> torch.Tensor:
    if _world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value
