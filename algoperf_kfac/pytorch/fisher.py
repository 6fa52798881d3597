"""Whose output gradients make B: pseudo-losses whose gradients are draws from, or columns of, the Fisher.

For a negative log-likelihood -log p(y | f) the Fisher of the outputs is L = E_y[grad grad^T], y drawn from the
model. `sampled_loss` draws y (Monte Carlo Fisher); `exact_losses` goes through the columns of a root of L
(type-2, exact for these losses because Fisher and Gauss-Newton matrix agree).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.losses import LossType, loss_type_of

# One backward pass per output of an example: beyond this, "exact" is a mistake rather than a choice.
MAX_EXACT_OUTPUTS = 512


def sampled_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    loss_type: enum.Enum | str,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The summed loss against labels drawn from the model's own predictive distribution.

    Args:
        outputs: logits (N, ..., C) for softmax cross-entropy; (N, ...) otherwise; for CTC the pair of logits
            (N, T, C), blank 0, and paddings (N, T) with 1 where a frame is padding.
        loss_type: squared error is sum (f - y)^2, the density of y then N(f, 1/2); absolute error is
            sum |f - y|, the density a Laplace distribution of scale 1.
        mask: 1 where an output counts; shape of the labels or of its first dimensions.
        generator: source of the draws.

    Returns:
        A scalar whose gradient has the Fisher as second moment, examples independent.
    """
    kind = loss_type_of(loss_type)
    if kind is LossType.CTC_LOSS:
        logits, paddings = outputs
        return _sampled_ctc(logits, paddings, mask, generator)
    assert isinstance(outputs, Tensor)
    f = outputs if outputs.dtype == torch.float64 else outputs.float()
    with torch.no_grad():
        if kind is LossType.SOFTMAX_CROSS_ENTROPY:
            probabilities = f.softmax(-1).reshape(-1, f.shape[-1])
            labels = torch.multinomial(probabilities, 1, generator=generator).reshape(f.shape[:-1])
        elif kind is LossType.SIGMOID_CROSS_ENTROPY:
            labels = torch.bernoulli(f.sigmoid(), generator=generator)
        else:
            noise = torch.empty_like(f)
            if kind is LossType.MEAN_SQUARED_ERROR:
                labels = f + noise.normal_(0.0, math.sqrt(0.5), generator=generator)
            else:
                labels = f + noise.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    if kind is LossType.SOFTMAX_CROSS_ENTROPY:
        per_label = F.cross_entropy(f.movedim(-1, 1) if f.dim() > 1 else f, labels, reduction="none")
    elif kind is LossType.SIGMOID_CROSS_ENTROPY:
        per_label = F.binary_cross_entropy_with_logits(f, labels, reduction="none")
    elif kind is LossType.MEAN_SQUARED_ERROR:
        per_label = (f - labels) ** 2
    else:
        per_label = (f - labels).abs()
    return _masked(per_label, mask).sum()


def classes_last(
    outputs: Tensor | tuple[Tensor, Tensor], loss_type: enum.Enum | str, class_dim: int
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits with their dimension over classes last.

    Raises:
        ValueError: for several outputs where the loss takes one.
    """
    is_ctc = loss_type_of(loss_type) is LossType.CTC_LOSS
    if isinstance(outputs, Tensor):
        return outputs.movedim(class_dim, -1)
    is_sequence = isinstance(outputs, tuple | list)
    if not (is_ctc and is_sequence and len(outputs) == 2):
        number = f" of {len(outputs)}" if is_sequence else ""
        raise ValueError(
            f"outputs are a {type(outputs).__name__}{number}: a loss takes one tensor, and only CTC takes a pair "
            "(logits, paddings). Of an object give the logits; for a model with several heads call backward_fisher "
            "once for each. fit_factors takes a module that returns the logits of one"
        )
    return outputs


def exact_losses(
    outputs: Tensor | tuple[Tensor, Tensor], loss_type: enum.Enum | str, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """One scalar per output of an example; the gradients' outer products sum to the Fisher exactly.

    Dimension 0 of `outputs` runs over examples: outputs packed over the nodes of several graphs would mix those of
    one example, and need `sampled_loss`.

    Raises:
        ValueError: for CTC, whose output Hessian has no small root, and for too many outputs per example.
    """
    kind = loss_type_of(loss_type)
    if kind is LossType.CTC_LOSS or not isinstance(outputs, Tensor):
        raise ValueError("fisher='exact' is not available for CTC: use fisher='mc'")
    count = math.prod(outputs.shape[1:])
    if count > MAX_EXACT_OUTPUTS:
        raise ValueError(
            f"fisher='exact' needs a backward pass for each of {count} outputs of an example, more than "
            f"{MAX_EXACT_OUTPUTS}: use fisher='mc'"
        )
    f = outputs.detach()
    if kind is LossType.SOFTMAX_CROSS_ENTROPY:
        # diag(p) - p p^T = S S^T with S = diag(sqrt p) - p sqrt(p)^T.
        p = f.softmax(-1)
        root = torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
        classes = f.shape[-1]
        places = math.prod(f.shape[1:-1])
        weights = root.reshape(len(f), places, classes, classes)
        for place in range(places):
            for column in range(classes):
                direction = torch.zeros_like(weights[..., 0])
                direction[:, place] = weights[:, place, :, column]
                yield (_masked(direction.reshape(f.shape), mask) * outputs).sum()
        return
    if kind is LossType.SIGMOID_CROSS_ENTROPY:
        scale = (f.sigmoid() * (-f).sigmoid()).sqrt()
    elif kind is LossType.MEAN_SQUARED_ERROR:
        scale = torch.full_like(f, math.sqrt(2.0))
    else:
        scale = torch.ones_like(f)
    scale = _masked(scale, mask).reshape(len(f), -1)
    flat = outputs.reshape(len(f), -1)
    for column in range(count):
        yield (scale[:, column] * flat[:, column]).sum()


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply by a mask that has the first dimensions of `values`."""
    if mask is None:
        return values
    return values * mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())).to(values.dtype)


def _sampled_ctc(
    logits: Tensor, paddings: Tensor, mask: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """CTC against label sequences drawn by sampling an alignment frame by frame and collapsing it."""
    log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    n, frames, classes = log_probs.shape
    with torch.no_grad():
        path = torch.multinomial(log_probs.exp().reshape(-1, classes), 1, generator=generator)
        path = path.reshape(n, frames)
        previous = F.pad(path[:, :-1], (1, 0))  # blank before the first frame
        keep = (path != previous) & (path != 0) & (paddings == 0)
        lengths = keep.sum(1)
        # Kept labels move to the front; the others land in a last column that is cut off.
        places = torch.where(keep, keep.cumsum(1) - 1, frames)
        labels = path.new_zeros(n, frames + 1).scatter_(1, places, path)[:, :-1]
        input_lengths = (paddings == 0).sum(1)
    per_example = F.ctc_loss(log_probs.transpose(0, 1), labels, input_lengths, lengths, blank=0, reduction="none")
    return _masked(per_example, mask).sum()
