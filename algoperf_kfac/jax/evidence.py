"""What the evidence is made of in JAX: the curvature of a model over a data set, or of an optimizer's averages.

A pass over a loader takes the statistics that `KFAC` takes on a step, with the exact or sampled Fisher, and adds
their sums up, so that batches weigh as much as they have examples. Parameters without factors get the diagonal of
the same Fisher from the same backward passes, out of gradients of whole batches: with labels drawn from the model,
or with columns of the Fisher's root under a random sign for each example (which changes nothing in A and B),
gradients of different examples are uncorrelated and have mean zero, so that the square of their sum has the sum of
their squares as its mean. One example per batch makes it exact (with the exact Fisher); otherwise it is noisy, and
without bias.

Eigenvalues are computed on the host in float64, whatever precision JAX is set to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.evidence import DIAGONAL, KRONECKER, Block, Fitted, no_factors
from algoperf_kfac.fitting import (
    NO_DIAGONAL,
    UNCALLED,
    Example,
    Split,
    batches_of,
    check_examples,
    check_scale,
    check_targets,
    described,
    fitting_config,
    of_averages,
    split_batch,
)
from algoperf_kfac.jax import fisher
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.forward_pass import ForwardPass
from algoperf_kfac.jax.kinds import kind_of
from algoperf_kfac.jax.layer_book import CoveredLayer, Layers
from algoperf_kfac.jax.monitoring import factors
from algoperf_kfac.jax.optimizer import KFAC
from algoperf_kfac.jax.statistics import Gathered, Statistics, add
from algoperf_kfac.jax.tapped_model import TappedModel
from algoperf_kfac.jax.tracing import named_leaves, trace
from algoperf_kfac.jax.types import ApplyFn, LossTypeLike, Tree
from algoperf_kfac.losses import LossType
from algoperf_kfac.positions import BY_GRADIENT, PositionsLike, as_candidates

Positioned = PositionsLike | Mapping[str, PositionsLike]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenvalues a_i b_j of a block.

    Attributes:
        a: (groups, P_in), float64.
        b: (groups, P_out), float64.
    """

    a: np.ndarray
    b: np.ndarray

    def log_det(self, scale: float, delta: float) -> tuple[float, float]:
        """See `algoperf_kfac.evidence.Spectrum`."""
        h = scale * self.b[:, :, None] * self.a[:, None, :]
        shifted = h + delta
        return float(np.log(shifted).sum()), float((h / shifted).sum())


def fit_factors(
    apply_fn: ApplyFn,
    params: Tree,
    loader: Iterable[Any],
    loss_type: LossTypeLike,
    *,
    config: KFACConfig | None = None,
    split: Split | None = None,
    positions: Positioned | Callable[[Any], Positioned] | None = None,
    class_dim: int = -1,
    num_examples: float | None = None,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    **hyperparameters: object,
) -> Fitted:
    """The curvature of a model over a data set, for `evidence`.

    The model is to run as it does after training (`train=False`). With the exact Fisher a batch takes a backward
    pass per output of an example, with fisher="mc" `fisher_samples` of them. One program is compiled for each shape
    of batch, a smaller last one included.

    Args:
        apply_fn: function of (params, *args) to the outputs, one array.
        params: parameters.
        loader: batches, pytrees of arrays; of torch's tensors, too, as its DataLoader gives them.
        loss_type: see `algoperf_kfac.evidence.Likelihood`.
        config: a configuration, of which approximation, fisher, fisher_samples, max_factor_dim and large_factor
            count; keyword arguments override its fields. Without either, the exact Fisher.
        split: from a batch to (args, targets) or (args, targets, mask), args a tuple; default: `split_batch`.
        positions: as `value_grad_and_statistics` takes them, or a function of the batch (traced, as `split` is).
            Where there is a mask of labels, the default is "gradient": what no label that counts depends on does
            not count.
        class_dim: dimension of the outputs over classes; 1 for (N, C, H, W).
        num_examples: of the whole data set, where the loader has a part of it: everything is scaled up.
        exclude: as for `KFAC`; what is excluded gets the diagonal.
        seed: of label draws and signs.
        **hyperparameters: fields of `KFACConfig`.

    Raises:
        ValueError: for an empty loader, batches of different form, a loss without likelihood, the empirical Fisher,
            a model without a layer with factors, or naming a layer whose factors are not finite.
        MissingStatisticsError: naming layers whose output does not reach the loss.
    """
    kind, config = fitting_config(loss_type, config, hyperparameters)
    total: _Sums | None = None
    counts: list[_Counts] = []
    layers: Layers | None = None
    step: _Step | None = None
    for given in batches_of(loader):
        batch = jax.tree.map(_as_array, given)
        if layers is None or step is None:
            args = _example(batch, split).args
            layers = discover(apply_fn, params, *args, config=config, exclude=exclude)
            if not layers.covered:
                raise no_factors()
            step = jax.jit(_step_of(apply_fn, layers, config, kind, split, positions, class_dim))
        new, of_batch = step(params, batch, jax.random.fold_in(jax.random.key(seed), len(counts)))
        total = new if total is None else _added(total, new)
        counts.append(of_batch)
    assert layers is not None
    assert total is not None
    # On the host in float64: tokens may be more than float32 can count.
    whole = _Counts(*np.sum([[float(number) for number in one] for one in jax.device_get(counts)], 0))
    return _fitted(layers, params, kind, total, whole, num_examples, described(config, len(counts)))


class _Sums(NamedTuple):
    """What a pass gathers.

    Attributes:
        statistics: of the layers.
        diagonals: sums of squares of gradients, shapes of the parameters, by name of those without factors.
    """

    statistics: Gathered
    diagonals: dict[str, Array]


class _Counts(NamedTuple):
    """Numbers of a batch, or of a pass.

    Attributes:
        loss: summed over the labels that count.
        labels: how many these are.
        examples: how many examples have any.
    """

    loss: Array | float
    labels: Array | float
    examples: Array | float


_Step: TypeAlias = Callable[[Tree, Any, Array], tuple[_Sums, _Counts]]


def _added(first: _Sums, second: _Sums) -> _Sums:
    diagonals = {name: total + second.diagonals[name] for name, total in first.diagonals.items()}
    return _Sums(add(first.statistics, second.statistics), diagonals)


def _as_array(leaf: Any) -> Any:
    """A leaf of a batch as JAX takes it: what others call a tensor becomes an array."""
    if isinstance(leaf, Array | np.ndarray | np.generic) or not hasattr(leaf, "__array__"):
        array = leaf
    else:
        tensor = leaf.detach() if hasattr(leaf, "detach") else leaf  # torch's may require a gradient
        # A type that NumPy lacks.
        array = jnp.from_dlpack(tensor) if str(tensor.dtype) == "torch.bfloat16" else np.asarray(tensor)
    if isinstance(array, str | bytes) or (isinstance(array, np.ndarray) and array.dtype.kind in "OUS"):
        kind = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"a batch of the loader has a leaf of {kind}: make numbers of it, or leave it out")
    return array


def _example(batch: Any, split: Split | None) -> Example:
    return Example(*split(batch)) if split else split_batch(batch)


def _step_of(
    apply_fn: ApplyFn,
    layers: Layers,
    config: KFACConfig,
    kind: LossType,
    split: Split | None,
    positions: Positioned | Callable[[Any], Positioned] | None,
    class_dim: int,
) -> _Step:
    """The program of one batch: a function of (params, batch, key)."""

    def step(params: Tree, batch: Any, key: Array) -> tuple[_Sums, _Counts]:
        example = _example(batch, split)
        given = positions(batch) if callable(positions) else positions
        if given is None and example.mask is not None:
            given = BY_GRADIENT

        def losses(outputs: Tree) -> _Counts:
            return summed_loss(jnp.moveaxis(outputs, class_dim, -1), kind, example)

        tapped = TappedModel(trace(apply_fn, params, example.args), layers, as_candidates(given))
        forward = ForwardPass(tapped, params, example.args, lambda f: jnp.asarray(losses(f).loss), has_aux=False)
        of_labels, of_signs = jax.random.split(key)
        draws = fisher.cotangents(config, forward.outputs, forward.floats, kind, example.mask, of_labels, class_dim)
        # The exact Fisher is the sum over its columns, a sampled one the mean over the draws.
        scale = draws.passes**0.5 if config.fisher == "exact" else 1.0

        def gather(number: Array) -> dict[str, Any]:
            cotangent = draws.cotangent(number)
            if config.fisher == "exact":
                cotangent = [_signed(c, jax.random.fold_in(of_signs, number)) for c in cotangent]
            gradient, sums = forward.backward(cotangent)
            leaves = {name: jnp.asarray(leaf) for name, leaf in named_leaves(gradient).items()}
            squares = {name: jnp.square(scale * leaves[name].astype(_wide(leaves[name]))) for name in diagonal}
            return {"statistics": tapped.statistics(sums, scale), "diagonals": squares}

        diagonal = [f.name for f in layers.fallbacks if jnp.issubdtype(layers.shapes[f.name][1], jnp.inexact)]
        gathered: dict[str, Any] = {**fisher.sweep(draws.passes, gather)}
        tapped.check_reached()
        sums = _Sums(Gathered(gathered["statistics"], tapped.idle), gathered["diagonals"])
        return sums, losses(forward.outputs(forward.floats))

    return step


def _signed(column: Array, key: Array) -> Array:
    """A column of the root of the output Hessian under a random sign for each example."""
    signs = jax.random.rademacher(key, (column.shape[0],), column.dtype)
    return column * signs.reshape(-1, *[1] * (column.ndim - 1))


def summed_loss(outputs: Array, loss_type: LossType, example: Example) -> _Counts:
    """The loss over the labels that count, how many they are, and how many examples have any.

    Args:
        outputs: classes last.
        loss_type: of the loss.
        example: the batch.
    """
    if example.targets is None:
        raise ValueError("a batch of the loader has None for targets: the loss needs those of its examples")
    f, targets = outputs.astype(_wide(outputs)), jnp.asarray(example.targets)
    check_targets(loss_type, f.shape, targets.shape)
    if loss_type is LossType.SOFTMAX_CROSS_ENTROPY:
        if targets.ndim == f.ndim:
            losses = optax.softmax_cross_entropy(f, targets)
        else:
            if not jnp.issubdtype(targets.dtype, jnp.integer):
                raise ValueError(
                    f"targets of shape {targets.shape} are {targets.dtype.name}: numbers of classes are integers, "
                    f"and probabilities of classes have the outputs' shape {f.shape}"
                )
            losses = optax.softmax_cross_entropy_with_integer_labels(f, targets)
    elif loss_type is LossType.SIGMOID_CROSS_ENTROPY:
        losses = optax.sigmoid_binary_cross_entropy(f, targets.astype(f.dtype))
    else:
        distance = f - targets
        losses = jnp.abs(distance) if loss_type is LossType.MEAN_ABSOLUTE_ERROR else jnp.square(distance)
    mask = jnp.ones_like(losses) if example.mask is None else jnp.asarray(example.mask).astype(losses.dtype)
    mask = jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (losses.ndim - mask.ndim)), losses.shape)
    examples = (mask.reshape(mask.shape[0], -1) > 0).any(1).sum()
    return _Counts((losses * mask).sum(), mask.sum(), examples)


def _fitted(
    layers: Layers,
    params: Tree,
    kind: LossType,
    total: _Sums,
    counts: _Counts,
    num_examples: float | None,
    source: str,
) -> Fitted:
    """What a pass came to."""
    seen = float(counts.examples)
    check_examples(seen)
    share = 1.0 if num_examples is None else num_examples / seen
    leaves = named_leaves(params)
    blocks, left_out = [], {}
    for name, layer in layers.covered.items():
        if name not in total.statistics:
            left_out[layer.spec.load_name] = UNCALLED
            continue
        s = total.statistics[name]
        # Of scanned layers and experts each counts its own; where nothing was counted the curvature is zero.
        examples = np.broadcast_to(np.asarray(s.examples, np.float64), layer.spec.groups)
        blocks.append(_layer_block(layer, leaves, *_averages(s), examples * share))
    for f in layers.fallbacks:
        if f.name not in total.diagonals:
            left_out[f.name] = f.reason
            continue
        h = _wide_array(total.diagonals[f.name]).reshape(1, -1) * share
        _check_finite(f.name, [h])
        norm = float(np.square(_wide_array(leaves[f.name])).sum())
        blocks.append(Block(f.name, DIAGONAL, (f.name,), h.size, norm, Spectrum(h, np.ones((1, 1)))))
    return Fitted(
        loss_type=kind,
        blocks=tuple(blocks),
        summed_loss=float(counts.loss) * share,
        num_examples=seen * share,
        num_labels=float(counts.labels) * share,
        left_out=left_out,
        source=source,
    )


def _averages(s: Statistics) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A and B per example, (groups, size, size) per block; zero where nothing counted."""

    def mean(m: Array, count: Array) -> np.ndarray:
        counts = np.asarray(count, np.float64).reshape(-1, 1, 1)
        return _wide_array(m) / np.where(counts > 0, counts, 1)

    return [mean(m, s.a_count) for m in s.a], [mean(m, s.examples) for m in s.b]


def factors_of(
    optimizer: KFAC,
    state: Tree,
    params: Tree,
    loss_type: LossTypeLike,
    *,
    summed_loss: float,
    num_examples: float,
    num_labels: float | None = None,
) -> Fitted:
    """The curvature that an optimizer's moving averages show, for `evidence`; no pass over the data.

    Its Fisher is the optimizer's, the empirical one by default, as `source` says. A layer counts as seeing each
    example once (not so experts, and windows that cut examples up). Parameters without factors are left out.

    Args:
        optimizer: of which coverage and configuration are read.
        state: after its first statistics step.
        params: parameters.
        loss_type: see `algoperf_kfac.evidence.Likelihood`.
        summed_loss: over the data, as an epoch's running sum has it; see `Likelihood.log_likelihood`.
        num_examples: of the data.
        num_labels: that count in the loss; one for each example by default.

    Raises:
        RuntimeError: before the first statistics step.
        ValueError: see `fit_factors`.
    """
    kind = fitting_config(loss_type, None, {})[0]
    leaves, layers = named_leaves(params), optimizer.layers
    blocks = []
    for name, pair in factors(state, layers, reduction="mean").items():
        layer = layers.covered[name]
        a, b = (_blocks(factor) for factor in pair)
        blocks.append(_layer_block(layer, leaves, a, b, np.full(layer.spec.groups, float(num_examples))))
    return Fitted(
        loss_type=kind,
        blocks=tuple(blocks),
        summed_loss=summed_loss,
        num_examples=num_examples,
        num_labels=num_examples if num_labels is None else num_labels,
        left_out={f.name: NO_DIAGONAL for f in layers.fallbacks},
        source=of_averages(optimizer.config),
    )


def _layer_block(
    layer: CoveredLayer,
    leaves: Mapping[str, Any],
    a: list[np.ndarray],
    b: list[np.ndarray],
    examples: np.ndarray,
) -> Block:
    """A layer's block of the curvature.

    Args:
        layer: the layer.
        leaves: parameters by name.
        a, b: blocks of A and of B per example, (groups, size, size).
        examples: N, (groups,).
    """
    spec = layer.spec
    check_scale(spec, whole_in_a=kind_of(spec).product_in_a)
    _check_finite(spec.name, [*a, *b])
    in_values = examples[:, None] * _eigenvalues(a)
    out_values = _eigenvalues(b) if b else np.ones((spec.groups, spec.out_dim))
    matrix = _wide_array(layer.matrix(leaves[spec.weight], None if spec.bias is None else leaves[spec.bias]))
    names = (spec.weight,) if spec.bias is None else (spec.weight, spec.bias)
    norm = float(np.square(matrix).sum())
    return Block(spec.name, KRONECKER, names, spec.num_parameters, norm, Spectrum(in_values, out_values))


def _eigenvalues(blocks: list[np.ndarray]) -> np.ndarray:
    """(groups, P): of all diagonal blocks of a factor; what rounding made negative is zero."""
    return np.maximum(np.concatenate([np.linalg.eigvalsh(_wide_array(m)) for m in blocks], -1), 0)


def _blocks(factor: Array | tuple[Array, ...]) -> list[np.ndarray]:
    """A factor of `KFAC.factors` as blocks (groups, size, size)."""
    blocks = factor if isinstance(factor, tuple) else (factor,)
    return [_wide_array(m if m.ndim == 3 else m[None]) for m in blocks]


def _check_finite(name: str, arrays: Iterable[Any]) -> None:
    if not all(bool(np.isfinite(_wide_array(m)).all()) for m in arrays):
        raise ValueError(f"the curvature of {name} is not finite: look for the batch or step that is not finite")


def _wide_array(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)


def _wide(t: Array) -> jnp.dtype:
    return jnp.promote_types(t.dtype, jnp.float32)
