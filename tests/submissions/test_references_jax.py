"""The reference submissions in JAX: the same updates as in PyTorch, state that resumes, the adapter."""

from __future__ import annotations

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.serialization import from_state_dict, to_state_dict

from submissions import registry
from submissions.common.from_optax import from_optax, parameters_of
from submissions.common.hyperparameters import POSITIVE
from submissions.common.packages import MissingPackage
from submissions.common.parameters import Parameters
from submissions.common.spec import LossType, ParameterType
from workloads.runner.jax import JaxBackend

PLAIN = ("adamw", "heavy_ball", "nesterov")
NEWER = ("muon", "schedule_free_adamw")  # than the optax AlgoPerf pins


def load(name):
    try:
        return importlib.import_module(f"submissions.{name}.jax.submission")
    except MissingPackage as error:
        pytest.skip(str(error))


class Model(nn.Module):
    """Symbols to classes, with attention: its weights have three dimensions."""

    @nn.compact
    def __call__(self, inputs):
        x = nn.Embed(11, 8, name="symbols")(inputs)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(6, name="hidden")(x.mean(1))))


START = jax.jit(Model().init)(jax.random.PRNGKey(0), jnp.zeros((1, 5), int))["params"]


@jax.jit
def evaluate(params, batch):
    return Toy().loss_fn(batch["targets"], Model().apply({"params": params}, batch["inputs"]))["per_example"].mean()


class Toy:
    """The model on data that can be learned."""

    step_hint = 40
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    metrics_logger = None

    def params(self):
        return jax.tree.map(jnp.array, START)  # a step takes the arrays it is given

    @property
    def model_params_types(self):
        def kind(path, _):
            module, *_, name = (entry.key for entry in path)
            if module == "symbols":
                return ParameterType.EMBEDDING
            if module == "attention" and name == "kernel":
                return {"o": ParameterType.ATTENTION_OUT}.get(path[1].key[0], ParameterType.ATTENTION_Q)
            return ParameterType.WEIGHT if name == "kernel" else ParameterType.BIAS

        return jax.tree_util.tree_map_with_path(kind, START)

    def batch(self, step):
        inputs = np.random.default_rng(step % 4).integers(0, 11, (24, 5))
        return {"inputs": inputs, "targets": inputs.sum(1) // 14}

    def is_output_params(self, name):
        return name == "head"

    def model_fn(
        self,
        params,
        augmented_and_preprocessed_input_batch,
        model_state,
        mode,
        rng,
        update_batch_norm,
        dropout_rate=0,
    ):
        return Model().apply({"params": params}, augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_batch, label_batch)
        return {"summed": loss.sum(), "n_valid_examples": len(loss), "per_example": loss}


def train(submission, params, state, steps, first=0, point=None):
    """Steps with an evaluation after every third; returns parameters, state, and the losses there."""
    losses = []
    for step in range(first, first + steps):
        common = {
            "workload": Toy(),
            "current_params_types": None,
            "model_state": {},
            "hyperparameters": point,
            "loss_type": None,
            "eval_results": [],
            "rng": jax.random.PRNGKey(step),
        }
        state, params, _ = submission.update_params(
            batch=Toy().batch(step),
            global_step=step,
            current_param_container=params,
            optimizer_state=state,
            **common,
        )
        if step % 3 == 2:
            state, params, _ = submission.prepare_for_eval(
                global_step=step, current_param_container=params, optimizer_state=state, **common
            )
            losses.append(float(evaluate(params, Toy().batch(0))))
    return params, state, losses


def start(submission, point=None):
    params = Toy().params()
    return params, submission.init_optimizer_state(Toy(), params, {}, point, jax.random.PRNGKey(0))


@pytest.mark.parametrize("name", [*PLAIN, *NEWER])
def test_it_learns_and_resumes_bit_for_bit(name):
    submission = load(name)
    params, state = start(submission)
    JaxBackend().check_optimizer_state(state)
    params, state, losses = train(submission, params, state, 15)
    assert losses[-1] < losses[0] - 0.02
    saved = jax.tree.map(np.asarray, (to_state_dict(params), to_state_dict(state[0])))
    params, state, losses = train(submission, params, state, 6, first=15)
    other, (fresh, run) = start(submission)
    other = from_state_dict(other, saved[0])
    other, _, again = train(submission, other, (from_state_dict(fresh, saved[1]), run), 6, first=15)
    assert again == losses
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, other))
    with pytest.raises(ValueError, match="learning_rate=0: allowed is a number > 0"):
        start(submission, {"learning_rate": 0})


def test_a_package_too_old_is_named():
    if load_error := registry_error("muon"):
        assert load_error == "Muon needs optax 0.2.8, which is not installed. Run: pip install 'optax==0.2.8'"
    else:
        assert tuple(map(int, optax.__version__.split(".")[:3])) >= (0, 2, 8)


def registry_error(name):
    try:
        registry.load(name, "jax")
    except Exception as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [*PLAIN, *NEWER])
def test_updates_equal_those_of_pytorch(name):
    """On a hidden matrix, with other gradients each step; for Muon its AdamW part is left out, which differs."""
    in_jax, in_torch = load(name), importlib.import_module(f"submissions.{name}.pytorch.submission")
    point = {"learning_rate": 0.02, "one_minus_beta1": 0.2}
    rng = np.random.default_rng(0)
    value = rng.standard_normal((6, 4)).astype("f")
    parameter = torch.nn.Parameter(torch.tensor(value.T.copy()))
    config = in_torch.DESCRIPTION.configure(point)[1]
    optimizer = in_torch.make(Parameters([parameter], [], [], []), config)
    if hasattr(optimizer, "train"):
        optimizer.train()
    params = {"hidden": {"kernel": jnp.asarray(value)}}
    workload = type("One", (), {"model_params_types": {"hidden": {"kernel": ParameterType.WEIGHT}}})()
    workload.is_output_params = lambda name: False
    transformation = in_jax.make(parameters_of(params, workload), config, jnp.float32(0.02))
    state, update = transformation.init(params), jax.jit(transformation.update)
    for _ in range(4):
        gradient = rng.standard_normal((6, 4)).astype("f")
        parameter.grad = torch.tensor(gradient.T.copy())
        optimizer.step()
        updates, state = update({"hidden": {"kernel": jnp.asarray(gradient)}}, state, params)
        params = optax.apply_updates(params, updates)
        tolerance = 3e-3 if name == "muon" else 1e-5  # bfloat16 in PyTorch
        np.testing.assert_allclose(params["hidden"]["kernel"].T, parameter.detach(), rtol=0, atol=tolerance)


def test_parameters_are_sorted_by_role():
    parameters = parameters_of(Toy().params(), Toy())
    assert parameters.roles["symbols"] == {"embedding": "embedding"}
    assert parameters.roles["head"] == {"kernel": "head", "bias": "head"}
    assert parameters.roles["hidden"] == {"kernel": "matrix", "bias": "vector"}
    assert parameters.roles["attention"]["out"] == {"kernel": "matrix", "bias": "vector"}
    assert parameters.shapes["attention"]["out"]["kernel"].shape == (2, 4, 8)


def test_any_optax_optimizer_is_a_submission():
    submission = from_optax(
        title="My Adagrad",
        text="Adagrad.",
        hyperparameters={"learning_rate": (0.1, POSITIVE)},
        make=lambda parameters, point, learning_rate: optax.adagrad(learning_rate),
    )
    params, state = start(submission)
    _, _, losses = train(submission, params, state, 12)
    assert losses[-1] < losses[0]
