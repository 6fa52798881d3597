"""Keeps refreshes within a share of a run's time: reads the clock between compiled steps, sets the state's pace.

A program cannot read a clock; but what it reads in the state may change without it being compiled anew.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import cubes
from algoperf_kfac.jax.layer_book import Layers
from algoperf_kfac.jax.stacks import Stacks
from algoperf_kfac.jax.transform import KFACState, find_state
from algoperf_kfac.jax.types import Tree
from algoperf_kfac.pace import Pacer


class Pacing:
    """What a `refresh_budget` asks of a training loop; without one it hands states on.

    ```
    pacing = optimizer.pacing()
    for step, batch in enumerate(batches):
        params, state = run(params, state, batch)
        state = pacing(state, step)
    ```

    It waits for the device after a few updates (`cadence.rounds`). It is made anew when a run is resumed: the pace
    is in the state. Several processes take the largest of their paces; all call it at the same steps.

    Args:
        layers: from `discover`.
        config: the configuration.
        mesh: whose devices share the refreshes; None for one.
    """

    def __init__(self, layers: Layers, config: KFACConfig, mesh: Mesh | None = None) -> None:
        self._pacer = Pacer(config)
        self._costs = [cubes(layer.spec) for layer in layers.covered.values()]
        self._workers = 1 if mesh is None else mesh.size

    def __call__(self, state: Tree, step: int) -> Tree:
        """The state to go on with, outside of jit.

        Args:
            state: after the update, as `update` returned it.
            step: the number of the update, counted from 0.
        """
        if not self._pacer.after(step, lambda: jax.block_until_ready(find_state(state).steps)):
            return state
        pace = _largest(self._pacer.pace(self._costs, self._workers))
        return state if pace is None else with_pace(state, pace)


def with_pace(state: Tree, pace: int) -> Tree:
    """The state of K-FAC, or of a chain with it, with another pace (`cadence.py`), where it has one."""

    def put(node: Tree) -> Tree:
        if not isinstance(node, KFACState) or (old := node.stacks.pace) is None:
            return node
        held = node.stacks
        paced = Stacks(held, held.members, masked=held.masked, pace=_in_place_of(old, pace))
        return node._replace(stacks=paced)

    return jax.tree.map(put, state, is_leaf=lambda node: isinstance(node, KFACState))


def _in_place_of(old: Array, value: int) -> Array:
    """A number that a compiled program does not tell from the one it was given before."""
    new = np.asarray(value, old.dtype)
    return jax.device_put(new, old.sharding) if old.committed else jax.numpy.asarray(new)


def _largest(pace: int | None) -> int | None:
    if jax.process_count() == 1:
        return pace
    return int(np.max(multihost_utils.process_allgather(np.int32(pace or 0)))) or None
