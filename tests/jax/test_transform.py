"""K-FAC as an optax transformation: a state of arrays, two compilations, no waiting, and small failures."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from orbax import checkpoint

from algoperf_kfac.jax import KFAC, kfac, layer_states, scale_by_kfac, transform
from algoperf_kfac.jax.directions import _lengthened, _ratio_to
from algoperf_kfac.jax.preconditioner import LayerState, update_statistics
from algoperf_kfac.jax.refresh import refresh_due
from algoperf_kfac.jax.stacks import stacks_of
from algoperf_kfac.jax.statistics import Statistics, add
from algoperf_kfac.jax.transform import find_state
from tests.jax.support import assert_equal, factors
from tests.jax.toys import OPTIONS, Step, batch, cross_entropy, mlp, mlp_params, optimizer, steps, train


def assert_same(first: Any, second: Any) -> None:
    """Equal bit for bit."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def states_of(optimizer: KFAC, state: Any) -> dict[str, LayerState]:
    """The state of each layer."""
    return layer_states(find_state(state).stacks, optimizer.layers)


@functools.cache
def compiled(scaling: str) -> tuple[KFAC, tuple[Step, Step]]:
    """An optimizer and both kinds of step; each is compiled once, whichever tests take them."""
    ours = optimizer(scaling=scaling)
    plain, with_statistics, _ = steps(ours)
    return ours, (jax.jit(plain), jax.jit(with_statistics))


@pytest.mark.parametrize("scaling", ["power", "second_moment"])
def test_the_state_is_arrays_alone(scaling: str) -> None:
    ours, (plain, with_statistics) = compiled(scaling)
    params, state = mlp_params(), ours.init(mlp_params())
    before = state
    params, state = with_statistics(params, state, *batch())
    _, state = plain(params, state, *batch())
    for tree in (before, state):
        leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
        assert leaves
        assert all(isinstance(leaf, Array) and leaf.size for leaf in leaves)
    # A step changes neither structure nor types, or it would be compiled anew.
    assert jax.tree.map(lambda t: (t.shape, t.dtype), before) == jax.tree.map(lambda t: (t.shape, t.dtype), state)


def test_float32_parameters_keep_their_type_in_wide_mode() -> None:
    """Nothing of the state or the updates is promoted, without momentum either."""
    params = jax.tree.map(lambda t: t.astype(jnp.float32), mlp_params())
    x, y = batch()
    ours = KFAC(mlp, cross_entropy, params, x.astype(jnp.float32), y, **OPTIONS, one_minus_beta1=1.0, beta2=0.0)
    _, with_statistics, _ = steps(ours)
    state = ours.init(params)
    new_params, new_state = jax.jit(with_statistics)(params, state, x.astype(jnp.float32), y)
    assert {t.dtype for t in jax.tree.leaves(new_params)} == {jnp.dtype("float32")}
    assert [t.dtype for t in jax.tree.leaves(new_state)] == [t.dtype for t in jax.tree.leaves(state)]


def test_refreshes_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of jit, too, where loops over functions made anew would be compiled at every step."""
    made = []
    monkeypatch.setattr(transform, "refresh_due", lambda *args: made.append(args) or refresh_due(*args))
    ours = optimizer()
    state = ours.init(mlp_params())
    for _ in range(2):
        jax.make_jaxpr(lambda state: steps(ours)[1](mlp_params(), state, *batch()))(state)
    assert len(made) == 1


def test_fresh_states_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many states as one likes (seeds, templates of checkpoints), in arrays of their own."""
    made, init_layer = [], transform.preconditioner.init_layer
    monkeypatch.setattr(
        transform.preconditioner, "init_layer", lambda *args: made.append(args) or init_layer(*args)
    )
    ours = optimizer()
    first, second = ours.init(mlp_params()), ours.init(mlp_params())
    assert len(made) == len(find_state(first).stacks)
    pointers = [{t.unsafe_buffer_pointer() for t in jax.tree.leaves(state)} for state in (first, second)]
    assert pointers[0].isdisjoint(pointers[1])


def test_an_optimizer_goes_to_other_processes() -> None:
    """By cloudpickle, as ray, joblib and submitit send what optax makes."""
    cloudpickle = pytest.importorskip("cloudpickle")
    ours, params = optimizer(), mlp_params()
    ours.init(params)
    updates = []
    for one in (ours, cloudpickle.loads(cloudpickle.dumps(ours))):
        _, gradient, statistics = one.value_grad_and_statistics(params, *batch())
        updates.append(one.update(gradient, one.init(params), params, statistics=statistics)[0])
    jax.tree.map(np.testing.assert_array_equal, *updates)


def test_differentiating_through_a_step_with_statistics() -> None:
    """Statistics are given without gradients, as docs/library.md has it: then the step's own gradient is there."""
    ours, (x, y) = optimizer(), batch()
    state = ours.init(mlp_params())

    def after(x: Array) -> Array:
        _, gradient, statistics = ours.value_grad_and_statistics(mlp_params(), x, y)
        statistics = jax.lax.stop_gradient(statistics)
        updates, _ = ours.update(gradient, state, mlp_params(), statistics=statistics)
        return cross_entropy(mlp(optax.apply_updates(mlp_params(), updates), x), x, y)

    assert jax.eval_shape(jax.grad(after), x).shape == x.shape


def test_inside_a_chain() -> None:
    """Clipping, a schedule and a decay mask around `scale_by_kfac` do what `kfac` with the same does by itself."""
    ours = optimizer()
    mask = jax.tree.map(lambda t: t.ndim > 1, mlp_params())

    def schedule(count: Array) -> Array:
        return 1e-2 * jnp.asarray(0.9) ** count  # not optax's own, which would compute in float32

    whole = kfac(ours.layers, ours.config, learning_rate=schedule, weight_decay_mask=mask)
    decayed = optax.chain(
        optax.clip_by_global_norm(1e9),
        scale_by_kfac(ours.layers, ours.config),
        optax.add_decayed_weights(0.0, mask),
        optax.scale_by_schedule(lambda count: -schedule(count)),
    )
    results = []
    for transformation in (whole, decayed):
        plain, with_statistics, _ = steps(ours, transformation)
        start = transformation.init(mlp_params())
        results.append(train(ours, jax.jit(plain), jax.jit(with_statistics), mlp_params(), start, 0, 6)[0])
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), whole)
    assert states_of(ours, clipped.init(mlp_params())).keys() == ours.layers.covered.keys()


def test_the_decay_mask_and_rate() -> None:
    """Without gradient a parameter shrinks by 1 - lr weight_decay where the mask says so, and else stays."""
    ours = optimizer()
    mask = jax.tree.map(lambda t: t.ndim > 1, mlp_params())
    config = KFAC(mlp, cross_entropy, mlp_params(), *batch(), weight_decay=0.5).config
    transformation = kfac(ours.layers, config, learning_rate=0.1, weight_decay_mask=mask)
    zero = jax.tree.map(jnp.zeros_like, mlp_params())
    updates, _ = jax.jit(transformation.update)(zero, transformation.init(mlp_params()), mlp_params())
    for update, p in zip(jax.tree.leaves(updates), jax.tree.leaves(mlp_params()), strict=True):
        np.testing.assert_allclose(update, -0.05 * p if p.ndim > 1 else 0 * p, atol=1e-15)


@pytest.mark.parametrize("scaling", ["power", "second_moment"])
@pytest.mark.parametrize("way", ["flax", "orbax"])
def test_resume(way: str, scaling: str, tmp_path: Path) -> None:
    """Saved and loaded in mid-interval, training goes on bit for bit."""
    ours, run = compiled(scaling)
    middle = train(ours, *run, mlp_params(), ours.init(mlp_params()), 0, 7)
    template = (mlp_params(), ours.init(mlp_params()))
    if way == "flax":
        loaded = flax.serialization.from_bytes(template, flax.serialization.to_bytes(middle))
        loaded = jax.tree.map(jnp.asarray, loaded)
    else:
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", middle)
            checkpointer.wait_until_finished()
            loaded = checkpointer.restore(tmp_path / "state", template)
    assert_same(loaded, middle)
    again = optimizer(scaling=scaling)
    assert_same(train(again, *run, *loaded, 7, 13), train(ours, *run, *middle, 7, 13))


def test_two_traces_and_no_waiting() -> None:
    """A hundred steps trace one plain step and one with statistics, and fetch nothing from the device."""
    ours = optimizer(refresh_interval=6)
    plain, with_statistics, traces = steps(ours)
    run = jax.jit(plain, donate_argnums=(0, 1)), jax.jit(with_statistics, donate_argnums=(0, 1))
    params, state = mlp_params(), ours.init(mlp_params())
    old = jax.tree_util.tree_leaves_with_path((params, state))
    with jax.transfer_guard_device_to_host("disallow"):
        params, state = train(ours, *run, params, state, 0, 100)
    assert traces == [1, 1]
    # All that the step reads: what is only there for monitoring is written anew.
    read = [leaf for path, leaf in old if leaf.ndim and "vanished" not in jax.tree_util.keystr(path)]
    assert all(leaf.is_deleted() for leaf in read)
    metrics = ours.metrics(state)
    assert metrics["steps"] == 100
    # Steps 0, 1 and 4 refresh all layers (statistics are young until step 6); then each has its turn of three.
    assert metrics["failures"] == metrics["dropped"] == metrics["stand_ins"] == 0
    assert all(metrics[f"{name}/refreshes"] >= 17 for name in ours.layers.covered)


def test_another_batch_size_is_compiled_anew_and_counts_its_own_examples() -> None:
    """Only the parameters' shapes are fixed; factors are those of the batch at hand, not of the example's."""
    ours, params, small = optimizer(), mlp_params(), batch(9)
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *small)
    _, state = jax.jit(ours.update)(gradient, ours.init(params), params, statistics=statistics)
    alone = factors(mlp, cross_entropy, params, *small, loss_normalizer=None, **OPTIONS)
    for name, pair in ours.factors(state).items():
        assert_equal(pair, alone[name])


def primitives(jaxpr: Any, name: str) -> int:
    """How often a primitive occurs, in inner programs too."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == name
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += primitives(inner, name)
    return count


def test_equal_sizes_are_decomposed_together() -> None:
    """Factors of 5 (A, with bias), 4 (B) and 3 (the last B): three batched calls for six matrices."""
    ours = optimizer(refresh_interval=2)
    _, with_statistics, _ = steps(ours)
    params = mlp_params()
    jaxpr = jax.make_jaxpr(with_statistics)(params, ours.init(params), *batch()).jaxpr
    assert primitives(jaxpr, "eigh") == 3
    plain = steps(ours)[0]
    assert primitives(jax.make_jaxpr(plain)(params, ours.init(params), *batch()).jaxpr, "eigh") == 0


def test_refreshes_take_turns() -> None:
    """After the young phase each statistics step refreshes the layers whose turn it is, in the model's order."""
    ours = optimizer(factor_interval=1, refresh_interval=3, initial_statistics=0, initial_refreshes="every")
    _, with_statistics, _ = steps(ours)
    run = jax.jit(with_statistics)
    params, state = mlp_params(), ours.init(mlp_params())
    counts = []
    for _ in range(9):
        params, state = run(params, state, *batch())
        counts.append([int(layer.refreshes) for layer in states_of(ours, state).values()])
    growth = np.diff(counts, axis=0)
    assert (growth[:2] == 1).all()
    assert (growth[2:].sum(1) == 1).all()
    assert (growth[2:].sum(0) == 2).all()


@pytest.mark.parametrize("options", [{}, {"preconditioner": "inverse"}, {"scaling": "second_moment"}])
def test_a_layer_that_no_gradient_reached_waits_for_one(options: dict[str, Any]) -> None:
    """Behind a weight that starts at zero there is no curvature: no refresh, and one out of turn once there is."""
    intervals = {"factor_interval": 2, "refresh_interval": 6, "initial_statistics": 1, "initial_refreshes": "every"}
    ours = optimizer(**intervals, **options)
    plain, with_statistics, _ = steps(ours)
    run = jax.jit(plain), jax.jit(with_statistics)
    params = mlp_params()
    state = ours.init(params)
    for step in range(9):
        if step < 8:
            params["l2"]["w"] = jnp.zeros_like(params["l2"]["w"])
        with jax.debug_nans(True):
            params, state = train(ours, *run, params, state, step, step + 1)
        metrics = ours.metrics(state)
        assert np.isnan(metrics["l0/cosine"]) == (step < 8)
        assert metrics["stand_ins"] == metrics["dropped"] == metrics["failures"] == 0
        refreshes = [metrics[f"l{i}/refreshes"] for i in range(3)]
        if step == 7:
            assert refreshes == [0, 0, 3]
            assert not ours.factors(state)["l0"].B.any()
    assert refreshes == [1, 1, 4]  # at step 8, the turn of l2 alone


def test_the_state_of_other_layers_is_refused() -> None:
    ours, other = optimizer(), KFAC(mlp, cross_entropy, mlp_params((4, 3)), *batch(), **OPTIONS)
    with pytest.raises(ValueError, match="the state is of other layers"):
        ours.metrics(other.init(mlp_params((4, 3))))


def test_nothing_else_differs_from_nadamw_before_the_first_statistics() -> None:
    """Without statistics the operators are the identity, and grafting gives the momentum NadamW's length."""
    ours = optimizer()
    params = mlp_params()
    gradient = jax.tree.map(lambda t: t + 1, params)
    transformation = scale_by_kfac(ours.layers, ours.config)
    updates, _ = jax.jit(transformation.update)(gradient, transformation.init(params))
    for name in params:
        for key in ("w", "b"):
            cosine = (updates[name][key] * gradient[name][key]).sum()
            cosine /= jnp.linalg.norm(updates[name][key]) * jnp.linalg.norm(gradient[name][key])
            assert cosine > 1 - 1e-12


# Failures ---------------------------------------------------------------------------------------------------------


def poisoned(statistics: Any, name: str, value: float) -> Any:
    return statistics | {name: statistics[name]._replace(b=tuple(m * value for m in statistics[name].b))}


@pytest.mark.parametrize(("value", "preconditioner"), [(np.nan, "eigen"), (np.inf, "inverse")])
def test_bad_statistics_are_dropped(value: float, preconditioner: str) -> None:
    """They change no average and are counted; the layer goes on with the old ones, and others do not notice."""
    ours = optimizer(preconditioner=preconditioner, refresh_interval=2)
    params = mlp_params()
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    update = jax.jit(ours.update)
    _, state = update(gradient, ours.init(params), params, statistics=statistics)
    updates, new = update(gradient, state, params, statistics=poisoned(statistics, "l1", value))
    good_updates, good = update(gradient, state, params, statistics=statistics)
    metrics = ours.metrics(new)
    assert metrics["l1/dropped"] == metrics["dropped"] == 1
    for field in ("a", "b", "weight", "examples"):
        assert_same(getattr(states_of(ours, new)["l1"], field), getattr(states_of(ours, state)["l1"], field))
    assert_same(states_of(ours, new)["l0"], states_of(ours, good)["l0"])
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    assert_same(updates["l0"], good_updates["l0"])


def test_zeros_make_no_nan_on_the_way() -> None:
    """What is selected away afterwards would still stop a run under `jax_debug_nans`, outside of a program."""
    ours = optimizer()
    state = states_of(ours, ours.init(mlp_params()))["l0"]
    nothing = Statistics((jnp.zeros((1, 5, 5)),), (jnp.zeros((1, 4, 4)),), *jnp.zeros(3))
    stand_ins = jnp.array([0.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
    with jax.debug_nans(True), jax.debug_infs(True):
        assert_same(update_statistics(state, nothing, 0.9), state)
        for rule in ("graft", "rms"):
            ratio, usable = _lengthened(
                jnp.array([0.0, 0.0, 2.0]), stand_ins, dataclasses.replace(ours.config, length=rule)
            )
            np.testing.assert_array_equal(ratio, [0.0, 1.0, 0.5])
            np.testing.assert_array_equal(usable, [True, False, True])
        assert not _ratio_to(1.0, 4, jnp.zeros(2)).any()


@pytest.mark.parametrize("preconditioner", ["eigen", "inverse"])
def test_a_failed_decomposition_keeps_the_last_good_one(preconditioner: str) -> None:
    """Averages that overflow cannot be decomposed: three attempts are counted, the operators stay."""
    ours = optimizer(preconditioner=preconditioner, refresh_interval=2)
    params = mlp_params()
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    update = jax.jit(ours.update)
    _, state = update(gradient, ours.init(params), params, statistics=statistics)
    before = states_of(ours, state)["l1"]
    key, place = next((k, s.names.index("l1")) for k, s in stacks_of(ours.layers).items() if "l1" in s.names)
    stack = state[0].stacks[key]
    broken = dataclasses.replace(stack, b=tuple(m.at[place, 0, 0, 0].set(jnp.nan) for m in stack.b))
    state = (state[0]._replace(stacks=state[0].stacks | {key: broken}), *state[1:])
    updates, new = update(gradient, state, params, statistics=statistics)
    assert ours.metrics(new)["l1/failures"] == 3
    assert ours.metrics(new)["l0/failures"] == 0
    after = states_of(ours, new)
    assert int(after["l1"].refreshes) == 1
    assert int(after["l0"].refreshes) == 2
    assert_same(after["l1"].b_operator, before.b_operator)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_indefinite_factors_are_retried_with_more_damping() -> None:
    """A slightly indefinite B (as rounding makes) fails at the configured damping and succeeds at ten times it."""
    ours = optimizer(preconditioner="inverse", damping=1e-3)
    params = mlp_params()
    _, gradient, statistics = jax.jit(ours.value_grad_and_statistics)(params, *batch())
    b = statistics["l1"].b[0]
    mean = jnp.trace(b[0]) / 4
    values, vectors = jnp.linalg.eigh(b)
    values = values.at[0, 0].set(-5e-3 * mean)
    indefinite = statistics | {"l1": statistics["l1"]._replace(b=((vectors * values[:, None]) @ vectors.mT,))}
    _, state = jax.jit(ours.update)(gradient, ours.init(params), params, statistics=indefinite)
    assert ours.metrics(state)["l1/failures"] == 1
    assert ours.metrics(state)["l1/refreshes"] == 1


# Statistics -------------------------------------------------------------------------------------------------------


def test_statistics_add_up_over_micro_batches() -> None:
    """Two halves, each loss divided by the whole batch's size, make the statistics of the whole."""
    ours = optimizer()
    params, (x, y) = mlp_params(), batch()
    run = jax.jit(lambda p, x, y: ours.value_grad_and_statistics(p, x, y)[2])
    whole = run(params, x, y)
    halves = [run(params, x[i::2], y[i::2]) for i in (0, 1)]
    for name, statistics in whole.items():
        both = add(halves[0][name], halves[1][name])
        for a, b in zip(jax.tree.leaves(statistics), jax.tree.leaves(both), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_averages_are_corrected() -> None:
    """After two statistics steps the factors are the weighted mean of both, weights decay and one."""
    ours = optimizer(factor_decay=0.75)
    params = mlp_params()
    run = jax.jit(ours.value_grad_and_statistics)
    x, y = batch()
    _, gradient, first = run(params, x, y)
    _, _, second = run(params, 2 * x, y)
    update = jax.jit(ours.update)
    _, state = update(gradient, ours.init(params), params, statistics=first)
    once = ours.factors(state)
    _, state = update(gradient, state, params, statistics=second)
    twice = ours.factors(state)
    alone = factors(mlp, cross_entropy, params, 2 * x, y, loss_normalizer=None, **OPTIONS)
    for name in once:
        for got, a, b in zip(twice[name], once[name], alone[name], strict=True):
            np.testing.assert_allclose(got, (0.75 * a + b) / 1.75, rtol=1e-10, atol=1e-13)
    mean = ours.factors(state, reduction="mean")
    for name in once:
        assert_equal((mean[name].A, mean[name].B * len(x)), twice[name])


@pytest.mark.single
def test_a_direction_whose_squares_overflow_is_scaled_and_kept() -> None:
    """As in PyTorch: factors of reduce that all but cancel, with a gradient that does not."""
    rng = np.random.default_rng(0)
    almost = np.float32(-1 - 2 * np.finfo(np.float32).eps)
    x, weights = (rng.standard_normal((16, size)).astype(np.float32) for size in (8, 6))
    x, weights = (np.stack([rows, almost * rows], 1) for rows in (x, np.float32(1e-2) * weights))

    def loss_fn(f: Array, x: Array) -> Array:
        return (f * weights).sum() / 16

    params = {"w": jnp.ones((8, 6), jnp.float32)}
    ours = KFAC(
        lambda p, x: x @ p["w"], loss_fn, params, jnp.asarray(x),
        approximation="reduce", scaling="inverse", learning_rate=1e-3, eps=1e-12,
    )  # fmt: skip

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, gradient, statistics = ours.value_grad_and_statistics(params, jnp.asarray(x))
        return ours.update(gradient, state, params, statistics=statistics)

    updates, state = step(params, ours.init(params))
    metrics = ours.metrics(state)
    assert metrics["stand_ins"] == 0
    assert 0 < metrics["w/graft_ratio"] < 1e-20
    assert 1e-3 * 48**0.5 < float(jnp.linalg.norm(updates["w"])) < 2e-3 * 48**0.5
