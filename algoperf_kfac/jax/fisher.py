"""Whose output gradients make B: cotangents of the outputs that are draws from, or columns of, the Fisher.

For a negative log-likelihood -log p(y | f) the Fisher of the outputs is L = E_y[grad grad^T], y drawn from the
model. "mc" draws y (Monte Carlo Fisher); "exact" goes through the columns of a root of L (type-2, exact for these
losses because Fisher and Gauss-Newton matrix agree).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import statistics
from algoperf_kfac.jax.statistics import Statistics
from algoperf_kfac.jax.types import LossTypeLike, Tree
from algoperf_kfac.losses import LossType, loss_type_of

# One backward pass per output of an example: beyond this, "exact" is a mistake rather than a choice.
MAX_EXACT_OUTPUTS = 512

Outputs: TypeAlias = Array | tuple[Array, Array]
"""What a model returns; for CTC the pair of logits and paddings."""


class Cotangents(NamedTuple):
    """The backward passes of a Fisher.

    Attributes:
        passes: how many.
        cotangent: from the number of a pass to the cotangents of the outputs' floating leaves in it.
    """

    passes: int
    cotangent: Callable[[Array], list[Array]]


def cotangents(
    config: KFACConfig,
    outputs: Callable[[list[Array]], Tree],
    floats: list[Array],
    loss_type: LossTypeLike,
    mask: Array | None,
    rng: Array | None,
    class_dim: int = -1,
) -> Cotangents:
    """The backward passes that a Fisher takes.

    Args:
        config: with fisher "mc" or "exact".
        outputs: from the floating leaves of the model's outputs to the outputs.
        floats: those leaves.
        loss_type: see `sampled_loss`.
        mask: 1 where an output counts; shape of the labels or of its first dimensions.
        rng: a key, for "mc".
        class_dim: dimension of the logits over classes; 1 for (N, C, H, W).

    Raises:
        ValueError: without a key for "mc"; for "exact" with CTC or too many outputs per example.
    """
    kind = loss_type_of(loss_type)
    if kind is not LossType.CTC_LOSS:
        outputs = _classes_last(_single(outputs, floats), class_dim)
    if config.fisher == "mc":
        if rng is None:
            raise ValueError("fisher='mc' draws labels: pass rng=, a key of its own at each step")

        def draw(number: Array) -> list[Array]:
            key = jax.random.fold_in(rng, number)
            return jax.grad(lambda f: sampled_loss(outputs(f), kind, mask, key))(floats)

        return Cotangents(config.fisher_samples, draw)
    count, column = exact_columns(outputs(floats), kind, mask)
    return Cotangents(count, lambda number: jax.vjp(outputs, floats)[1](column(number))[0])


def _single(outputs: Callable[[list[Array]], Tree], floats: list[Array]) -> Callable[[list[Array]], Array]:
    """The outputs as one array: what the model returns, or the one of its arrays that the loss reads.

    Raises:
        ValueError: the loss reads several.
    """
    if isinstance(jax.eval_shape(outputs, floats), jax.ShapeDtypeStruct):
        return outputs
    if len(floats) == 1:
        return lambda floats: floats[0]
    raise ValueError(
        f"the loss reads {len(floats)} arrays of the model's outputs, and the exact or sampled Fisher is that of "
        "one: let apply_fn return the logits alone (the rest with has_aux=True), or take fisher='empirical'"
    )


def _classes_last(outputs: Callable[[list[Array]], Array], class_dim: int) -> Callable[[list[Array]], Array]:
    """The outputs with their dimension over classes last."""
    return outputs if class_dim == -1 else lambda floats: jnp.moveaxis(outputs(floats), class_dim, -1)


def sweep(count: int, gather: Callable[[Array], dict[str, Statistics]]) -> dict[str, Statistics]:
    """The mean of the statistics of several backward passes over the same batch, one after the other."""
    first = gather(jnp.zeros((), jnp.int32))
    if count == 1:
        return first

    def step(total: dict[str, Statistics], number: Array) -> tuple[dict[str, Statistics], None]:
        new = gather(number)
        return {name: statistics.add(total[name], new[name]) for name in total}, None

    total = lax.scan(step, first, jnp.arange(1, count, dtype=jnp.int32))[0]
    # The mean of the counts too: the batch has no more examples for being gone through several times.
    return jax.tree.map(lambda t: t / count, total)


def sampled_loss(outputs: Outputs, loss_type: LossTypeLike, mask: Array | None, rng: Array) -> Array:
    """The summed loss against labels drawn from the model's own predictive distribution.

    Args:
        outputs: logits (N, ..., C) for softmax cross-entropy; (N, ...) otherwise; for CTC the pair of logits
            (N, T, C), blank 0, and paddings (N, T) with 1 where a frame is padding.
        loss_type: squared error is sum (f - y)^2, the density of y then N(f, 1/2); absolute error is
            sum |f - y|, the density a Laplace distribution of scale 1.
        mask: 1 where an output counts; shape of the labels or of its first dimensions.
        rng: a key.

    Returns:
        A scalar whose gradient has the Fisher as second moment, examples independent.
    """
    kind = loss_type_of(loss_type)
    if kind is LossType.CTC_LOSS:
        logits, paddings = outputs
        return _sampled_ctc(logits, paddings, mask, rng)
    assert isinstance(outputs, Array)
    f = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    fixed = lax.stop_gradient(f)
    if kind is LossType.SOFTMAX_CROSS_ENTROPY:
        labels = jax.random.categorical(rng, fixed)
        per_label = optax.softmax_cross_entropy_with_integer_labels(f, labels)
    elif kind is LossType.SIGMOID_CROSS_ENTROPY:
        labels = jax.random.bernoulli(rng, jax.nn.sigmoid(fixed)).astype(f.dtype)
        per_label = optax.sigmoid_binary_cross_entropy(f, labels)
    elif kind is LossType.MEAN_SQUARED_ERROR:
        per_label = (f - fixed - math.sqrt(0.5) * jax.random.normal(rng, f.shape, f.dtype)) ** 2
    else:
        # The gradient of |f - y| is a fair sign, whatever y; at the value itself |x| has none.
        per_label = (f - fixed) * jax.random.rademacher(rng, f.shape, f.dtype)
    return _masked(per_label, mask).sum()


def exact_columns(
    outputs: Outputs, loss_type: LossType, mask: Array | None
) -> tuple[int, Callable[[Array], Array]]:
    """How many outputs an example has, and for each the column of a root of the output Hessian.

    Dimension 0 of `outputs` runs over examples: outputs packed over the nodes of several graphs would mix those of
    one example, and need `sampled_loss`.

    Raises:
        ValueError: for CTC, whose output Hessian has no small root, and for too many outputs per example.
    """
    if loss_type is LossType.CTC_LOSS or not isinstance(outputs, Array):
        raise ValueError("fisher='exact' is not available for CTC: use fisher='mc'")
    count = math.prod(outputs.shape[1:])
    if count > MAX_EXACT_OUTPUTS:
        raise ValueError(
            f"fisher='exact' needs a backward pass for each of {count} outputs of an example, more than "
            f"{MAX_EXACT_OUTPUTS}: use fisher='mc'"
        )
    f = outputs
    if loss_type is LossType.SOFTMAX_CROSS_ENTROPY:
        # diag(p) - p p^T = S S^T with S = diag(sqrt p) - p sqrt(p)^T.
        classes = f.shape[-1]
        p = jax.nn.softmax(f).reshape(f.shape[0], -1, classes)

        def column(number: Array) -> Array:
            place, j = number // classes, number % classes
            here = lax.dynamic_index_in_dim(p, place, 1, keepdims=False)
            root = jnp.sqrt(lax.dynamic_index_in_dim(here, j, 1))
            direction = root * (jax.nn.one_hot(j, classes, dtype=f.dtype) - here)
            whole = jnp.zeros_like(p).at[:, place].set(direction)
            return _masked(whole.reshape(f.shape), mask)

        return count, column
    if loss_type is LossType.SIGMOID_CROSS_ENTROPY:
        scale = jnp.sqrt(jax.nn.sigmoid(f) * jax.nn.sigmoid(-f))
    elif loss_type is LossType.MEAN_SQUARED_ERROR:
        scale = jnp.full_like(f, math.sqrt(2.0))
    else:
        scale = jnp.ones_like(f)
    scale = _masked(scale, mask).reshape(f.shape[0], -1)
    return count, lambda number: (scale * jax.nn.one_hot(number, count, dtype=f.dtype)).reshape(f.shape)


def _masked(values: Array, mask: Array | None) -> Array:
    """Multiply by a mask that has the first dimensions of `values`."""
    if mask is None:
        return values
    return values * mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim)).astype(values.dtype)


def _sampled_ctc(logits: Array, paddings: Array, mask: Array | None, rng: Array) -> Array:
    """CTC against label sequences drawn by sampling an alignment frame by frame and collapsing it."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    n, frames = logits.shape[:2]
    path = jax.random.categorical(rng, lax.stop_gradient(logits))
    previous = jnp.pad(path[:, :-1], ((0, 0), (1, 0)))  # blank before the first frame
    keep = (path != previous) & (path != 0) & (paddings == 0)
    # Kept labels move to the front; the others land in a last column that is cut off.
    places = jnp.where(keep, keep.cumsum(1) - 1, frames)
    rows = jnp.arange(n)[:, None]
    labels = jnp.zeros((n, frames + 1), path.dtype).at[rows, places].set(path)[:, :-1]
    label_paddings = (jnp.arange(frames) >= keep.sum(1, keepdims=True)).astype(logits.dtype)
    per_example = optax.ctc_loss(logits, paddings, labels, label_paddings)
    return _masked(per_example, mask).sum()
