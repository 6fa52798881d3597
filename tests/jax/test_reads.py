"""What becomes of a product before it is an output: who reads it, with which bias, whether gradients come back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import PartitionSpec

from algoperf_kfac.jax import KFAC, Positions
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.layers import PARTIAL_BIAS, SHARED_BIAS
from tests.jax.models import Apply, check, raw, wavy
from tests.jax.support import normal, observe

N, D, K = 6, 4, 3


def silent(make: Callable[[], KFAC]) -> KFAC:
    """What is made, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


def made(apply: Apply, *args: Any, **shapes: tuple[int, ...]) -> tuple[KFAC, Any]:
    params = raw(apply, **shapes)[1]
    return KFAC(apply, wavy, params, *args), params


# Biases.


def gated(p: Any, x: Array) -> Array:
    out = x @ p["w"]
    return out * jax.nn.sigmoid(out + p["b"])


def relative(p: Any, x: Array) -> Array:
    """Attention with a bias for contents and one for positions (Transformer-XL)."""
    query = x @ p["w"]
    return (query + p["b"]) @ x[:, :K].T + (query + p["c"]) @ x[:, 1:].T


def in_a_block(p: Any, x: Array) -> Array:
    """The product leaves a rematerialised block before the bias is added, and is read without it, too."""
    out = jax.checkpoint(lambda w, x: x @ w)(p["w"], x)
    return jnp.tanh(out + p["b"]) + out


def among_branches(p: Any, x: Array) -> Array:
    out = x @ p["w"]
    return lax.cond(x[0, 0] > 0, lambda out: out + p["b"], lambda out: 2 * out, out)


@pytest.mark.parametrize("apply", [gated, relative, in_a_block])
def test_a_bias_of_one_reader_is_none_of_the_layer(apply: Apply) -> None:
    """The product's gradient is that of all its readers, the bias's that of one: [W b] is no layer."""
    names = {"b", "c"} if apply is relative else {"b"}
    optimizer, _ = made(apply, normal(1, N, D), w=(D, K), **dict.fromkeys(names, (K,)))
    (layer,) = optimizer.coverage().layers
    assert (layer.weight, layer.bias) == ("w", None)
    reasons = {f.name: f.reason for f in optimizer.coverage().fallbacks}
    assert reasons.keys() == names
    if apply is not in_a_block:
        assert set(reasons.values()) == {PARTIAL_BIAS}


def test_a_bias_in_one_of_two_branches_is_none() -> None:
    optimizer, _ = made(among_branches, normal(1, N, D), w=(D, K), b=(K,))
    assert [layer.bias for layer in optimizer.coverage().layers] == [None]


def test_a_bias_of_two_layers_is_said_to_be_one() -> None:
    optimizer, _ = made(
        lambda p, x: (x @ p["v"] + p["b"]) * (x @ p["w"] + p["b"]), normal(1, N, D), v=(D, K), w=(D, K), b=(K,)
    )
    assert {f.name: f.reason for f in optimizer.coverage().fallbacks} == {"b": SHARED_BIAS}


def test_a_bias_added_for_each_reader_is_the_layers() -> None:
    """Both readers add the same one, and what reads without a gradient changes none."""

    def apply(p: Any, x: Array) -> Array:
        out = x @ p["w"]
        scale = lax.stop_gradient(jnp.abs(out).max())
        return jnp.tanh(out + p["b"]) / scale + jnp.sin(out + p["b"])

    params = raw(apply, w=(D, K), b=(K,))[1]
    optimizer = check(apply, params, (normal(1, N, D),))
    assert [layer.bias for layer in optimizer.coverage().layers] == ["b"]


def test_a_bias_with_another_use_as_a_summand_leaves_its_layer() -> None:
    """A parameter that is a weight here, and elsewhere added to a product as no bias could be, has two uses."""
    x = normal(1, D, D)
    with pytest.warns(UserWarning, match=r"left to NadamW: w \(also read by add"):
        optimizer, _ = made(lambda p, x: jnp.tanh(x @ p["w"]) + (x @ p["v"] + p["w"]), x, w=(D, D), v=(D, D))
    assert [layer.weight for layer in optimizer.coverage().layers] == ["v"]


# Readers without a gradient.


@pytest.mark.parametrize("what", ["weight", "bias", "product", "output"])
def test_a_print_is_no_use(what: str) -> None:
    def apply(p: Any, x: Array) -> Array:
        product = x @ p["w"]
        values = {"weight": p["w"], "bias": p["b"], "product": product, "output": product + p["b"]}
        jax.debug.callback(lambda _: None, values[what])
        return product + p["b"]

    optimizer = silent(lambda: made(apply, normal(1, N, D), w=(D, K), b=(K,))[0])
    assert optimizer.coverage().fraction == 1


def network(p: Any, x: Array) -> Array:
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def attacked(p: Any, x: Array) -> Array:
    """The inputs of an adversarial example (fast gradient sign)."""
    return x + 0.1 * jnp.sign(jax.grad(lambda x: wavy(network(p, x)))(x))


def test_an_attack_within_the_model_is_no_use() -> None:
    """Backward passes on the way to it read the weights transposed; no gradient comes back through a sign."""
    x = normal(1, N, D)
    params = raw(network, a=(D, 5), b=(5,), c=(5, K))[1]
    within = silent(lambda: KFAC(lambda p, x: network(p, attacked(p, x)), wavy, params, x))
    gradient, factors = observe(within, params, x)
    before = KFAC(network, wavy, params, x)
    expected, same = observe(before, params, attacked(params, x))
    assert within.coverage().fraction == 1
    for ours, theirs in zip(jax.tree.leaves((gradient, factors)), jax.tree.leaves((expected, same)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_gradient_within_the_loss_is_a_use() -> None:
    """Of a penalty on the gradient a gradient does come back: two layouts, said by name."""
    params = raw(network, a=(D, 5), b=(5,), c=(5, K))[1]

    def apply(p: Any, x: Array) -> tuple[Array, Array]:
        return network(p, x), jax.grad(lambda x: wavy(network(p, x)))(x)

    with pytest.warns(UserWarning, match=r"left to NadamW: a \(read in different layouts.*c \("):
        KFAC(apply, wavy, params, normal(1, N, D))


def test_a_target_without_gradient_counts_no_rows() -> None:
    """As in SimSiam: one branch of two learns."""
    x, y = normal(1, N, D), normal(2, N, D)
    params = raw(network, a=(D, 5), b=(5,), c=(5, K))[1]
    twin = KFAC(lambda p, x, y: network(p, x) * lax.stop_gradient(network(p, y)), wavy, params, x, y)
    _, factors = observe(twin, params, x, y)
    _, alone = observe(KFAC(network, wavy, params, x), params, x)
    np.testing.assert_allclose(factors["a"].A[0], alone["a"].A[0], rtol=1e-10)


# Layouts and moves.


def test_what_undoes_itself_is_no_other_layout() -> None:
    def apply(p: Any, x: Array) -> Array:
        again = p["w"].T.T.reshape(2, -1, K).reshape(D, K)
        return jnp.tanh(x @ p["w"]) + x @ again

    assert silent(lambda: made(apply, normal(1, N, D), w=(D, K))[0]).coverage().fraction == 1


def test_a_transposed_twin_is_said() -> None:
    with pytest.warns(UserWarning, match=r"w \(read in different layouts by its calls\)"):
        made(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, normal(1, N, D), w=(D, K))


def on_a_device(p: Any, x: Array) -> Array:
    return x @ jax.device_put(p["w"], jax.devices()[0])


def resharded(p: Any, x: Array) -> Array:
    return x @ jax.sharding.reshard(p["w"], PartitionSpec())


@pytest.mark.parametrize("apply", [on_a_device, resharded])
def test_where_a_weight_lies_does_not_matter(apply: Apply) -> None:
    x = normal(1, N, D)
    if apply is resharded:
        if not hasattr(jax.sharding, "reshard"):
            pytest.skip("this JAX has no reshard")
        mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        enter = getattr(jax.sharding, "use_mesh", None) or jax.set_mesh
        with enter(mesh):
            optimizer = made(apply, x, w=(D, K))[0]
    else:
        optimizer = made(apply, x, w=(D, K))[0]
    assert optimizer.coverage().fraction == 1


# What is covered of nothing, or not at all.


def test_weights_of_constants_are_said() -> None:
    basis = jnp.cos(jnp.arange(D * 2.0).reshape(D, 2))
    with pytest.warns(UserWarning, match="t: nothing but constants is multiplied by the weight"):
        made(lambda p, x: x @ (basis @ p["t"]), normal(1, N, D), t=(2, K))


RELATIVE = jnp.cos(jnp.arange(N * 2.0).reshape(N, 2))


def with_a_time(p: Any, x: Array, t: Array) -> Array:
    """One time, or noise level, for the whole batch, embedded before anything else."""
    return jnp.tanh(x @ p["w"] + jnp.stack([jnp.sin(t), t])[None] @ p["e"]) @ p["v"]


def with_a_time_that_layers_read(p: Any, x: Array, t: Array) -> Array:
    """The same through two layers, as in diffusion models."""
    time = jnp.tanh(jnp.stack([jnp.sin(t), t])[None] @ p["e"]) @ p["u"]
    return jnp.tanh(x @ p["w"] + time) @ p["v"]


def with_relative_positions(p: Any, x: Array, t: Array) -> Array:
    """A bias of each position that a layer makes of constants (Swin v2)."""
    return jnp.tanh(x @ p["w"] + (RELATIVE @ p["e"]).mean(0) + t) @ p["v"]


@pytest.mark.parametrize("apply", [with_a_time, with_a_time_that_layers_read, with_relative_positions])
def test_a_layer_of_constants_is_not_asked_how_many_examples_there_are(apply: Apply) -> None:
    """It comes first in its model, and sees one row or as many as there are constants."""
    x, t, c = normal(1, 4, D), jnp.float64(0.3), np.asarray(normal(2, 4, K))
    shapes = {"e": (2, 5), "w": (D, 5), "v": (5, K)} | (
        {"u": (5, 5)} if apply is with_a_time_that_layers_read else {}
    )
    params = raw(apply, **shapes)[1]
    loss = lambda f, *args: jnp.square(f - c).sum(1).mean()  # noqa: E731
    if apply is not with_relative_positions:  # a number among the arguments is another one at each step
        optimizer = silent(lambda: KFAC(apply, loss, params, x, t))
    else:
        with pytest.warns(UserWarning, match="e: nothing but constants"):
            optimizer = KFAC(apply, loss, params, x, t)
    run = jax.jit(lambda: optimizer.value_grad_and_statistics(params, x, t)[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = run()
    gradients = 2 * (np.asarray(apply(params, x, t)) - c)  # of each example's own loss
    np.testing.assert_allclose(statistics["v"].b[0][0], gradients.T @ gradients, rtol=1e-10)
    assert float(statistics["v"].examples) == 4


def with_a_drawn_time(p: Any, x: Array, key: Array) -> Array:
    """The time is drawn within the model, one for the whole batch."""
    return with_a_time_that_layers_read(p, x, jax.random.uniform(key, (), x.dtype))


def with_a_step(p: Any, x: Array, t: Array) -> Array:
    """The time is the number of a step, and has a row of a table."""
    return jnp.tanh(x @ p["w"] + jnp.tanh(p["table"][t][None] @ p["u"])) @ p["v"]


def with_numbered_positions(p: Any, x: Array) -> Array:
    """The positions' numbers are kept among the parameters."""
    return jnp.tanh(x @ p["w"] + jnp.tanh(p["table"][p["numbers"]] @ p["u"]).mean(0)) @ p["v"]


@pytest.mark.parametrize(
    ("apply", "args"),
    [
        (with_a_drawn_time, (jax.random.key(3),)),
        (with_a_drawn_time, (jax.random.PRNGKey(3),)),
        (with_a_step, (jnp.asarray(2),)),
        (with_numbered_positions, ()),
    ],
    ids=["key", "old key", "step", "positions"],
)
def test_keys_steps_and_buffers_are_no_examples(apply: Apply, args: tuple[Array, ...]) -> None:
    """A layer that reads nothing else comes first, and sees one row, or one for each position."""
    x = normal(1, 4, D)
    params = raw(network, e=(2, 5), u=(5, 5), w=(D, 5), v=(5, K))[1]
    params |= {"table": normal(2, 6, 5), "numbers": jnp.arange(6)}
    if apply is not with_a_drawn_time:
        del params["e"]
    optimizer = KFAC(apply, lambda f, *_: jnp.square(f).sum() / 4, params, x, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = optimizer.value_grad_and_statistics(params, x, *args)[2]
    gradients = 2 * np.asarray(apply(params, x, *args))  # of each example's own loss
    np.testing.assert_allclose(statistics["v"].b[0][0], gradients.T @ gradients, rtol=1e-10)


def generated(p: Any, _: Array, key: Array) -> Array:
    return network(p, jax.random.normal(key, (N, D), p["a"].dtype))


def over_a_batch_of_its_own(p: Any, t: Array) -> Array:
    """Data are closed over, beside a number for the whole batch."""
    return with_a_time_that_layers_read(
        {"w": p["a"], "v": p["c"], **p}, jnp.cos(jnp.arange(N * D)).reshape(N, D), t
    )


@pytest.mark.parametrize("apply", [generated, over_a_batch_of_its_own])
def test_examples_that_are_no_argument(apply: Apply) -> None:
    """They are drawn by the model (a generator's step, whatever else it is given), or closed over."""
    args = (normal(1, 3, D), jax.random.key(1)) if apply is generated else (jnp.asarray(0.5),)
    shapes = {"b": (5,)} if apply is generated else {"e": (2, 5), "u": (5, 5)}
    params = raw(network, **shapes, a=(D, 5), c=(5, K))[1]
    optimizer = KFAC(apply, lambda f, *_: jnp.square(f).sum() / N, params, *args)
    statistics = optimizer.value_grad_and_statistics(params, *args)[2]
    gradients = 2 * np.asarray(apply(params, *args))
    np.testing.assert_allclose(statistics["c"].b[0][0], gradients.T @ gradients, rtol=1e-10)


def test_a_batch_that_is_closed_over_is_none_of_them() -> None:
    x = normal(1, N, D)
    params = raw(network, a=(D, 5), b=(5,), c=(5, K))[1]
    assert silent(lambda: KFAC(lambda p: network(p, x), wavy, params)).coverage().fraction == 1


def stacked(p: Any, x: Array) -> Array:
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def sliced(p: Any, x: Array) -> Array:
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


@pytest.mark.parametrize("apply", [stacked, sliced])
def test_nothing_covered_is_said(apply: Apply) -> None:
    """And a slice that a loop takes of a stack is no row of an embedding."""
    with pytest.warns(UserWarning, match="w") as said:
        optimizer, _ = made(apply, normal(1, N, D), w=(3, D, D))
    (fallback,) = optimizer.coverage().fallbacks
    assert "embedding" not in fallback.reason
    assert fallback.reason in str(said[0].message)


def test_a_slice_of_weights_beside_a_layer_is_said() -> None:
    with pytest.warns(UserWarning, match=r"left to NadamW: w \(dot_general reads a function of it"):
        made(lambda p, x: sliced(p, x) @ p["v"], normal(1, N, D), w=(3, D, D), v=(D, K))


# Arguments, and what is returned.


def test_numbers_of_python_stay_numbers() -> None:
    def apply(p: Any, x: Array, depth: int, scale: float) -> Array:
        for _ in range(depth):
            x = jnp.tanh(x @ p["w"])
        return x * scale

    x = normal(1, N, D)
    params = raw(apply, w=(D, D))[1]
    optimizer = KFAC(apply, wavy, params, x, 2, 0.5)
    value, _, statistics = optimizer.value_grad_and_statistics(params, x, 2, 0.5)
    np.testing.assert_allclose(value, wavy(apply(params, x, 2, 0.5)))
    assert list(statistics) == ["w"]


def test_numbers_of_python_beside_the_outputs() -> None:
    """From within a program or a branch, too: they change no precision, and in aux they stay numbers."""

    def apply(p: Any, x: Array) -> Any:
        given = jax.jit(lambda out, a, n: (out, a, n))(x @ p["w"], 0.5, 2)
        chosen = lax.cond(x[0, 0] > 0, lambda: 1.5, lambda: -1.5)
        return {"given": given, "chosen": chosen, "none": sum([]), "half": 0.25}, {"depth": 3}

    def loss(f: Any, x: Array) -> Array:
        out, a, n = f["given"]
        return jnp.square(out).mean() * a + n * f["chosen"] + f["none"] + f["half"]

    x = normal(1, N, D).astype(jnp.bfloat16)
    params = {"w": normal(2, D, K).astype(jnp.bfloat16)}
    optimizer = KFAC(apply, loss, params, x, has_aux=True)
    (value, aux), gradient, statistics = optimizer.value_grad_and_statistics(params, x)
    (expected, _), slope = jax.value_and_grad(lambda p: (loss(apply(p, x)[0], x), None), has_aux=True)(params)
    assert aux == {"depth": 3}
    assert isinstance(aux["depth"], int)
    assert value.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient["w"], slope["w"])
    assert list(statistics) == ["w"]


def test_a_model_with_collectives_is_made_outside_of_what_binds_their_axis() -> None:
    """SyncBatchNorm: its axis is bound by the pmap around a step, which comes after the optimizer."""

    def apply(p: Any, x: Array) -> Array:
        hidden = x @ p["a"]
        return jnp.tanh(hidden - lax.pmean(lax.pmean(hidden.mean(0), "batch"), "model")) @ p["c"]

    x = normal(1, 2, N, D)
    params = raw(apply, a=(D, 5), c=(5, K))[1]
    optimizer = KFAC(apply, wavy, params, x[0])
    step = jax.vmap(lambda x: optimizer.value_grad_and_statistics(params, x)[2]["a"].a[0], axis_name="batch")
    sums = jax.vmap(step, axis_name="model")(x[None])
    np.testing.assert_allclose(sums[0, 1, 0], x[1].T @ x[1], rtol=1e-10)
    with pytest.raises(NameError, match="batch"):
        optimizer.value_grad_and_statistics(params, x[0])


# Rows.


def frames(p: Any, x: Array) -> Array:
    flat = x.reshape(-1, D)
    return (jnp.tanh(flat @ p["a"]) @ p["c"]).reshape(*x.shape[:2], K).mean(1)


def test_rows_that_the_outputs_do_not_have_are_said() -> None:
    """Frames of N videos, flattened: nothing else tells that N * T rows are no examples."""
    x = normal(1, N, 5, D)
    params = raw(frames, a=(D, 4), c=(4, K))[1]
    optimizer = KFAC(frames, wavy, params, x)
    with pytest.warns(UserWarning, match=rf"layer a sees {5 * N} rows, and the model's outputs have {N}"):
        optimizer.value_grad_and_statistics(params, x)
    again = KFAC(frames, wavy, params, x)
    silent(lambda: (again.value_grad_and_statistics(params, x, loss_normalizer=N), again)[1])


def flattened(p: Any, x: Array) -> Array:
    """A language model whose logits are flattened for the loss."""
    return (jnp.tanh(x @ p["a"]) @ p["c"]).reshape(-1, K)


def pairwise(p: Any, x: Array) -> Array:
    """Logits of all pairs: the rows stand in the second dimension, too."""
    views = x.reshape(-1, D) @ p["a"]
    return (views @ p["c"])[:N] @ views[:, :K].T


@pytest.mark.parametrize("apply", [flattened, pairwise])
def test_other_shapes_of_outputs_say_nothing(apply: Apply) -> None:
    x = normal(1, N, 5, D)
    params = raw(apply, a=(D, 4), c=(4, K))[1]
    optimizer = KFAC(apply, wavy, params, x)
    silent(lambda: (optimizer.value_grad_and_statistics(params, x), optimizer)[1])


# Branches within a loop over stacked layers.


def dropping(p: Any, x: Array, keep: Array) -> Array:
    def body(h: Array, layer: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w, b, kept = layer
        return lax.cond(kept, lambda h: h + jnp.tanh(h @ w + b), lambda h: h, h), None

    return lax.scan(body, x, (p["w"], p["b"], keep))[0] @ p["c"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_dropped_layer_of_a_stack_stays_where_it_is(weight_decay: float) -> None:
    """Each slice is a layer: the one that is dropped takes no step by its momentum, and does not decay."""
    x, everything, dropped = normal(1, N, D), jnp.array([True] * 3), jnp.array([True, False, True])
    params = raw(dropping, w=(3, D, D), b=(3, D), c=(D, K))[1]
    options: dict[str, Any] = {"learning_rate": 1e-2, "factor_interval": 1, "weight_decay": weight_decay}
    optimizer = KFAC(dropping, wavy, params, x, everything, **options)

    @jax.jit
    def step(params: Any, state: Any, keep: Array) -> tuple[Any, Any]:
        _, gradient, statistics = optimizer.value_grad_and_statistics(params, x, keep)
        return optimizer.update(gradient, state, params, statistics=statistics)

    updates, state = step(params, optimizer.init(params), everything)
    assert all(float(jnp.abs(updates[name]).min()) > 0 for name in ("w", "c"))
    updates, after = step(params, state, dropped)
    for name in ("w", "b"):
        moved = [float(jnp.abs(updates[name][i]).max()) for i in range(3)]
        assert moved[1] == 0
        assert min(moved[0], moved[2]) > 0
    before, now = (find_state(whole).mu for whole in (state, after))
    for name in ("w", "b"):
        np.testing.assert_array_equal(before[name][1], now[name][1])
        assert (np.asarray(before[name][0]) != np.asarray(now[name][0])).any()


# Constants within the program.


@jax.custom_vjp
def by_table(h: Array, table: Array) -> Array:
    """As an ODE's solution at given times: its derivative, written by hand, takes entries in a loop."""
    return h * table.sum()


def by_table_backward(table: Array, g: Array) -> tuple[Array, Array]:
    total = lax.fori_loop(0, len(table), lambda i, total: total + table[i], jnp.zeros(()))
    return g * total, jnp.zeros_like(table)


by_table.defvjp(lambda h, table: (by_table(h, table), table), by_table_backward)


@pytest.mark.parametrize("compiled", [True, False])
def test_constants_reach_derivatives_written_by_hand_as_arrays(compiled: bool) -> None:
    """`jax.make_jaxpr` keeps them as NumPy's, which no traced number indexes."""

    def apply(p: Any, x: Array) -> Array:
        return by_table(jnp.tanh(x @ p["w"]), jnp.array([0.25, 1.5])) @ p["v"]

    x = normal(1, N, D)
    optimizer, params = made(apply, x, w=(D, 5), v=(5, K))
    run = optimizer.value_grad_and_statistics
    _, gradient, _ = (jax.jit(run) if compiled else run)(params, x)
    twin = jax.grad(lambda p: wavy(1.75 * jnp.tanh(x @ p["w"]) @ p["v"]))(params)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-10, atol=1e-12), gradient, twin)


# Calls on constants beside calls on data.


def difference(p: Any, x: Array) -> Array:
    """Zero at zero."""
    return network(p, x) - network(p, jnp.zeros(D))


def slope(p: Any, x: Array) -> Array:
    """The derivative along one direction, as a PINN has it; the direction is the same for all examples."""
    along = jnp.zeros(D).at[0].set(1.0)
    return jax.vmap(lambda x: jax.jvp(lambda x: network(p, x), (x,), (along,))[1])(x)


@pytest.mark.parametrize("positions", [None, Positions("gradient")], ids=["all", "gradient"])
@pytest.mark.parametrize("apply", [difference, slope])
def test_a_call_on_constants_is_none_of_the_batchs_examples(apply: Apply, positions: Positions | None) -> None:
    """It has one row, which changes nothing about what the loss was divided by; and no warning asks for more."""
    x = normal(1, N, D)
    params = raw(network, a=(D, 5), b=(5,), c=(5, K))[1]
    mean = lambda f, x: jnp.square(f).sum() / N  # noqa: E731
    optimizer = silent(lambda: KFAC(apply, mean, params, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = jax.jit(lambda: optimizer.value_grad_and_statistics(params, x, positions=positions)[2])
        statistics = run()
    # Of each example's own loss, at the last layer's outputs: of `difference` one more row, at zero.
    gradients = 2 * np.asarray(apply(params, x))
    if apply is difference:
        gradients = np.concatenate([gradients, -gradients.sum(0, keepdims=True)])
    np.testing.assert_allclose(statistics["c"].b[0][0], gradients.T @ gradients, rtol=1e-10)
