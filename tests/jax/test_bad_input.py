"""Bad input gets one message that names the thing and the remedy; models with nothing to cover still train."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from algoperf_kfac.jax import KFAC, MissingStatisticsError, Positions, batch_mesh, shard_batch
from algoperf_kfac.jax.nadamw import scale_by_nadamw
from tests.jax.support import normal
from tests.jax.toys import OPTIONS, batch, cross_entropy, mlp, mlp_params, optimizer, steps


def summed(f: Any, *args: Any) -> Array:
    return sum(leaf.sum() for leaf in jax.tree.leaves(f))


@pytest.mark.parametrize("apply", [mlp, lambda p, x, y: jax.vmap(lambda x: mlp(p, x))(x)])
def test_a_batch_without_examples(apply: Any) -> None:
    x, y = batch()
    ours = KFAC(apply, summed, mlp_params(), x, y)
    with pytest.raises(MissingStatisticsError, match=r"The batch has 0 examples: leave such a step out"):
        ours.value_grad_and_statistics(mlp_params(), x[:0], y[:0])


def test_states_of_an_ensemble_are_looked_at_one_by_one() -> None:
    ours = optimizer()
    states = jax.vmap(ours.init)(jax.tree.map(lambda t: jnp.stack([t, t]), mlp_params()))
    for look in (ours.metrics, ours.summary, ours.factors):
        with pytest.raises(ValueError, match=r"is 2 states, .*look at one, jax.tree.map\(lambda leaf: leaf\[0\]"):
            look(states)
    assert ours.metrics(jax.tree.map(lambda leaf: leaf[0], states))["steps"] == 0


def test_nothing_to_cover_is_nadamw() -> None:
    """As in PyTorch: coverage 0, every parameter takes the NadamW update, both kinds of step run."""

    def apply(p: Any, x: Array, y: Array) -> Array:
        return x * p["scale"]

    params = {"scale": normal(0, 4)}
    ours = KFAC(apply, lambda f, x, y: jnp.square(f).mean(), params, *batch(), learning_rate=1.0, **OPTIONS)
    assert ours.coverage().fraction == 0
    plain, with_statistics, _ = steps(ours, apply=apply, loss=lambda f, x, y: jnp.square(f).mean())
    state, reference = ours.init(params), scale_by_nadamw(0.1, 0.99)
    inner, expected = reference.init(params), params
    for run in (with_statistics, plain, with_statistics):
        params, state = jax.jit(run)(params, state, *batch())
        gradient = jax.grad(lambda p: jnp.square(apply(p, *batch())).mean())(expected)
        updates, inner = reference.update(gradient, inner)
        expected = jax.tree.map(lambda p, u: p - u, expected, updates)
        np.testing.assert_allclose(params["scale"], expected["scale"], rtol=1e-12)
    assert ours.factors(state) == {}
    assert ours.metrics(state)["steps"] == 3


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="params holds no parameter"):
        KFAC(lambda p, x: x, summed, {}, normal(1, 3, 4))


def test_a_module_in_place_of_a_function() -> None:
    module = nn.Dense(3)
    with pytest.raises(TypeError, match=r"function of \(params, \*args\), got Dense.*module\.apply"):
        KFAC(module, summed, module.init(jax.random.key(0), normal(1, 3, 4)), normal(1, 3, 4))


def test_an_nnx_module_in_place_of_a_function() -> None:
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"function of \(params, \*args\).*nnx"):
        KFAC(module, summed, nnx.state(module), normal(1, 3, 4))


def test_functions_of_other_arguments() -> None:
    """Both get all of them: hardly anybody's first loop has that right."""
    x, y = batch()
    with pytest.raises(TypeError, match=r"apply_fn\(params, \*args\) with 2 .* too many .* let apply_fn take them"):
        KFAC(lambda params, x: mlp(params, x, y), cross_entropy, mlp_params(), x, y)
    with pytest.raises(TypeError, match=r"loss_fn\(outputs, \*args\) with 2 .* let loss_fn take them"):
        KFAC(mlp, lambda outputs, y: cross_entropy(outputs, x, y), mlp_params(), x, y)

    @functools.wraps(mlp)
    def takes_all(params: Any, x: Array, y: Array) -> Array:
        return mlp(params, x)

    assert KFAC(takes_all, cross_entropy, mlp_params(), x, y).coverage().fraction == 1
    assert KFAC(lambda *args: mlp(*args), cross_entropy, mlp_params(), x, y).coverage().fraction == 1


def test_mixed_precision_of_parameters() -> None:
    params = mlp_params()
    params["l1"]["b"] = params["l1"]["b"].astype(jnp.float32)
    with pytest.raises(ValueError, match=r"l0/b is float64 and parameter l1/b is not: cast"):
        KFAC(mlp, cross_entropy, params, *batch())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"l1/b is no array but float: make it one, jnp.asarray\(1.0\)"),
        ("x", "l1/b is no array but str: split"),
    ],
)
def test_a_parameter_that_is_no_array(value: object, message: str) -> None:
    params = mlp_params()
    params["l1"]["b"] = value
    with pytest.raises(ValueError, match=message):
        KFAC(mlp, cross_entropy, params, *batch())


@pytest.mark.parametrize("where", ["init", "value_grad_and_statistics"])
def test_parameters_that_changed(where: str) -> None:
    ours = optimizer()
    call = ours.init if where == "init" else lambda p: ours.value_grad_and_statistics(p, *batch())
    wider = mlp_params((4, 5, 4, 3))
    with pytest.raises(ValueError, match=r"parameter l0/b has shape \(5,\).*when K-FAC was made it had \(4,\)"):
        call(wider)
    with pytest.raises(ValueError, match="parameter l2/b is missing"):
        call(mlp_params((4, 4, 4)))
    with pytest.raises(ValueError, match="parameter l3/b is unknown"):
        call(mlp_params((4, 4, 4, 3, 3)))
    narrow = jax.tree.map(lambda t: t.astype(jnp.float32), mlp_params())
    with pytest.raises(ValueError, match=r"l0/b has .*float32.*float64"):
        call(narrow)


def test_statistics_of_another_model() -> None:
    ours = optimizer()
    params = mlp_params()
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    state = ours.init(params)
    short = {name: s for name, s in statistics.items() if name != "l1"}
    with pytest.raises(ValueError, match="statistics of l1 are missing"):
        ours.update(gradient, state, params, statistics=short)
    with pytest.raises(ValueError, match="statistics of other are of a layer that K-FAC does not know"):
        ours.update(gradient, state, params, statistics=statistics | {"other": statistics["l1"]})


def test_a_layer_that_does_not_reach_the_loss() -> None:
    def apply(p: Any, x: Array) -> tuple[Array, Array]:
        return x @ p["used"], x @ p["lost"]

    params = {"used": normal(0, 4, 3), "lost": normal(1, 4, 3)}
    ours = KFAC(apply, lambda f, x: f[0].sum(), params, normal(1, 3, 4))
    with pytest.raises(
        MissingStatisticsError,
        match=r"1 of 2 layers missed their statistics: lost \(missed its output gradients\).*exclude",
    ):
        ours.value_grad_and_statistics(params, normal(1, 3, 4))
    left = KFAC(apply, lambda f, x: f[0].sum(), params, normal(1, 3, 4), exclude=["lost"])
    assert jax.jit(left.value_grad_and_statistics)(params, normal(1, 3, 4))[2].keys() == {"used"}
    assert left.coverage().fallbacks[0].reason == "excluded by the user"


def test_a_stopped_gradient() -> None:
    def apply(p: Any, x: Array) -> Array:
        return jax.lax.stop_gradient(x @ p["stopped"]) @ p["w"]

    params = {"stopped": normal(0, 4, 3), "w": normal(1, 3, 2)}
    ours = KFAC(apply, summed, params, normal(1, 3, 4))
    with pytest.raises(MissingStatisticsError, match="stopped"):
        jax.jit(ours.value_grad_and_statistics)(params, normal(1, 3, 4))


def test_a_layer_that_is_not_called() -> None:
    def apply(p: Any, x: Array) -> Array:
        return x @ p["w"] if x.shape[1] == 4 else x[:, :2] @ p["v"]

    params = {"w": normal(0, 4, 3), "v": normal(1, 2, 3)}
    ours = KFAC(apply, summed, params, normal(1, 3, 4))
    with pytest.raises(MissingStatisticsError, match=r"w \(missed inputs\)\. The model does not call them"):
        ours.value_grad_and_statistics(params, normal(1, 3, 5))


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"exclude: no layer or parameter matches 'encoder\*'"):
        optimizer(exclude=["encoder*"])


def test_an_unknown_hyperparameter() -> None:
    with pytest.raises(ValueError, match="unknown hyperparameter 'dampening'"):
        optimizer(dampening=1)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (
            {"l1": Positions(mask=jnp.ones((7,)))},
            r"layer l1: a mask of shape \(7,\) does not fit positions \(24,\)",
        ),
        (
            Positions(segment_ids=jnp.zeros(7, int), num_segments=3),
            r"layer l0 has 24 rows in dimension 0, neither those of segment_ids \(7\).*positions=\{'l0'",
        ),
        (
            {"l0": Positions(segment_ids=jnp.zeros(7, int), num_segments=3)},
            r"layer l0: segment_ids of shape \(7,\) do not fit 24 rows",
        ),
    ],
)
def test_positions_that_do_not_fit(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer().value_grad_and_statistics(mlp_params(), *batch(), positions=positions)


def test_positions_by_themselves() -> None:
    with pytest.raises(ValueError, match="segment_ids and num_segments go together"):
        Positions(segment_ids=jnp.zeros(3, int))
    with pytest.raises(ValueError, match="readout='max': allowed is 'mean' or 'sum'"):
        Positions(readout="max")
    with pytest.raises(ValueError, match="mask='zero': allowed is an array, None or 'gradient'"):
        Positions(mask="zero")


def test_a_convolution_counts_examples_first() -> None:
    """As in PyTorch, examples come first in a convolution whatever `batch_dim` says of the other layers."""

    def apply(p: Any, x: Array) -> Array:
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME")

    params = {"w": normal(0, 3, 2, 3)}
    x, mask = normal(1, 4, 2, 5), jnp.asarray(np.arange(20).reshape(4, 5) % 3 > 0)
    ours = KFAC(apply, summed, params, x, approximation="reduce")
    compute = jax.jit(ours.value_grad_and_statistics)
    for first, last in (
        (Positions(), Positions(batch_dim=1)),
        ({"w": Positions(mask)}, {"w": Positions(mask.T, batch_dim=1)}),
    ):
        want, got = (compute(params, x, positions=p)[2]["w"] for p in (first, last))
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            np.testing.assert_array_equal(a, b)


def traced(ours: KFAC, params: Any, *args: Any) -> None:
    """A step's statistics without computing them: what is wrong shows where they are traced."""
    jax.eval_shape(ours.value_grad_and_statistics, params, *args)


def test_the_fisher_needs_its_arguments() -> None:
    with pytest.raises(ValueError, match="fisher='mc' needs loss_type"):
        optimizer(fisher="mc")
    with pytest.raises(ValueError, match="pass rng="):
        traced(optimizer(fisher="mc", loss_type="softmax_cross_entropy"), mlp_params(), *batch())
    with pytest.raises(ValueError, match=r"loss_type 'hinge'.*known are"):
        traced(optimizer(fisher="exact", loss_type="hinge"), mlp_params(), *batch())
    wide = {"w": normal(0, 4, 600)}
    ours = KFAC(
        lambda p, x: x @ p["w"], summed, wide, normal(1, 3, 4), fisher="exact", loss_type="mean_squared_error"
    )
    with pytest.raises(ValueError, match=r"600 outputs of an example.*fisher='mc'"):
        traced(ours, wide, normal(1, 3, 4))


def test_factors_before_statistics() -> None:
    ours = optimizer()
    with pytest.raises(RuntimeError, match="no layer has statistics yet: make a statistics step"):
        ours.factors(ours.init(mlp_params()))
    with pytest.raises(ValueError, match="reduction='max': allowed is 'sum' or 'mean'"):
        ours.factors(ours.init(mlp_params()), reduction="max")
    with pytest.raises(ValueError, match="holds 0 states of K-FAC"):
        ours.factors(optax.adam(1e-3).init(mlp_params()))


def test_a_batch_that_does_not_divide() -> None:
    class Mesh:
        size = 4
        axis_names = ("batch",)

    with pytest.raises(ValueError, match=r"batch\['x'\] of shape \(6, 2\) cannot be split over 4 devices"):
        shard_batch({"x": np.ones((6, 2))}, Mesh())
    assert batch_mesh().axis_names == ("batch",)
