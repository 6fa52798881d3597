"""AdamW in JAX: `optax.adamw`."""

import jax
import optax

from submissions.adamw import EPSILON, SAID
from submissions.common.api import Tree
from submissions.common.from_optax import Parameters, from_optax

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree, learning_rate: jax.Array) -> optax.GradientTransformation:
    """AdamW for all parameters."""
    del parameters
    beta1 = 1 - point.one_minus_beta1
    return optax.adamw(learning_rate, beta1, point.beta2, EPSILON, weight_decay=point.weight_decay)


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_optax(
    **SAID, make=make
)
