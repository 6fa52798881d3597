"""Muon in JAX, from `optax.contrib`; there its part for other parameters has Nesterov momentum, too."""

import jax
import optax
import optax.contrib

from submissions.common.api import Tree
from submissions.common.from_optax import Parameters, from_optax
from submissions.common.packages import Package
from submissions.common.spec import ParameterType
from submissions.muon import ADAM_BETA1, RMS, SAID

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


# Of flax's attention: from inputs to heads by features of a head.
HEADS = {
    ParameterType.ATTENTION_Q,
    ParameterType.ATTENTION_K,
    ParameterType.ATTENTION_V,
    ParameterType.ATTENTION_KV,
    ParameterType.ATTENTION_QKV,
}


def make(parameters: Parameters, point: Tree, learning_rate: jax.Array) -> optax.GradientTransformation:
    """Muon for matrices and AdamW for the others."""
    axes = jax.tree.map(_axes, *parameters)
    return optax.contrib.muon(
        learning_rate,
        beta=1 - point.one_minus_beta1,
        weight_decay=point.weight_decay,
        adam_b1=ADAM_BETA1,
        adam_b2=point.beta2,
        adam_weight_decay=point.weight_decay,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=axes,
    )


def _axes(role: str, shape: jax.ShapeDtypeStruct, kind: ParameterType) -> Tree:
    """Which axes of a parameter are a matrix's two; None for what is no matrix."""
    if role != "matrix":
        return None
    axes = range(len(shape.shape))
    inputs = 1 if kind in HEADS else len(axes) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(axes[:inputs]), tuple(axes[inputs:]))


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_optax(
    **SAID,
    make=make,
    packages=[Package("optax", "0.2.8", "its contrib.muon; AlgoPerf pins 0.2.2, which has none")],
)
