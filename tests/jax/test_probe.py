"""What the library's plan sees of a JAX model, against what compiled programs hold and states weigh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from algoperf_kfac import KFACConfig, plan
from algoperf_kfac.cost import ITEM_BYTES, Load
from algoperf_kfac.jax import KFAC
from algoperf_kfac.jax.activations import activation_bytes
from algoperf_kfac.jax.probe import Subject, sight
from algoperf_kfac.jax.transform import find_state

pytestmark = pytest.mark.single
BATCH = 4
Shape = jax.ShapeDtypeStruct


def recurrent(params: Any, x: Array) -> Array:
    """A loop over time, and a convolution."""

    def step(h: Array, x_t: Array) -> tuple[Array, None]:
        return jnp.tanh(x_t @ params["w"] + h @ params["u"]), None

    h = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.swapaxes(0, 1))[0]
    image = h.reshape(-1, 5, 1, 1) * jnp.ones((1, 1, 6, 6))
    return jax.lax.conv_general_dilated(image, params["k"], (2, 2), "SAME").sum((1, 2, 3))


PARAMS = {"w": Shape((3, 5), "f"), "u": Shape((5, 5), "f"), "k": Shape((2, 5, 3, 3), "f")}


def test_loads() -> None:
    """A scan over time uses its weights at every step."""
    seen = sight(Subject(recurrent, PARAMS, (Shape((BATCH, 7, 3), "f"),)), KFACConfig())
    assert seen.examples == BATCH
    assert seen.loads["w"] == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 3, 7 * BATCH * 5)
    assert seen.loads["u"] == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 5, 7 * BATCH * 5)
    assert seen.loads["k"] == Load(BATCH, 9, 9 * BATCH, 180 * BATCH, 18 * BATCH, 3)


def test_rows_of_graphs_are_positions_of_their_graphs() -> None:
    subject = Subject(lambda p, x: x @ p, Shape((3, 5), "f"), (Shape((12, 3), "f"),), segments={12: 3})
    assert sight(subject, KFACConfig()).loads["params"] == Load(3, 4, 12, 36, 60, in_segments=True)


def test_a_model_that_cannot_be_traced() -> None:
    with pytest.raises(ValueError, match=r"^the model cannot be traced \(TypeError: [^\n]*\)$"):
        plan(lambda p, x: x @ p, Shape((3, 5), "f"), Shape((12, 4), "f"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": "second_moment"},
        {"preconditioner": "inverse"},
        {"drift_tolerance": 0.1},
        {"max_factor_dim": 4, "approximation": "reduce"},
        {"max_factor_dim": 4, "large_factor": "one_sided"},
        {"grafting": False},
    ],
    ids=str,
)
def test_the_state_weighs_what_was_planned(options: dict[str, Any]) -> None:
    x = jnp.zeros((BATCH, 7, 3), jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), PARAMS)
    optimizer = KFAC(recurrent, lambda f, x: f.sum(), params, x, **options)
    state = find_state(optimizer.init(params))
    planned = plan(recurrent, params, x, **options)
    assert planned.coverage == optimizer.coverage()
    assert planned.memory.state == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert planned.memory.parameters == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_activations_are_what_a_compiled_program_holds() -> None:
    n, width, depth = 256, 64, 6

    def apply(params: Any, x: Array) -> Array:
        for w in params:
            x = jax.nn.silu(x @ w)
        return x

    args = ([jnp.zeros((width, width))] * depth, (jnp.zeros((n, width)),))
    estimate = activation_bytes(apply, *args)
    # What each silu takes, and what it gives to the next product.
    assert estimate == ITEM_BYTES * n * width * (2 * depth - 1)
    grad = jax.jit(jax.grad(lambda params, x: apply(params, x).sum()))
    jax.config.update("jax_disable_most_optimizations", False)  # as users compile, not as the other tests do
    memory = grad.lower(args[0], *args[1]).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say what a program takes")
    assert 0.5 * memory.temp_size_in_bytes <= estimate <= 1.1 * memory.temp_size_in_bytes


def test_a_loop_keeps_what_it_piles_up() -> None:
    steps, n, width = 7, BATCH, 5

    def apply(params: Any, x: Array) -> Array:
        def step(h: Array, x_t: Array) -> tuple[Array, None]:
            return jnp.tanh(x_t + h @ params), None

        return jax.lax.scan(step, jnp.zeros((n, width)), x)[0]

    kept = activation_bytes(apply, jnp.zeros((width, width)), (jnp.zeros((steps, n, width)),))
    each = ITEM_BYTES * steps * n * width
    assert 2 * each <= kept <= 4 * each  # the state before and after each step, and at most what tanh makes of it
