"""The forward pass of a statistics step, and the loss at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var

from algoperf_kfac.jax.tapped_model import AllSums, TappedModel
from algoperf_kfac.jax.types import Loss, Tree


class ForwardPass:
    """The forward pass of a statistics step.

    Args:
        tapped: the model.
        params: its parameters.
        args: its other arguments.
        loss_of: from the outputs to the loss.
        has_aux: whether the model returns something beside the outputs.

    Attributes:
        floats: the leaves of the outputs that the loss is differentiated by.
        backward: from their cotangents to the gradient and what the layers collect.
        aux: what the model returns beside its outputs; None for nothing.
    """

    def __init__(
        self,
        tapped: TappedModel,
        params: Tree,
        args: Sequence[Tree],
        loss_of: Callable[[Tree], Loss],
        *,
        has_aux: bool,
    ) -> None:
        shapes = tapped.model.outputs[0] if has_aux else tapped.model.outputs
        # Outputs that the loss does not read have no gradient: nor do the layers behind them.
        used = used_outputs(loss_of, shapes)

        def forward(params: Tree, sums: AllSums) -> tuple[list[Array], tuple[list[Array | None], Tree]]:
            flat = tapped.run(params, args, sums)
            returned = jax.tree.unflatten(jax.tree.structure(tapped.model.outputs), flat)
            outputs, aux = returned if has_aux else (returned, None)
            leaves = jax.tree.leaves(outputs)
            floats = [t for t, is_used in zip(leaves, used, strict=True) if is_used]
            others = [None if is_used else t for t, is_used in zip(leaves, used, strict=True)]
            return floats, (others, aux)

        self._loss_of = loss_of
        self._tree = jax.tree.structure(shapes)
        self.floats, self.backward, (self._others, self.aux) = jax.vjp(
            forward, params, tapped.zeros(), has_aux=True
        )

    def outputs(self, floats: list[Array]) -> Tree:
        """The outputs, with `floats` in the place of the leaves that the loss is differentiated by."""
        values = iter(floats)
        return jax.tree.unflatten(self._tree, [next(values) if t is None else t for t in self._others])

    def loss(self) -> tuple[Array, Array | None, list[Array]]:
        """The loss, the number of examples that count where it is told, and the cotangents of `floats`."""

        def loss(floats: list[Array]) -> tuple[Array, Array | None]:
            return scalar(self._loss_of(self.outputs(floats)))

        (value, n_valid), cotangent = jax.value_and_grad(loss, has_aux=True)(self.floats)
        return value, n_valid, cotangent


def scalar(loss: Loss) -> tuple[Array, Array | None]:
    """The loss, and the number of examples that count where it is told.

    Raises:
        ValueError: it is neither a scalar nor what AlgoPerf's loss functions return.
    """
    if isinstance(loss, Mapping) and {"summed", "n_valid_examples"} <= loss.keys():
        return loss["summed"] / loss["n_valid_examples"], loss["n_valid_examples"]
    shape = getattr(loss, "shape", None)
    if shape != ():
        what = f"an array of shape {shape}" if shape is not None else f"a {type(loss).__name__}"
        raise ValueError(
            f"loss_fn returned {what}: it must return a scalar, the loss averaged over examples, or a mapping with "
            "'summed' and 'n_valid_examples'. Metrics are computed from the outputs, or returned by apply_fn as aux"
            " (has_aux=True)"
        )
    return cast("Array", loss), None


def used_outputs(loss_of: Callable[[Tree], Loss], shapes: Tree) -> list[bool]:
    """Which leaves of the outputs are floating and go into the loss."""
    jaxpr = jax.make_jaxpr(lambda outputs: scalar(loss_of(outputs)))(shapes).jaxpr
    needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    return [v in needed and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in jaxpr.invars]
