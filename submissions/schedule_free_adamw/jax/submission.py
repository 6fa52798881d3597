"""Schedule-free AdamW in JAX, from `optax.contrib`."""

import jax
import optax
import optax.contrib

from submissions.common.api import Tree
from submissions.common.from_optax import Averaging, Parameters, from_optax
from submissions.common.packages import Package
from submissions.common.schedule import CONSTANT_AFTER_WARMUP
from submissions.schedule_free_adamw import EPSILON, SAID

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def make(parameters: Parameters, point: Tree, learning_rate: jax.Array) -> optax.GradientTransformation:
    """Schedule-free AdamW for all parameters; the warm-up is the submission's schedule."""
    del parameters
    return optax.contrib.schedule_free_adamw(
        learning_rate,
        b1=1 - point.one_minus_beta1,
        b2=point.beta2,
        eps=EPSILON,
        weight_decay=point.weight_decay,
    )


def average(state: Tree, params: Tree, point: Tree) -> Tree:
    """The average x, of y and z."""
    del point
    return optax.contrib.schedule_free_eval_params(state, params)


def interpolation(state: Tree, params: Tree, point: Tree) -> Tree:
    """y = (1 - beta1) z + beta1 x, where gradients are taken."""
    beta1 = 1 - point.one_minus_beta1
    return jax.tree.map(lambda x, z: beta1 * x + (1 - beta1) * z, params, state.z)


DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = from_optax(
    **SAID,
    make=make,
    schedule=CONSTANT_AFTER_WARMUP,
    packages=[Package("optax", "0.2.8", "its contrib.schedule_free_adamw; AlgoPerf pins 0.2.2, which has none")],
    averaging=Averaging(average, interpolation),
)
