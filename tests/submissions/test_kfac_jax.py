"""K-FAC's submissions in JAX: a state that is whole before the first step and survives flax's checkpoints."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import checkpoints

from algoperf_kfac import pace
from algoperf_kfac.jax import KFACState, layer_states
from submissions.common.kfac.model_call import initial_call
from submissions.common.spec import LossType
from submissions.kfac_reduce.jax import submission

POINT = {"learning_rate": 0.01, "factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
POINT = namedtuple("Hyperparameters", POINT)(**POINT)
STOPS = (1, 3)


class Net(nn.Module):
    """With batch statistics, dropout, and a layer that takes part in training alone where `hidden` says so."""

    hidden: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(6, name="first")(x))
        x = nn.Dropout(0.1, deterministic=not train)(jnp.tanh(x))
        extra = nn.Dense(6, name="extra")
        if self.hidden:
            w = self.param("raw", nn.initializers.normal(0.5), (6, 6))
            x = x @ w if train else x + w[0]
        return nn.Dense(3, name="last")(x + extra(x))


class Workload:
    """As AlgoPerf's: `init_model_fn` makes and compiles its own model and calls it on two examples of zeros."""

    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    step_hint = 20
    metrics_logger = None
    model_params_types = None
    num_inits = 0

    def __init__(self, hidden=False):
        self.hidden = hidden

    def init_model_fn(self, rng):
        self.num_inits += 1
        self.model = Net(self.hidden)
        variables = jax.jit(self.model.init, static_argnames="train")(
            {"params": jnp.asarray(rng)}, jnp.zeros((2, 5)), train=False
        )
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def model_fn(self, params, batch=None, model_state=None, mode=None, rng=None, update_batch_norm=True, **kwargs):
        batch = kwargs.get("augmented_and_preprocessed_input_batch", batch)
        variables = {"params": params, **model_state}
        return self.model.apply(variables, batch["inputs"], True, rngs={"dropout": rng}, mutable=["batch_stats"])

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_batch, label_batch)
        return {"summed": losses.sum(), "n_valid_examples": len(losses), "per_example": losses}


def begin(workload, point=POINT):
    rng = np.array([0, 1], np.uint32)
    params, model_state = workload.init_model_fn(rng)
    return params, model_state, submission.init_optimizer_state(workload, params, model_state, point, rng)


def train(workload, run, first, last, point=POINT):
    params, model_state, state = run
    for step in range(first, last):
        generator = np.random.default_rng(step)
        batch = {
            "inputs": generator.normal(size=(12, 5)).astype(np.float32),
            "targets": generator.integers(0, 3, 12).astype(np.int32),
        }
        state, params, model_state = submission.update_params(
            workload=workload,
            current_param_container=params,
            current_params_types=None,
            model_state=model_state,
            hyperparameters=point,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=state,
            eval_results=[],
            global_step=step,
            rng=np.array([step, 7], np.uint32),
            train_state={},
        )
    return params, model_state, state


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of seven steps: how it began and ended, and the folder with the checkpoints on its way."""
    folder, workload = tmp_path_factory.mktemp("checkpoints"), Workload()
    begun = begin(workload)
    (*variables, state), last = jax.tree.map(jnp.copy, (*begun[:2], begun[2][0])), 0  # steps donate what they take
    run = (*variables, (state, begun[2][1]))
    for stop in STOPS:
        params, model_state, state = run = train(workload, run, last, stop)
        content = {"model_params": params, "optimizer_state": state[0], "model_state": model_state}
        checkpoints.save_checkpoint(folder / str(stop), target=content, step=stop)
        last = stop
    return SimpleNamespace(begun=begun, ended=train(workload, run, last, 7), folder=folder)


def test_the_state_has_its_final_structure_before_the_first_step(whole):
    state, training = whole.begun[2]
    assert isinstance(state, KFACState)
    assert set(layer_states(state.stacks, training.layers)) == {"first", "extra", "last"}
    before, after = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), run[2][0]) for run in (whole.begun, whole.ended)
    )
    assert after == before


def test_nothing_of_init_model_fn_stays_traced():
    """It is called again inside a trace: what it keeps on the workload must serve the run all the same."""
    workload = Workload()
    params, model_state, _ = begin(workload)
    assert workload.num_inits >= 2
    logits, _ = workload.model_fn(params, {"inputs": np.ones((2, 5))}, model_state, rng=jax.random.PRNGKey(0))
    assert np.isfinite(logits).all()


class WithoutModelState(Workload):
    """AlgoPerf's imagenet_vit: the model state is an empty dictionary at first, and None from the first step on."""

    num_passes = 0

    def init_model_fn(self, rng):
        params, _ = super().init_model_fn(rng)
        return params, {}

    def model_fn(self, params, batch=None, model_state=None, mode=None, rng=None, update_batch_norm=True, **kwargs):
        self.num_passes += 1
        batch = kwargs.get("augmented_and_preprocessed_input_batch", batch)
        variables = {"params": {"kernel": params["first"]["kernel"]}}
        return nn.Dense(6, use_bias=False).apply(variables, batch["inputs"]), None


def test_no_step_is_traced_anew_where_the_model_has_no_state():
    workload = WithoutModelState()
    run = train(workload, begin(workload), 0, 2)  # a step with statistics and one without: all there are
    assert run[1] == {}
    passes = workload.num_passes
    train(workload, run, 2, 5)
    assert workload.num_passes == passes


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_restored_by_flax_goes_on_bit_for_bit(stop, whole):
    """Through the calls AlgoPerf's runner makes, between two statistics steps (0, 2, 4, ...)."""
    workload = Workload()
    params, model_state, state = begin(workload)
    target = {"model_params": params, "optimizer_state": state[0], "model_state": model_state}
    saved = checkpoints.restore_checkpoint(whole.folder / str(stop), target=target)
    restored = saved["model_params"], saved["model_state"], (saved["optimizer_state"], state[1])
    resumed = train(workload, restored, stop, 7)
    params, model_state, state = whole.ended
    assert_same((resumed[0], resumed[1], resumed[2][0]), (params, model_state, state[0]))


def test_refreshes_keep_to_a_share_of_the_time(monkeypatch, tmp_path):
    """What the clock came to is in the state, from the first one on, and survives a checkpoint."""
    point = POINT._asdict() | {"factor_interval": 1, "refresh_budget": 0.1}
    seconds = iter([0, 3, 6, 7, 8, 9])  # two more than a step takes where all layers are refreshed
    monkeypatch.setattr(pace, "now", lambda: next(seconds))
    workload, rows = WithoutModelState(), []
    workload.metrics_logger = SimpleNamespace(append_scalar_metrics=lambda row, step: rows.append(row))
    run = begin(workload, point)
    assert run[2][0].stacks.pace == 1
    params, model_state, state = train(workload, run, 0, 6, point)
    passes = workload.num_passes
    assert state[0].stacks.pace == 18
    assert rows[0].keys() == {"loss", "grad_norm", "refresh_interval"}
    assert rows[0]["refresh_interval"] == 4
    train(workload, (params, model_state, (jax.tree.map(jnp.copy, state[0]), state[1])), 6, 8, point)
    assert workload.num_passes == passes
    checkpoints.save_checkpoint(tmp_path, target=state[0], step=6)
    fresh = begin(WithoutModelState(), point)[2][0]
    assert checkpoints.restore_checkpoint(tmp_path, target=fresh).stacks.pace == 18


def test_layers_that_show_in_training_alone_are_covered_all_the_same():
    """In `init_model_fn`'s call this weight is no layer; the first batch has the last word."""
    workload = Workload(hidden=True)
    run = begin(workload)
    assert "raw" not in layer_states(run[2][0].stacks, run[2][1].layers)
    after, training = train(workload, run, 0, 3)[2]
    assert layer_states(after.stacks, training.layers)["raw"].refreshes > 0
    assert after.steps == 3


def test_a_model_that_is_no_flax_module_waits_for_the_first_batch():
    def init_model_fn(rng):
        return {"w": jax.random.normal(rng, (5, 3))}, {}

    def model_fn(params, augmented_and_preprocessed_input_batch, model_state, **kwargs):
        return augmented_and_preprocessed_input_batch["inputs"] @ params["w"], model_state

    workload = SimpleNamespace(
        init_model_fn=init_model_fn, model_fn=model_fn, loss_fn=Workload().loss_fn, loss_type=Workload.loss_type,
        step_hint=20, metrics_logger=None,
    )  # fmt: skip
    assert initial_call(init_model_fn, np.zeros(2, np.uint32)) is None
    run = begin(workload)
    assert run[2][0] == {}
    state, training = train(workload, run, 0, 2)[2]
    assert set(layer_states(state.stacks, training.layers)) == {"w"}
