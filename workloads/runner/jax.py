"""What the runner does differently for JAX: rngs, clock, and the content of checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import flax
import jax
import jaxlib
import numpy as np
import optax
from flax import serialization

from commands.errors import UserError
from submissions.common.api import Tree
from workloads.jax import devices
from workloads.runner.logs import MetricsLogger
from workloads.workload import Workload


class JaxBackend:
    """The `Backend` for JAX: one process, which drives all devices."""

    def start(self) -> None:
        """Nothing: a step is a function of its arguments, the rng among them."""

    def stop(self) -> None:
        """Nothing."""

    def device_count(self) -> int:
        return devices.count()

    def is_one_process_on_cpu(self) -> bool:
        """Whether the devices are the CPU; several of them are threads of this process."""
        return jax.default_backend() == "cpu"

    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return True

    def versions(self) -> dict[str, str]:
        return {
            "jax_version": jax.__version__,
            "jaxlib_version": jaxlib.__version__,
            "flax_version": flax.__version__,
            "optax_version": optax.__version__,
            "device": jax.devices()[0].device_kind,
        }

    def seed_step(self, rng: np.ndarray) -> None:
        """Nothing: JAX has no generator to seed."""

    def rng(self, rng: np.ndarray) -> np.ndarray:
        """The rng as submissions get it: a raw key, as in the official harness, of dtype uint32 and shape (2,)."""
        return rng.astype(np.uint32)

    def now(self, *results: Tree) -> float:
        """Seconds on a steady clock, once these results have been computed."""
        jax.block_until_ready(results)
        return time.perf_counter()

    def compiled(self, model: Tree) -> Tree:
        """The parameters: submissions compile their steps themselves, and the runner refuses --torch_compile."""
        return model

    def same_on_all(self, value: float) -> float:
        """The value: there is one process."""
        return value

    def watch_loss(self, workload: Workload) -> Callable[[], float]:
        """Returns a function that reads the last training loss the submission logged; NaN before the first.

        A compiled step gives no look at its loss, so the progress shows what the log holds.
        """

        def read() -> float:
            logger = workload.metrics_logger
            rows = logger.rows if isinstance(logger, MetricsLogger) else []
            return next((float(row["loss"]) for row in reversed(rows) if "loss" in row), float("nan"))

        return read

    def unwatch_loss(self, workload: Workload) -> None:
        """Nothing: the workload is as it was."""

    def check_optimizer_state(self, optimizer_state: Tree) -> None:
        """Raises UserError unless the state can be saved the way the official harness saves it."""
        if not (isinstance(optimizer_state, tuple) and len(optimizer_state) == 2):
            raise UserError(
                "The submission's init_optimizer_state must return a pair in JAX: the state to save, and the rest."
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer_state[0]):
            name = f"The submission's optimizer state '{jax.tree_util.keystr(path)}'"
            remedy = "so it cannot be resumed; use --nosave_checkpoints or move it to the second entry of the pair"
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
                raise UserError(f"{name} is a {type(leaf).__name__} and no array, {remedy}.")
            if np.size(leaf) == 0:
                raise UserError(f"{name} is an array without entries, {remedy}.")

    def pack(self, params: Tree, optimizer_state: tuple[Tree, Tree], rest: dict[str, object]) -> bytes:
        """The content of a checkpoint file."""
        trees = {
            "model_params": params,
            "optimizer_state": optimizer_state[0],
            "model_state": rest["model_state"],
        }
        content: dict[str, Tree] = {name: serialization.to_state_dict(tree) for name, tree in trees.items()}
        # As text, because msgpack knows no tuples; floats survive it unchanged.
        content["rest"] = json.dumps({name: value for name, value in rest.items() if name not in trees})
        return serialization.msgpack_serialize(jax.device_get(content))

    def peek(self, content: bytes) -> dict[str, Tree]:
        """What `pack` was given as `rest`, without its arrays."""
        rest: dict[str, Tree] = json.loads(serialization.msgpack_restore(content)["rest"])
        return rest

    def unpack(self, content: bytes, params: Tree, optimizer_state: tuple[Tree, Tree]) -> dict[str, Tree]:
        """What `pack` was given, arrays in the structures of `params` and `optimizer_state`.

        A submission whose state is empty before its first step gets nested dictionaries, as it would from flax.

        Raises:
            ValueError: the checkpoint holds other arrays than these structures.
        """
        checkpoint = serialization.msgpack_restore(content)
        opt_state, static = optimizer_state
        saved = checkpoint["optimizer_state"]
        return {
            **json.loads(checkpoint["rest"]),
            "model_state": checkpoint["model_state"],
            "model_params": _filled(params, checkpoint["model_params"]),
            "optimizer_state": (_filled(opt_state, saved) if jax.tree.leaves(opt_state) else saved, static),
        }


def _filled(tree: Tree, saved: Tree) -> Tree:
    """`tree` with what `flax.serialization.to_state_dict` made of another of its structure, on all devices."""
    expected, given = (_shapes(state) for state in (serialization.to_state_dict(tree), saved))
    if expected != given:
        names = sorted({name for name, _ in expected.items() ^ given.items()})
        raise ValueError(f"it holds other arrays than the submission's, for instance {names[0]}")
    restored = serialization.from_state_dict(tree, saved)
    return jax.tree.map(
        lambda old, new: jax.device_put(new, devices.replicated()) if isinstance(old, jax.Array) else new,
        tree,
        restored,
    )


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves by their paths."""
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
