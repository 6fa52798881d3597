"""The part of a training step that does not depend on the optimizer, in JAX.

`loss_function` and `compute_gradient` are traced: a submission calls them inside the function it hands to
`compile_step`. The rest runs outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from submissions.common.api import Batch, Tree, Workload
from submissions.common.logs import is_log_step
from submissions.common.spec import ForwardPassMode

Step: TypeAlias = tuple[Tree, Tree, Tree, dict[str, jax.Array]]
"""New parameters, optimizer state and model state, and what may be logged."""

Results = TypeVar("Results")


class StepResult(NamedTuple):
    """What a forward pass gave.

    Attributes:
        loss: mean over the valid examples of all devices, a scalar.
        n_valid: valid examples (in a language model: tokens) of all devices, a scalar.
        new_model_state: from model_fn.
    """

    loss: jax.Array
    n_valid: jax.Array
    new_model_state: Tree


def forward(
    workload: Workload,
    params: Tree,
    batch: Batch,
    model_state: Tree,
    rng: jax.Array,
    dropout_rate: float | None = None,
) -> tuple[Tree, Tree]:
    """Logits and new model state, in training mode; arguments as in `loss_function`."""
    dropout = {} if dropout_rate is None else {"dropout_rate": dropout_rate}
    logits, new_model_state = workload.model_fn(
        params,
        batch,
        model_state=model_state,
        mode=ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
        **dropout,
    )
    if not jax.tree.leaves((model_state, new_model_state)):
        # AlgoPerf's imagenet_vit makes None of an empty dictionary: the second step would be compiled anew.
        new_model_state = model_state
    return logits, new_model_state


def losses_of(workload: Workload, logits: Tree, batch: Batch, label_smoothing: float) -> dict[str, jax.Array]:
    """The workload's loss of a batch: "summed" over valid examples, "n_valid_examples", "per_example"."""
    return workload.loss_fn(
        batch["targets"],
        logits,
        mask_batch=batch.get("weights"),
        label_smoothing=label_smoothing,
    )


def loss_function(
    workload: Workload,
    params: Tree,
    batch: Batch,
    model_state: Tree,
    rng: jax.Array,
    dropout_rate: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, StepResult]:
    """The mean loss over the valid examples of all devices, and what came with it, in training mode.

    Args:
        dropout_rate: None for the workload's own. Not traced: AlgoPerf's criteo1tb_resnet asks whether it is 0.
    """
    logits, new_model_state = forward(workload, params, batch, model_state, rng, dropout_rate)
    losses = losses_of(workload, logits, batch, label_smoothing)
    # The batch is one global array, so both sums go over all devices.
    n_valid = jnp.asarray(losses["n_valid_examples"], losses["summed"].dtype)
    loss = losses["summed"] / n_valid
    return loss, StepResult(loss, n_valid, new_model_state)


def compute_gradient(
    workload: Workload,
    params: Tree,
    batch: Batch,
    model_state: Tree,
    rng: jax.Array,
    dropout_rate: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tree, StepResult]:
    """The gradient of `loss_function` with respect to the parameters, and the result of the forward pass."""

    def loss(params: Tree) -> tuple[jax.Array, StepResult]:
        return loss_function(workload, params, batch, model_state, rng, dropout_rate, label_smoothing)

    gradient, result = jax.grad(loss, has_aux=True)(params)
    return gradient, result


def clip_gradient(gradient: Tree, max_norm: float | None) -> tuple[Tree, jax.Array]:
    """The gradient scaled so that its global norm is at most `max_norm`, and the norm it had; None leaves it."""
    norm = optax.global_norm(gradient)
    if max_norm is None:
        return gradient, norm
    # The 1e-6 is PyTorch's, against a division by zero.
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda leaf: leaf * factor, gradient), norm


def apply_directions(
    params: Tree, directions: Tree, learning_rate: jax.Array | float, weight_decay: jax.Array | float
) -> Tree:
    """p <- (1 - lr * weight_decay) p - lr * direction: decoupled weight decay, scaled by the learning rate."""
    kept = 1.0 - learning_rate * weight_decay
    return jax.tree.map(lambda p, direction: kept * p - learning_rate * direction, params, directions)


def log_step(
    workload: Workload, loss: jax.Array, grad_norm: jax.Array, global_step: int, **metrics: jax.Array | float
) -> None:
    """Logs loss, gradient norm and other metrics every 100 steps, if the workload has a logger.

    Waits for the device only then.
    """
    if workload.metrics_logger is None or not is_log_step(workload, global_step):
        return
    row = {"loss": loss, "grad_norm": grad_norm, **metrics}
    workload.metrics_logger.append_scalar_metrics({name: float(value) for name, value in row.items()}, global_step)


# Devices. The batch is sharded over all of them on its first axis, everything else is on each of them.


def mesh() -> Mesh:
    """All devices in a row."""
    return Mesh(jax.devices(), ("batch",))


def replicate(tree: Tree) -> Tree:
    """The arrays on every device. Those that are already there are handed on untouched.

    A compiled step tells arrays on the mesh from arrays on a single device, and would be compiled again when it
    sees its own results: so parameters and state go through here before each call.
    """
    sharding = NamedSharding(mesh(), PartitionSpec())

    def move(leaf: Tree) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding == sharding:
            return leaf
        return jax.device_put(leaf, sharding)

    return jax.tree.map(move, tree)


def compile_step(step: Callable[..., Results]) -> Callable[..., Results]:
    """`step` compiled over all devices; give it parameters, optimizer and model state through `replicate`.

    The parameters and the optimizer state are donated: the arrays given are gone afterwards. All results are
    replicated.

    Args:
        step: called as (params, opt_state, model_state, batch, rng, learning_rate), all of them traced; what must
            not be is bound beforehand. The learning rate is a `np.float32`: of one type, whatever a search space
            holds.
    """
    replicated = NamedSharding(mesh(), PartitionSpec())
    sharded = NamedSharding(mesh(), PartitionSpec("batch"))
    arguments = (replicated, replicated, replicated, sharded, replicated, replicated)
    return jax.jit(step, in_shardings=arguments, out_shardings=replicated, donate_argnums=(0, 1))
