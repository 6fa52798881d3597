"""AlgoPerf's five losses in JAX: masked sums, how many entries count, and the loss of each."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from submissions.common.spec import LossType

Losses = dict[str, jax.Array]
"""'summed', a scalar; 'n_valid_examples', a scalar; 'per_example', 0 where masked."""


def softmax_cross_entropy(
    labels: jax.Array, logits: jax.Array, mask: jax.Array | None, label_smoothing: float | jax.Array
) -> Losses:
    """Of labels (...), or distributions (..., C), with logits (..., C) and mask (...)."""
    labels = jnp.asarray(labels)
    if labels.ndim != logits.ndim:
        labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return _masked(optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, label_smoothing)), mask)


def sigmoid_cross_entropy(
    labels: jax.Array, logits: jax.Array, mask: jax.Array | None, label_smoothing: float | jax.Array
) -> Losses:
    """Of labels in [0, 1], logits and mask, all of one shape: each entry is an example, as in AlgoPerf's ogbg."""
    smoothed = labels * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return _masked(optax.sigmoid_binary_cross_entropy(logits, smoothed), mask)


def mean_squared_error(
    labels: jax.Array, outputs: jax.Array, mask: jax.Array | None, label_smoothing: float | jax.Array
) -> Losses:
    """Of labels and outputs (N, ...) and mask (N,), the mean over an example's entries; no smoothing."""
    del label_smoothing
    return _masked(jnp.square(outputs - labels).mean(axis=range(1, outputs.ndim)), mask)


def mean_absolute_error(
    labels: jax.Array, outputs: jax.Array, mask: jax.Array | None, label_smoothing: float | jax.Array
) -> Losses:
    """Of labels and outputs (N, ...) and mask (N,), the mean over an example's entries; no smoothing."""
    del label_smoothing
    return _masked(jnp.abs(outputs - labels).mean(axis=range(1, outputs.ndim)), mask)


def ctc(
    labels: tuple[jax.Array, jax.Array],
    logits: tuple[jax.Array, jax.Array],
    mask: jax.Array | None,
    label_smoothing: float | jax.Array,
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
    lengths = (1 - symbol_paddings).sum(axis=1)
    losses = optax.ctc_loss(scores, score_paddings, symbols, symbol_paddings, blank_id=0)
    weights = jnp.ones_like(losses) if mask is None else mask.astype(losses.dtype)
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


def _masked(losses: jax.Array, mask: jax.Array | None) -> Losses:
    if mask is None:
        n_valid = jnp.full((), losses.size, losses.dtype)
    else:
        weights = jnp.asarray(mask).astype(losses.dtype)
        losses = losses * weights
        n_valid = weights.sum()
    return {"summed": losses.sum(), "n_valid_examples": n_valid, "per_example": losses}
