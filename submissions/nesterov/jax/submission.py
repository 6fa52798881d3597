"""Nesterov momentum in JAX: `optax.sgd`."""

import jax
import optax

from submissions.common.api import Tree
from submissions.common.from_optax import Parameters, from_optax
from submissions.nesterov import SAID

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree, learning_rate: jax.Array) -> optax.GradientTransformation:
    """SGD with momentum for all parameters."""
    del parameters
    return optax.chain(
        optax.add_decayed_weights(point.weight_decay),
        optax.sgd(learning_rate, momentum=1 - point.one_minus_beta1, nesterov=True),
    )


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_optax(
    **SAID, make=make
)
