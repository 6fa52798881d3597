"""How people hand things over: what works, and what gets one line with the way out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import Array, lax
from orbax import checkpoint

from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.jax import KFAC, KFACConfig, add, discover, from_orbax, kfac, layer_states, metrics
from algoperf_kfac.jax.transform import find_state
from algoperf_kfac.layers import NEVER_SEEN
from tests.jax.models import check, wavy
from tests.jax.support import factors, normal
from tests.jax.toys import OPTIONS, batch, cross_entropy, mlp, mlp_params, optimizer, steps, train


def assert_close(first: Any, second: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), first, second)


# Statistics that never come ---------------------------------------------------------------------------------------


def test_a_run_without_statistics_is_said_to_be_one() -> None:
    """Once, where the update is traced; and no metric claims anything of K-FAC."""
    ours = optimizer()
    state = TrainState.create(apply_fn=mlp, params=mlp_params(), tx=ours.transformation)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        x, y = batch()
        return state.apply_gradients(grads=jax.grad(lambda p: cross_entropy(mlp(p, x), x, y))(state.params))

    with pytest.warns(UserWarning, match=r"^K-FAC: an update without statistics, and none .* NadamW") as said:
        state = [state := step(state) for _ in range(12)][-1]
    assert len(said) == 1
    assert said[0].filename == __file__
    with pytest.warns(
        UserWarning, match="of the 12 updates so far 7 were statistics steps, and statistics came with 0"
    ):
        metrics = ours.metrics(state.opt_state)
    assert metrics["coverage"] == metrics["statistics_steps"] == 0
    assert np.isnan(metrics["cosine"])
    assert np.isnan(metrics["l0/graft_ratio"])
    with pytest.raises(RuntimeError, match="no layer has statistics yet"):
        ours.factors(state.opt_state)


def test_a_run_with_statistics_says_nothing() -> None:
    ours = optimizer()
    plain, with_statistics, _ = steps(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = train(
            ours, jax.jit(plain), jax.jit(with_statistics), mlp_params(), ours.init(mlp_params()), 0, 6
        )
        metrics = ours.metrics(state)
    assert metrics["coverage"] == 1
    assert metrics["statistics_steps"] == 4
    assert 0 < metrics["cosine"] < 1


def test_an_optimizer_made_anew_at_each_trace() -> None:
    """By inject_hyperparams: it knows what came before."""
    ours = optimizer()
    make = lambda learning_rate: kfac(ours.layers, ours.config, learning_rate=learning_rate)  # noqa: E731
    rated = optax.inject_hyperparams(make)(learning_rate=0.1)
    _, gradient, statistics = jax.eval_shape(ours.value_grad_and_statistics, mlp_params(), *batch())
    state = rated.init(mlp_params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (statistics, None):
            jax.eval_shape(lambda g, s, st: rated.update(g, s, g, statistics=st), gradient, state, given)


def test_micro_batches_in_multi_steps() -> None:
    """Statistics of micro-batches added up and passed with the last are those of one large batch."""
    params, (x, y), k = mlp_params((4, 3)), batch(24), 3
    ours = KFAC(mlp, cross_entropy, params, x, y, **OPTIONS)
    multi = optax.MultiSteps(ours.transformation, k)
    whole, state, many = ours.init(params), multi.init(params), params
    compute, update_part = jax.jit(ours.value_grad_and_statistics), jax.jit(multi.update)
    for step in range(2):
        _, gradient, statistics = compute(params, x, y)
        updates, whole = ours.update(gradient, whole, params, statistics=statistics)  # one that is not compiled
        params, total = optax.apply_updates(params, updates), None
        for part in range(k):
            assert ours.is_statistics_step((step * k + part) // k)
            rows = slice(8 * part, 8 * part + 8)
            _, gradient, new = compute(many, x[rows], y[rows])
            total = new if total is None else add(total, new)
            updates, state = update_part(gradient, state, many, statistics=total)
            many = optax.apply_updates(many, updates)
    assert_close(many, params)
    assert ours.metrics(state)["statistics_steps"] == 2


def test_statistics_that_multi_steps_drops() -> None:
    """Asked for by the number of the micro-batch, most never arrive: the metrics say so, with the remedy."""
    ours, k = optimizer(), 4
    multi = optax.MultiSteps(ours.transformation, k)
    plain, with_statistics, _ = steps(ours, multi)
    _, state = train(ours, jax.jit(plain), jax.jit(with_statistics), mlp_params(), multi.init(mlp_params()), 0, 40)
    with pytest.warns(UserWarning, match=r"of the 10 updates so far 6 .* came with 0.*MultiSteps.*step // k"):
        assert ours.metrics(state)["statistics_steps"] == 0


def test_a_loop_that_never_passes_statistics_shows_in_the_metrics() -> None:
    """Without the configuration, too, which a training state does not have."""
    ours, params = optimizer(), mlp_params()
    _, state = jax.jit(ours.transformation.update)(params, ours.transformation.init(params), params)
    with pytest.warns(UserWarning, match=r"of the 1 updates so far 1 .* came with 0"):
        assert metrics(state, ours.layers)["coverage"] == 0


# States and layers ------------------------------------------------------------------------------------------------

SQUARES = {"a": (4, 4), "b": (4, 4), "c": (4, 4)}


def first_a(p: Any, x: Array, y: Array) -> Array:
    return jnp.tanh(jnp.tanh(x @ p["a"]) + 10 * x @ p["b"]) @ p["c"]


def first_b(p: Any, x: Array, y: Array) -> Array:
    return jnp.tanh(10 * x @ p["b"] + jnp.tanh(x @ p["a"])) @ p["c"]


def of_squares(apply: Callable[..., Any], **options: Any) -> tuple[KFAC, Any, Any]:
    params = {name: normal(i, *shape) / 2 for i, (name, shape) in enumerate(SQUARES.items())}
    ours = KFAC(apply, cross_entropy, params, *batch(), **OPTIONS, **options)
    return ours, params, ours.init(params)


def test_names_do_not_depend_on_the_order_of_calls() -> None:
    """A module's name is that of its only matrix, as in PyTorch; of several each has its own."""
    params = {
        "m": {"u": normal(0, 4, 4), "w": normal(1, 4, 4)},
        "one": {"kernel": normal(2, 4, 3), "scores": normal(3, 4), "bias": normal(4, 1, 3)},
    }

    def names(order: str) -> list[str]:
        def apply(p: Any, x: Array, y: Array) -> Array:
            x = sum(jnp.tanh(x @ p["m"][name]) for name in order)
            out, score = x @ p["one"]["kernel"] + p["one"]["bias"], x @ p["one"]["scores"]
            return out * score[:, None]

        return sorted(KFAC(apply, cross_entropy, params, *batch()).layers.covered)

    assert names("uw") == names("wu") == ["m/u", "m/w", "one", "one/scores"]


@pytest.mark.parametrize("way", ["as it is", "flax", "orbax", "orbax without a template"])
def test_a_state_under_another_order_of_calls(way: str, tmp_path: Path) -> None:
    """Equal layers share a stack; each finds its own factors again, and the update is the same."""
    ours, params, state = of_squares(first_a)
    other, _, fresh = of_squares(first_b)
    assert list(ours.layers.covered) != list(other.layers.covered)
    update = jax.jit(ours.update)
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    _, state = update(gradient, state, params, statistics=statistics)
    if way == "flax":
        loaded = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    elif way.startswith("orbax"):
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            path = tmp_path / "state"
            loaded = (
                checkpointer.restore(path, fresh)
                if way == "orbax"
                else from_orbax(fresh, checkpointer.restore(path))
            )
    else:
        loaded = state
    assert_close(other.factors(loaded), ours.factors(state))
    assert_close(jax.jit(other.update)(gradient, loaded, params)[0], update(gradient, state, params)[0])


def test_a_state_of_other_layers() -> None:
    ours, params, state = of_squares(first_a)
    less, _, fresh = of_squares(first_a, exclude="b")
    with pytest.raises(
        ValueError, match=r"state is of other layers than the optimizer: b only in the state, none only"
    ):
        less.update(params, state, params)
    with pytest.raises(ValueError, match="state is of other layers"):
        less.metrics(state)
    with pytest.raises(
        ValueError, match="the saved state is of the layers a, b, c, the state to load it into of a, c"
    ):
        flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    assert ours.layers.covered.keys() == {"a", "b", "c"}


def test_orbax_without_a_template(tmp_path: Path) -> None:
    ours, params, state = of_squares(first_a)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        raw = checkpointer.restore(tmp_path / "state")
    for call in (lambda: ours.metrics(raw), lambda: ours.update(params, raw, params)):
        with pytest.raises(
            ValueError, match=r"state is a dict, not a KFACState: restore it with a template.*from_orbax\("
        ):
            call()


# Parts of the parameters ------------------------------------------------------------------------------------------


def only(names: set[str], yes: Any = True, no: Any = False) -> Any:
    params = mlp_params()
    return {name: jax.tree.map(lambda _, name=name: yes if name in names else no, params[name]) for name in params}


@pytest.mark.parametrize(("exclude", "masked"), [((), True), ((), False), (("l2",), True)])
def test_other_optimizers_for_other_layers(exclude: tuple[str, ...], masked: bool) -> None:
    """`masked` and `multi_transform` around K-FAC leave the other layers what they were."""
    ours = optimizer(exclude=exclude, learning_rate=0.1)
    inner = ours.transformation
    if masked:
        transformation = optax.masked(inner, only({"l0", "l1"}))
    else:
        kinds = {"kfac": inner, "sgd": optax.sgd(1.0)}
        transformation = optax.multi_transform(kinds, only({"l0", "l1"}, "kfac", "sgd"))
    params = mlp_params()
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    whole, _ = jax.jit(ours.update)(gradient, ours.init(params), params, statistics=statistics)
    updates, state = jax.jit(transformation.update)(
        gradient, transformation.init(params), params, statistics=statistics
    )
    for name in ("l0", "l1"):
        assert_close(updates[name], whole[name])
    assert_close(updates["l2"], gradient["l2"] if masked else jax.tree.map(lambda g: -g, gradient["l2"]))
    assert ours.factors(state).keys() == {"l0", "l1"}
    assert ours.metrics(state)["l0/refreshes"] == 1


def test_two_optimizers_in_one_state() -> None:
    """Rates for each group; what looks at a state is told which of both."""
    ours = optimizer()
    kinds = {"fast": kfac(ours.layers, ours.config, learning_rate=0.1), "slow": ours.transformation}
    state = optax.multi_transform(kinds, only({"l0"}, "fast", "slow")).init(mlp_params())
    with pytest.raises(ValueError, match=r"holds 2 states of K-FAC, not one: .*state\.inner_states\[label\]"):
        ours.metrics(state)
    assert "l0/cosine" in ours.metrics(state.inner_states["fast"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: optax.flatten(t).init(mlp_params()),
        lambda t: optax.tree_map_params(t, lambda leaf: leaf, t.init(mlp_params())),
    ],
    ids=["flatten", "tree_map_params"],
)
def test_transformations_that_hand_over_another_tree(wrong: Callable[[Any], Any]) -> None:
    message = r"params is not the tree .*none of l0/b, l0/w.*optax\.flatten.*tree_map_with_path"
    with pytest.raises(ValueError, match=message):
        wrong(optimizer().transformation)


def test_a_masked_bias() -> None:
    ours = optimizer()
    mask = jax.tree.map(lambda t: t.ndim > 1, mlp_params())
    with pytest.raises(ValueError, match=r"l0/b is masked and l0/w of the same layer is not.*exclude=\['l0/b'\]"):
        optax.masked(ours.transformation, mask).init(mlp_params())
    optax.masked(optimizer(exclude="*/b").transformation, mask).init(mlp_params())


def test_whole_numbers_among_the_parameters() -> None:
    """They stay as they are, with weight decay too; gradients of theirs may be of JAX's own type for none."""
    params = mlp_params() | {"table": jnp.arange(5), "flag": jnp.array(True)}

    def apply(p: Any, x: Array, y: Array) -> Array:
        return mlp({name: p[name] for name in ("l0", "l1", "l2")}, x) * p["table"][1]

    ours = KFAC(apply, cross_entropy, params, *batch(), **OPTIONS, weight_decay=0.5, learning_rate=0.5)
    reasons = {f.name: f.reason for f in ours.coverage().fallbacks}
    assert reasons == {
        "table": "not differentiable (int32)",
        "flag": "not differentiable (bool)",
    } or "int64" in str(reasons)
    state = ours.init(params)
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    updates, new = jax.jit(ours.update)(gradient, state, params, statistics=statistics)
    assert jax.tree.map(lambda t: t.dtype, new) == jax.tree.map(lambda t: t.dtype, state)
    changed = optax.apply_updates(params, updates)

    @jax.jit
    def plain(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: cross_entropy(apply(p, *batch()), *batch()), allow_int=True)(params)
        assert gradient["flag"].dtype == jax.dtypes.float0
        return ours.update(gradient, state, params)[0]

    updates = plain(params, new)
    for after in (changed, optax.apply_updates(params, updates)):
        for name in ("table", "flag"):
            np.testing.assert_array_equal(after[name], params[name])
            assert after[name].dtype == params[name].dtype
        assert (after["l0"]["w"] != params["l0"]["w"]).all()


def test_parameters_that_cannot_be_trained() -> None:
    key = mlp_params() | {"key": jax.random.key(0)}
    with pytest.raises(ValueError, match="parameter key is a random key: hand it to apply_fn as an argument"):
        KFAC(mlp, cross_entropy, key, *batch())
    wave = mlp_params() | {"wave": jnp.ones((2, 2), jnp.complex128)}
    with pytest.raises(ValueError, match=r"parameter wave is complex: .*two parameters.*multi_transform"):
        KFAC(mlp, cross_entropy, wave, *batch())


def test_a_complex_parameter_of_another_optimizer() -> None:
    """The way out that the error names, with its gradient right."""
    params = {"w": normal(0, 4, 3), "wave": (normal(1, 4, 3) + 1j * normal(2, 4, 3))}

    def apply(p: Any, x: Array) -> Array:
        return x @ p["w"] + jnp.real(x @ p["wave"] * 1j)

    ours = KFAC(apply, lambda f, x: wavy(f), params, normal(3, 5, 4), exclude="wave", **OPTIONS)
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, normal(3, 5, 4))
    assert_close(gradient, jax.jit(jax.grad(lambda p: wavy(apply(p, normal(3, 5, 4)))))(params))
    kinds = {"kfac": ours.transformation, "adam": optax.adam(1e-2)}
    both = optax.multi_transform(kinds, {"w": "kfac", "wave": "adam"})
    updates, _ = jax.jit(both.update)(gradient, both.init(params), params, statistics=statistics)
    assert jnp.iscomplexobj(updates["wave"])
    with pytest.raises(ValueError, match="parameter wave is complex"):
        ours.init(params)


# Arguments --------------------------------------------------------------------------------------------------------


def test_statistics_steps_inside_a_program() -> None:
    """Traced, the question has a traced answer."""
    ours = optimizer(initial_statistics=3, factor_interval=4, refresh_interval=4)
    inside = jax.jit(jax.vmap(ours.is_statistics_step))(jnp.arange(20))
    assert inside.tolist() == [ours.is_statistics_step(step) for step in range(20)]
    assert all(isinstance(ours.is_statistics_step(step), bool) for step in range(5))


@pytest.mark.single
def test_parameters_made_by_numpy() -> None:
    """Taken as JAX takes them: NumPy's float64 is float32 there, and nothing is said of it."""
    x, y = batch()
    wide = jax.tree.map(lambda t: np.asarray(t, np.float64), mlp_params((4, 3))) | {"steps": np.arange(3)}
    mixed = wide | {"l0": {"w": wide["l0"]["w"], "b": jnp.asarray(wide["l0"]["b"], jnp.float32)}}
    narrow = jax.tree.map(jnp.asarray, wide | {"l0": jax.tree.map(jnp.float32, wide["l0"]), "steps": jnp.arange(3)})

    def made(params: Any) -> KFAC:
        return KFAC(lambda p, x, y: mlp({"l0": p["l0"]}, x), cross_entropy, params, x, y, **OPTIONS)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = made(wide)
        assert made(mixed).layers == made(narrow).layers == ours.layers
        state = ours.init(wide)
        assert jax.tree.map(lambda t: t.dtype, state[0].mu) == jax.tree.map(lambda t: t.dtype, narrow)

        @jax.jit
        def updates(params: Any) -> Any:
            _, gradient, statistics = ours.value_grad_and_statistics(params, x, y)
            return ours.update(gradient, state, params, statistics=statistics)[0]

        for params in (wide, mixed):
            jax.tree.map(np.testing.assert_array_equal, updates(params), updates(narrow))


def test_one_pattern() -> None:
    assert list(optimizer(exclude="l1").layers.covered) == ["l0", "l2"]


def test_numbers_of_other_kinds() -> None:
    for number in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5), jnp.asarray(0.5)):
        config = KFACConfig(learning_rate=number, damping=number)
        assert (config.learning_rate, config.damping) == (0.5, 0.5)
    assert KFACConfig(factor_interval=np.int32(5), refresh_interval=jnp.int32(10)).refresh_interval == 10


def test_a_schedule_as_learning_rate() -> None:
    schedule = optax.linear_schedule(0.5, 0.0, 10)
    first, second = optimizer(learning_rate=schedule), optimizer(schedule=schedule)
    third = kfac(first.layers, first.config, learning_rate=schedule)
    _, gradient, statistics = jax.jit(first.value_grad_and_statistics)(mlp_params(), *batch())
    params = mlp_params()
    results = [
        jax.jit(t.update)(gradient, t.init(params), params, statistics=statistics)[0]
        for t in (first, second, third)
    ]
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])
    with pytest.raises(ValueError, match="give one of them"):
        optimizer(learning_rate=schedule, schedule=schedule)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda f, x, y: (f.mean(), {"accuracy": 1.0}),
            r"loss_fn returned a tuple: it must return a scalar.*has_aux",
        ),
        (lambda f, x, y: f.mean(-1), r"loss_fn returned an array of shape \(24,\): it must return a scalar"),
        (lambda f, x, y: {"loss": f.mean()}, r"loss_fn returned a dict: .* 'summed' and 'n_valid_examples'"),
    ],
)
def test_losses_that_are_no_scalars(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(mlp, loss, mlp_params(), *batch()).value_grad_and_statistics(mlp_params(), *batch())


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_outputs_beside_the_logits(fisher: str) -> None:
    """Of several arrays the Fisher is that of the one that the loss reads."""
    options = {"fisher": fisher, "loss_type": "softmax_cross_entropy"}
    rng = jax.random.key(0) if fisher == "mc" else None
    several = lambda p, x, y: {"hidden": jnp.tanh(x), "logits": mlp(p, x)}  # noqa: E731
    got = factors(
        several, lambda f, x, y: cross_entropy(f["logits"], x, y), mlp_params(), *batch(), rng=rng, **options
    )
    want = factors(mlp, cross_entropy, mlp_params(), *batch(), rng=rng, **options)
    assert_close(got, want)
    ours = KFAC(several, lambda f, x, y: wavy(f), mlp_params(), *batch(), **options)
    with pytest.raises(ValueError, match=r"the loss reads 2 arrays of the model's outputs.*logits alone"):
        jax.eval_shape(lambda p: ours.value_grad_and_statistics(p, *batch(), rng=rng), mlp_params())


def test_flags_and_strings_among_the_arguments() -> None:
    """They are handed over as they are, inside containers too."""

    def apply(p: Any, rows: Any, train: bool, mode: str | None) -> Array:
        assert train is True
        assert rows["split"] == "train"
        assert mode == "fast"
        return mlp(p, rows["x"])

    x, y = batch()
    rows = {"x": x, "y": y, "split": "train"}
    ours = KFAC(apply, lambda f, rows, *_: cross_entropy(f, x, rows["y"]), mlp_params(), rows, True, "fast")
    got = jax.jit(lambda p: ours.value_grad_and_statistics(p, rows, True, "fast"))(mlp_params())
    want = jax.jit(lambda p: optimizer().value_grad_and_statistics(p, x, y))(mlp_params())
    assert_close(got, want)


def test_arguments_by_name() -> None:
    x, y = batch()
    with pytest.raises(TypeError, match="y=: arguments of apply_fn are given by position"):
        optimizer().value_grad_and_statistics(mlp_params(), x, y=y)


def test_names_of_nnx() -> None:
    """Layers go by their own names, and `exclude` by these."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(4, 5, rngs=rngs)
            self.head = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.head(jnp.tanh(self.hidden(x)))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    x, y = batch()
    x = x.astype(jnp.float32)

    def apply(p: Any, x: Array, y: Array) -> Array:
        return nnx.merge(graph, p, rest)(x)

    ours = KFAC(apply, cross_entropy, params, x, y, exclude="head", **OPTIONS)
    (layer,) = ours.coverage().layers
    assert (layer.name, layer.weight, layer.bias) == ("hidden", "hidden/kernel", "hidden/bias")
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, x, y)
    updates, _ = jax.jit(ours.update)(gradient, ours.init(params), params, statistics=statistics)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_bias_behind_a_change_of_shape() -> None:
    """As equinox adds it, (C, 1, 1) inside vmap; or behind rows that were flattened and put back."""

    def apply(p: Any, x: Array) -> Array:
        def one(x: Array) -> Array:
            h = lax.conv_general_dilated(x[None], p["k"], (1, 1), "SAME")
            return jnp.tanh(jnp.squeeze(h, 0) + p["c"])

        h = jax.vmap(one)(x)
        h = jnp.moveaxis(h, 1, -1)
        flat = (h.reshape(-1, 3) @ p["w"]).reshape(*h.shape[:-1], 2)
        return jnp.tanh(flat + p["b"])

    params = {"k": normal(0, 3, 2, 2, 2), "c": normal(1, 3, 1, 1), "w": normal(2, 3, 2), "b": normal(3, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = check(apply, params, (normal(4, 4, 2, 3, 3),))
    assert {la.spec.weight: la.spec.bias for la in ours.layers.covered.values()} == {"k": "c", "w": "b"}


class Cells(nn.Module):
    """A recurrent layer of a kind."""

    cell: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.RNN(self.cell(3, param_dtype=jnp.float64))(x)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell])
def test_recurrent_cells_are_covered(cell: Any) -> None:
    module, x = Cells(cell), normal(0, 2, 4, 2)
    params = module.init(jax.random.key(0), x)["params"]
    ours = KFAC(lambda p, x: module.apply({"params": p}, x), lambda f, x: wavy(f), params, x)
    assert ours.coverage().fraction > 0.9, ours.coverage()


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7)])
def test_the_coarsest_precision_of_a_layer_decides_on_its_noise_level(dtype: str, eps: float) -> None:
    """At the power 1/2 it is eps / sqrt(12) of the largest eigenvalue."""

    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["in"]).astype(dtype) @ params["out"].astype(dtype)

    params = {"in": jnp.zeros((3, 4), jnp.float32), "out": jnp.zeros((4, 2), jnp.float32)}
    config = KFACConfig(power=0.5)
    layers = discover(apply, params, jnp.zeros((5, 3), jnp.float32), config=config)
    levels = {name: layer.noise_level(config) for name, layer in layers.covered.items()}
    assert levels == pytest.approx({"in": 2.0**-23 / 12**0.5, "out": eps / 12**0.5})


@pytest.mark.parametrize("scaling", ["power", "second_moment"])
def test_a_branch_that_is_not_taken_stands_still(scaling: str) -> None:
    """Neither momentum nor decay move its layer, which keeps moments and factors; its twin in shape goes on."""
    x = normal(0, 6, 4)
    params = {name: normal(i + 1, 4, 4) for i, name in enumerate(("always", "at_times"))}

    def apply(p: Any, x: Array, turn: Any) -> Array:
        h = jnp.tanh(x @ p["always"])
        return lax.cond(turn > 0, lambda h: h + jnp.tanh(h @ p["at_times"]), lambda h: h, h)

    optimizer = KFAC(apply, lambda f, *_: wavy(f), params, x, 1, weight_decay=0.1, scaling=scaling)

    @jax.jit
    def step(p: Any, s: Any, turn: Any, statistics: bool) -> tuple[Any, Any]:
        _, gradient, st = optimizer.value_grad_and_statistics(p, x, turn)
        with_them, without = (optimizer.update(gradient, s, p, statistics=given) for given in (st, None))
        return jax.tree.map(functools.partial(jnp.where, statistics), with_them, without)

    state = optimizer.init(params)
    _, before = step(params, state, 1, True)
    for statistics in (True, False):
        with jax.debug_nans(True):  # nor is there a 0 / 0
            updates, after = step(params, before, 0, statistics)
        assert not updates["at_times"].any()
        assert updates["always"].any()
        old, new = (layer_states(find_state(s).stacks, optimizer.layers)["at_times"] for s in (before, after))
        for field in ("a", "b", "weight", "kept", "graft_ratio"):
            assert_close(getattr(old, field), getattr(new, field))
        for moments in ("mu", "nu"):
            old, new = (getattr(find_state(s), moments)["at_times"] for s in (before, after))
            np.testing.assert_array_equal(old, new)
        metrics = optimizer.metrics(after)
        assert (metrics["at_times/idle"], metrics["always/idle"]) == (statistics, 0)
    updates, again = step(params, after, 1, True)
    assert updates["at_times"].any()
    assert not optimizer.metrics(again)["idle"]
    for _ in range(NEVER_SEEN):
        _, state = step(params, state, 0, True)
    with pytest.raises(MissingStatisticsError, match="at_times"):
        optimizer.metrics(state)


# The batch in parts -----------------------------------------------------------------------------------------------

IN_PARTS: dict[str, tuple[Callable[[Any, Array], Array], int]] = {
    "a loop": (lambda p, x: jnp.stack([mlp(p, row) for row in x]), 8),
    "lax.map": (lambda p, x: lax.map(lambda row: mlp(p, row), x), 8),
    "lax.map of chunks": (lambda p, x: lax.map(lambda row: mlp(p, row), x, batch_size=4), 2),
    "scan": (lambda p, x: lax.scan(lambda carry, row: (carry, mlp(p, row)), 0, x)[1], 8),
}


@pytest.mark.parametrize("how", IN_PARTS)
def test_a_batch_in_parts_is_named(how: str) -> None:
    """Calls are taken to see the same examples, which is right of time steps, and not of a loop over the batch."""
    apply_fn, calls = IN_PARTS[how]
    x, y = batch(8)
    ours = KFAC(lambda p, x, y: apply_fn(p, x), cross_entropy, mlp_params(), x, y, **OPTIONS)
    message = rf"layer l0 is called {calls} times, on 8 rows in all, as many as the model's outputs have.*jax\.vmap"
    with pytest.warns(UserWarning, match=message):
        jax.eval_shape(ours.value_grad_and_statistics, mlp_params(), x, y)


def test_a_remainder_of_as_many_rows_as_classes_is_a_part() -> None:
    """Of the parts one alone has as many rows as the outputs have in another dimension, by chance."""
    x, y = batch(11)
    classes = mlp(mlp_params(), x).shape[1]
    chunks = lambda p, x, y: lax.map(lambda row: mlp(p, row), x, batch_size=11 - classes)  # noqa: E731
    ours = KFAC(chunks, cross_entropy, mlp_params(), x, y, **OPTIONS)
    with pytest.warns(UserWarning, match="layer l0 is called 2 times, on 11 rows in all"):
        jax.eval_shape(ours.value_grad_and_statistics, mlp_params(), x, y)


def test_time_steps_and_mapped_examples_are_no_parts() -> None:
    x, y = batch(8)
    models = {
        "vmap": lambda p, x, y: jax.vmap(lambda row: mlp(p, row))(x),
        "twice": lambda p, x, y: mlp(p, x) + mlp(p, 2 * x),
        "time": lambda p, x, y: lax.scan(lambda c, t: (c, mlp(p, t * x)), 0, jnp.arange(3.0))[1].mean(0),
        "time steps returned": lambda p, x, y: lax.scan(lambda c, t: (c, mlp(p, t * x)), 0, jnp.arange(3.0))[1],
    }
    for apply_fn in models.values():
        loss = lambda outputs, x, y: outputs.mean()  # noqa: E731
        ours = KFAC(apply_fn, loss, mlp_params(), x, y, **OPTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(ours.value_grad_and_statistics, mlp_params(), x, y)


def test_two_parameters_of_one_name_are_refused() -> None:
    params = {"x/a": mlp_params(), "x": {"a": mlp_params()}}
    with pytest.raises(ValueError, match=r"two parameters are called x/a/l0/.*another key"):
        discover(lambda p, x: mlp(p["x/a"], mlp(p["x"]["a"], x)), params, batch()[0], config=KFACConfig())


def test_a_name_matches_itself_whatever_characters_it_has() -> None:
    params = {"heads[x]": mlp_params()["l0"], "last": mlp_params()["l2"]}

    def apply_fn(p: Any, x: Array) -> Array:
        return jnp.tanh(x @ p["heads[x]"]["w"] + p["heads[x]"]["b"]) @ p["last"]["w"] + p["last"]["b"]

    layers = discover(apply_fn, params, batch()[0], config=KFACConfig(), exclude=["heads[x]"])
    assert set(layers.covered) == {"last"}


# Settings of a process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")])
def test_a_process_that_forbids_promotion(setting: Any) -> None:
    """It is meant for the user's code, which obeys here; the library's own has its rules."""
    params, (x, y) = mlp_params((4, 3)), batch()

    def apply_fn(p: Any, x: Array, y: Array) -> Array:
        return x @ p["l0"]["w"] + p["l0"]["b"][None]

    def loss_fn(f: Array, x: Array, y: Array) -> Array:
        return -(jax.nn.log_softmax(f) * jax.nn.one_hot(y, 3, dtype=f.dtype)).sum(1).mean()

    with setting:
        ours = KFAC(apply_fn, loss_fn, params, x, y, **OPTIONS)
        plain, with_statistics, _ = steps(ours, apply=apply_fn, loss=loss_fn)
        for step in (with_statistics, plain):
            jax.eval_shape(step, params, ours.init(params), x, y)
