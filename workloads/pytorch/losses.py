"""AlgoPerf's five losses in PyTorch: masked sums, how many entries count, and the loss of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from submissions.common.spec import LossType

Losses = dict[str, torch.Tensor]
"""'summed', a scalar; 'n_valid_examples', a scalar; 'per_example', 0 where masked."""


def softmax_cross_entropy(
    labels: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor | None, label_smoothing: float
) -> Losses:
    """Of labels (...), or distributions (..., C), with logits (..., C) and mask (...)."""
    flat = logits.flatten(0, -2)
    soft = labels.ndim == logits.ndim
    losses = F.cross_entropy(
        flat,
        labels.flatten(0, -2) if soft else labels.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return _masked(losses.view(logits.shape[:-1]), mask)


def sigmoid_cross_entropy(
    labels: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor | None, label_smoothing: float
) -> Losses:
    """Of labels in [0, 1], logits and mask, all of one shape: each entry is an example, as in AlgoPerf's ogbg."""
    smoothed = labels * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return _masked(F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none"), mask)


def mean_squared_error(
    labels: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor | None, label_smoothing: float
) -> Losses:
    """Of labels and outputs (N, ...) and mask (N,), the mean over an example's entries; no smoothing."""
    del label_smoothing
    return _masked((outputs - labels).square().flatten(1).mean(dim=1), mask)


def mean_absolute_error(
    labels: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor | None, label_smoothing: float
) -> Losses:
    """Of labels and outputs (N, ...) and mask (N,), the mean over an example's entries; no smoothing."""
    del label_smoothing
    return _masked((outputs - labels).abs().flatten(1).mean(dim=1), mask)


def ctc(
    labels: tuple[torch.Tensor, torch.Tensor],
    logits: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    label_smoothing: float,
) -> Losses:
    """Connectionist temporal classification, blank 0; what counts are the labels, as in AlgoPerf's librispeech.

    Args:
        labels: (N, L) and their paddings (N, L), 1 where there is none.
        logits: (N, T, C) and their paddings (N, T).
        mask: (N,) or None.
        label_smoothing: not used.
    """
    del label_smoothing
    (symbols, symbol_paddings), (scores, score_paddings) = labels, logits
    lengths = (1 - symbol_paddings).sum(dim=1)
    losses = F.ctc_loss(
        scores.log_softmax(dim=-1).transpose(0, 1),
        symbols.long(),
        (1 - score_paddings).sum(dim=1).long(),
        lengths.long(),
        reduction="none",
    )
    weights = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    losses = losses * weights
    n_valid = (lengths * weights).sum()
    return {"summed": losses.sum(), "n_valid_examples": n_valid, "per_example": losses}


LOSSES: dict[LossType, Callable[..., Losses]] = {
    LossType.SOFTMAX_CROSS_ENTROPY: softmax_cross_entropy,
    LossType.SIGMOID_CROSS_ENTROPY: sigmoid_cross_entropy,
    LossType.MEAN_SQUARED_ERROR: mean_squared_error,
    LossType.MEAN_ABSOLUTE_ERROR: mean_absolute_error,
    LossType.CTC_LOSS: ctc,
}


def _masked(losses: torch.Tensor, mask: torch.Tensor | None) -> Losses:
    if mask is None:
        n_valid = torch.full((), losses.numel(), device=losses.device, dtype=losses.dtype)
    else:
        weights = mask.to(losses.dtype)
        losses = losses * weights
        n_valid = weights.sum()
    return {"summed": losses.sum(), "n_valid_examples": n_valid, "per_example": losses}
