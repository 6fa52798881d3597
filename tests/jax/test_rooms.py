"""A scaling of one's own, given as a class; tests/contract/test_rooms.py has one that is a file, and a kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from algoperf_kfac import plan
from algoperf_kfac.jax import KFAC
from algoperf_kfac.jax.preconditioner import LayerState, from_eigenvalues
from algoperf_kfac.jax.scalings import Kept, Operators, Scaling
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.layers import LayerSpec
from tests.jax.toys import OPTIONS, batch, cross_entropy, mlp, mlp_params, steps


class OnlyA(Scaling):
    """The inverse root of A alone, and a count of steps."""

    def keeps(self, spec: LayerSpec, dtype: DTypeLike) -> Kept:
        return {"steps": jnp.zeros((), jnp.int32)}

    def operators(self, state: LayerState) -> Operators:
        roots = [v**-0.5 for v in state.a_values]
        identities = tuple(jnp.tile(jnp.eye(u.shape[-1], dtype=u.dtype), (len(u), 1, 1)) for u in state.b_basis)
        return from_eigenvalues(state.a_basis, roots), identities

    def precondition(self, state: LayerState, momentum: Array, gradient: Array) -> tuple[Array, Kept]:
        direction, kept = super().precondition(state, momentum, gradient)
        return direction, {"steps": kept["steps"] + 1}


def test_a_scaling_of_ones_own() -> None:
    """It is trained with, checked for drift, kept in the state, and planned for."""
    ours = KFAC(mlp, cross_entropy, mlp_params(), *batch(), **OPTIONS, scaling=OnlyA, drift_tolerance=0.1)
    _, with_statistics, _ = steps(ours)
    run, params, state = jax.jit(with_statistics), mlp_params(), ours.init(mlp_params())
    for _ in range(3):
        params, state = run(params, state, *batch())
    for stack in find_state(state).stacks.values():
        assert (stack.kept["steps"] == 3).all()
        assert (stack.refreshes > 0).all()
        np.testing.assert_array_equal(stack.b_operator[0][0, 0], jnp.eye(stack.b_operator[0].shape[-1]))
        a = stack.a_operator[0]
        damped = stack.a_basis[0] * stack.a_values[0][..., None, :] @ stack.a_basis[0].mT
        np.testing.assert_allclose(a @ a @ damped, np.broadcast_to(np.eye(a.shape[-1]), a.shape), atol=1e-9)
    planned = plan(mlp, mlp_params(), *batch(), config=ours.config)
    float32 = jax.tree.map(lambda t: t.astype(jnp.float32), mlp_params())
    narrow = KFAC(mlp, cross_entropy, float32, *batch(), config=ours.config)
    assert planned.memory.state == sum(leaf.nbytes for leaf in jax.tree.leaves(find_state(narrow.init(float32))))
