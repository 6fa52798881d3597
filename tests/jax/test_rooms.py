"""A scaling and a kind of layer of one's own: what stands here is all that each takes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.extend.core import JaxprEqn
from jax.typing import DTypeLike

from algoperf_kfac import plan
from algoperf_kfac.jax import KFAC, kinds
from algoperf_kfac.jax.kinds.shared_weight import SharedWeight
from algoperf_kfac.jax.operations import Call, Read, WeightView, shape_of
from algoperf_kfac.jax.preconditioner import LayerState, from_eigenvalues
from algoperf_kfac.jax.scalings import Kept, Operators, Scaling
from algoperf_kfac.jax.sources import Source, sources_of
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.layers import LayerSpec
from tests.jax.support import assert_equal, factors, normal
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


def read_mul(eqn: JaxprEqn, tags: Sequence[object]) -> Read | None:
    """Data times a vector along their last dimension: as many groups of one feature."""
    for position in (0, 1):
        weight, shape = tags[position], shape_of(eqn.outvars[0])
        if isinstance(weight, Source) and len(weight.shape) == 1 and not sources_of(tags[1 - position]):
            stored = Source(weight.name, weight.shape)
            (features,) = weight.shape
            # The vector may have been spread over the data in one way only.
            spread = weight.apply(np.arange(features))
            if not (np.broadcast_to(spread, shape) == np.broadcast_to(np.arange(features), shape)).all():
                return None
            dims = tuple(range(len(shape)))
            return Read(
                Call("scale", WeightView(stored, (0,), features, 1, 1), shape[:-1], features, dims, dims),
                1 - position,
            )
    return None


class Scale(SharedWeight):
    """Features multiplied by weights of their own, without more."""

    names = frozenset({"scale"})
    rules = {"mul": read_mul}  # noqa: RUF012  # as in the library


def scaled(p: dict[str, Array], x: Array) -> Array:
    return jnp.sin(x * p["scale"] + p["shift"])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_kind_of_ones_own(approximation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in the list, and it is found, with its bias, and has the factors of a group for each feature."""
    params, x = {"scale": normal(0, 3), "shift": normal(1, 3)}, normal(2, 4, 5, 3)

    def loss(f: Array, x: Array) -> Array:
        return jnp.square(f).sum()

    assert not KFAC(scaled, loss, params, x).coverage().layers
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, Scale()))
    (layer,) = KFAC(scaled, loss, params, x).coverage().layers
    assert (layer.kind, layer.groups, layer.bias) == ("scale", 3, "shift")
    g = 2 * jnp.sin(x * params["scale"] + params["shift"]) * jnp.cos(x * params["scale"] + params["shift"])
    rows = jnp.stack([x, jnp.ones_like(x)], -1)  # (N, R, groups, P_in + 1)
    if approximation == "reduce":
        rows, g = rows.mean(1, keepdims=True), g.sum(1, keepdims=True)
    a = jnp.einsum("nrgi,nrgj->gij", rows, rows) / (rows.shape[0] * rows.shape[1])
    b = jnp.square(g).sum((0, 1)).reshape(3, 1, 1)
    assert_equal(factors(scaled, loss, params, x, approximation=approximation)["scale"], (a, b))
