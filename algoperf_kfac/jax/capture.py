"""Capture: gradient and curvature statistics of one batch from one forward and one backward pass.

The model is not edited: it is traced to JAX's primitives and evaluated again with a tap behind every weighted
operation of the covered layers (see `interpreter.py`, `statistics.py`). In order: `trace` gives the program,
`TappedModel` fits positions to every call in it, `ForwardPass` runs it with taps, and its backward pass collects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import check_loss_normalizer, check_loss_normalizer_array
from algoperf_kfac.jax import fisher
from algoperf_kfac.jax.checks import Checks, Compared, compare, in_short, is_known
from algoperf_kfac.jax.forward_pass import ForwardPass
from algoperf_kfac.jax.kinds import kind_of
from algoperf_kfac.jax.layer_book import Layers, check_params
from algoperf_kfac.jax.mistakes import Mistakes
from algoperf_kfac.jax.promotion import with_promotion
from algoperf_kfac.jax.readings import called_layers
from algoperf_kfac.jax.statistics import Gathered, Product
from algoperf_kfac.jax.tapped_model import TappedModel
from algoperf_kfac.jax.tracing import arrays_of, is_array, trace
from algoperf_kfac.jax.trained import put_back, trained
from algoperf_kfac.jax.types import ApplyFn, LossFn, LossTypeLike, Tree
from algoperf_kfac.positions import PositionsLike, as_candidates

ValueGradAndStatistics: TypeAlias = Callable[..., tuple[Tree, Tree, Gathered]]
"""What `value_grad_and_statistics` returns."""


def value_grad_and_statistics(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    layers: Layers,
    config: KFACConfig,
    *,
    has_aux: bool = False,
    loss_type: LossTypeLike | None = None,
    class_dim: int = -1,
    mistakes: Mistakes | None = None,
) -> ValueGradAndStatistics:
    """Like `jax.value_and_grad`, with the statistics of every covered layer.

    Args:
        apply_fn: function of (params, *args) to the model's outputs, or to (outputs, aux) with `has_aux`.
        loss_fn: function of (outputs, *args) to a scalar, the loss averaged over examples; or to a mapping with
            "summed" and "n_valid_examples", as AlgoPerf's loss functions return, whose quotient is the loss.
        layers: from `discover`.
        config: the configuration; `fisher` says whose output gradients make B.
        has_aux: see `apply_fn`.
        loss_type: see `losses.LossType`; needed for fisher="mc" and "exact".
        class_dim: dimension of the outputs over classes, for these; 1 for (N, C, H, W).
        mistakes: what warnings were given so far, if others share them.

    Returns:
        A function of (params, *args, positions=None, loss_normalizer=None, rng=None, loss_mask=None) to
        (loss, gradient, statistics), the loss being (loss, aux) with `has_aux`, and the statistics those of the
        layers that were called, which know the names of the others. `positions` says which positions
        count and to which example they belong: a mask, "gradient", a `Positions`, a sequence of them of which a
        layer takes the first that fits, or a mapping from patterns of layer names to one of those.
        `loss_normalizer` is what the summed loss was divided by, by default the "n_valid_examples" of a mapping or
        else the number of examples, as the layer sees them that is the first to read data. `rng` is the key for
        fisher="mc", `loss_mask` the mask of its labels.

    Raises:
        MissingStatisticsError: (the function) naming layers whose output does not reach the loss, or that ten
            traces did not call; or if none is called.
        TypeError: (the function) for a `loss_normalizer` that is no number.
        ValueError: (the function) for parameters that are not those of `layers`, positions that do not fit, or a
            `loss_normalizer` that is no single number above 0, as far as that is known without asking a device.
    """
    if config.fisher != "empirical" and loss_type is None:
        raise ValueError(f"fisher={config.fisher!r} needs loss_type, e.g. loss_type='softmax_cross_entropy'")

    said = mistakes or Mistakes()

    @with_promotion
    def run(
        params: Tree,
        *args: Tree,
        positions: PositionsLike | Mapping[str, PositionsLike] | None = None,
        loss_normalizer: Array | float | None = None,
        rng: Array | None = None,
        loss_mask: Array | None = None,
        **named: Tree,
    ) -> tuple[Tree, Tree, Gathered]:
        if named:
            raise TypeError(f"{next(iter(named))}=: arguments of apply_fn are given by position, after params")
        _check_loss_normalizer(loss_normalizer)
        check_params(layers, params)
        model = trace(apply_fn, params, args, has_aux=has_aux)
        # Within a program nothing can be looked at: there `check_gradients` does it, when it is asked.
        wanted = not said.checked and config.fisher == "empirical" and is_known((params, args))
        checks = Checks(kind_of) if wanted else None
        tapped = TappedModel(model, layers, as_candidates(positions), checks, config.row_limit)
        said.statistics()
        forward = ForwardPass(tapped, params, args, lambda outputs: loss_fn(outputs, *args), has_aux=has_aux)
        value, n_valid, cotangent = forward.loss()
        said.layers(layers.covered, tapped.idle)
        said.batch_second(tapped.batch_second())
        scaled = loss_normalizer is not None or n_valid is not None
        said.in_parts(tapped.in_parts(), scaled=scaled)
        said.more_rows(tapped.more_rows(), scaled=scaled)
        said.rows(tapped.numbers(), scaled=scaled)
        gradient, sums = forward.backward(cotangent)
        if config.fisher == "empirical":
            normalizer = n_valid if loss_normalizer is None else loss_normalizer
            statistics = tapped.statistics(sums, normalizer)
        else:
            assert loss_type is not None
            draws = fisher.cotangents(config, forward.outputs, forward.floats, loss_type, loss_mask, rng, class_dim)
            # The exact Fisher is the sum over its columns, a sampled one the mean over the draws.
            scale = draws.passes**0.5 if config.fisher == "exact" else 1.0
            statistics = fisher.sweep(
                draws.passes, lambda number: tapped.statistics(forward.backward(draws.cotangent(number))[1], scale)
            )
        tapped.check_reached()
        gradient = put_back(trained(gradient, params), params)
        if checks is not None and is_known((gradient, checks.products)):
            said.gradients(*in_short(checks.compare(layers, gradient, tapped.penalised)))
        return ((value, forward.aux) if has_aux else value), gradient, Gathered(statistics, tapped.idle)

    return run


def _check_loss_normalizer(value: Array | float | None) -> None:
    if isinstance(value, Array):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        check_loss_normalizer_array(value.shape, real=real, dtype=value.dtype)
    elif value is not None:
        check_loss_normalizer(value)


@with_promotion
def check_gradients(
    apply_fn: ApplyFn, loss_fn: LossFn, layers: Layers, params: Tree, *args: Tree, has_aux: bool = False
) -> dict[str, Compared]:
    """G^T A of each layer that the model calls beside its weight's gradient; computed, outside of any program.

    Args:
        apply_fn, loss_fn, layers, has_aux: as for `value_grad_and_statistics`.
        params: parameters.
        *args: the other arguments.

    Raises:
        MissingStatisticsError: as `value_grad_and_statistics`.
    """
    check_params(layers, params)
    checks = Checks(kind_of)
    tapped = TappedModel(trace(apply_fn, params, args, has_aux=has_aux), layers, [], checks)
    leaves, tree = jax.tree.flatten(args)

    @jax.jit
    def run(params: Tree, arrays: list[Array]) -> tuple[Tree, dict[str, Product]]:
        given = iter(arrays)
        args = jax.tree.unflatten(tree, [next(given) if is_array(t) else t for t in leaves])
        forward = ForwardPass(tapped, params, args, lambda outputs: loss_fn(outputs, *args), has_aux=has_aux)
        gradient, sums = forward.backward(forward.loss()[2])
        return put_back(trained(gradient, params), params), checks.products_of(sums)

    gradient, products = run(params, arrays_of(args))
    tapped.check_reached()
    return compare(layers, gradient, products, checks.eps, tapped.penalised)


@with_promotion
def idle_layers(
    apply_fn: ApplyFn, layers: Layers, params: Tree, *args: Tree, has_aux: bool = False
) -> tuple[str, ...]:
    """The layers that the model does not call with these arguments; it is traced, not run.

    Raises:
        MissingStatisticsError: it calls none of them.
        ValueError: naming a layer that it reads in ways that it did not when K-FAC was made.
    """
    check_params(layers, params)
    called = called_layers(layers.covered, trace(apply_fn, params, args, has_aux=has_aux).survey())
    return tuple(name for name in layers.covered if name not in called)
