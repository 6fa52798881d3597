"""Each workload in JAX is the one in PyTorch: weights, logits, losses, batches, evaluations; and the contract."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from submissions.common.jax import compute_gradient
from submissions.common.spec import ForwardPassMode, ParameterType
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds

NAMES = ["bible_lm", "mnist_vit"]  # what holds for others too is in test_every_workload.py
SEEDS = 4


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """The workload in PyTorch and in JAX."""
    return registry.load(request.param, "pytorch"), registry.load(request.param, "jax")


@pytest.fixture(scope="module")
def weights(pair):
    """A PyTorch model with a random output layer (mnist_vit's starts at zero), and the same weights in JAX."""
    pytorch, in_jax = pair
    model, _ = pytorch.init_model_fn(seeds.root(1))
    for name, value in model.state_dict().items():
        if pytorch.is_output_params(name):
            torch.nn.init.normal_(value, std=0.1)
    template, _ = in_jax.init_model_fn(seeds.root(1))
    return model, jax_params(model, template)


def _batch(workload, size=8, split="train"):
    return next(workload._build_input_queue(seeds.root(1), split, "", size))


def _logits(workload, params, batch, mode=ForwardPassMode.TRAIN, dropout_rate=0.0):
    if isinstance(params, torch.nn.Module):
        return workload.model_fn(params, batch, None, mode, seeds.root(2), True, dropout_rate)[0]
    return _compiled(workload, mode)(params, batch, dropout_rate, seeds.root(2).astype(np.uint32))


@functools.cache
def _compiled(workload, mode):
    """The logits as a function of (params, batch, dropout_rate, rng), compiled: op by op, it takes much longer."""
    return jax.jit(
        lambda params, batch, rate, rng: workload.model_fn(params, batch, None, mode, rng, True, rate)[0]
    )


def test_batches_are_the_same_and_sharded(pair):
    pytorch, in_jax = pair
    for split in ("train", "test"):
        ours, theirs = _batch(in_jax, split=split), _batch(pytorch, split=split)
        assert set(ours) == set(theirs)
        inputs = theirs["inputs"].numpy()
        np.testing.assert_array_equal(ours["inputs"], inputs.transpose(0, 2, 3, 1) if inputs.ndim == 4 else inputs)
        np.testing.assert_array_equal(ours["targets"], theirs["targets"].numpy())
        for value in ours.values():
            assert value.sharding.spec == jax.sharding.PartitionSpec("batch")
            assert value.dtype in (jnp.float32, jnp.int32)


def test_logits_equal_those_of_pytorch(pair, weights):
    pytorch, in_jax = pair
    model, params = weights
    expected = _logits(pytorch, model, _batch(pytorch)).detach().numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(_logits(in_jax, params, _batch(in_jax)), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_pytorch(pair, weights):
    pytorch, in_jax = pair
    model, params = weights
    model.zero_grad()
    batch = _batch(pytorch)
    loss = pytorch.loss_fn(batch["targets"], _logits(pytorch, model, batch))
    (loss["summed"] / loss["n_valid_examples"]).backward()
    gradient, _ = jax.jit(functools.partial(compute_gradient, in_jax))(params, _batch(in_jax), None, seeds.root(2))
    expected = from_named({name: parameter.grad for name, parameter in model.named_parameters()}, params)
    for path, value in jax.tree_util.tree_leaves_with_path(gradient):
        wanted = expected
        for entry in path:
            wanted = wanted[entry.key]
        # The gradient of a key's bias is zero but for rounding.
        scale = max(np.abs(wanted).max(), 1e-2)
        np.testing.assert_allclose(value / scale, wanted / scale, atol=1e-4, err_msg=str(path))


def test_initial_weights_have_the_statistics_of_pytorch(pair):
    """Shape, mean and standard deviation of every parameter, pooled over seeds."""
    pytorch, in_jax = pair
    template, _ = in_jax.init_model_fn(seeds.root(0))
    models = [pytorch.init_model_fn(seeds.root(seed))[0] for seed in range(SEEDS)]
    theirs = [jax.tree.leaves(jax_params(model, template)) for model in models]
    ours = [jax.tree.leaves(in_jax.init_model_fn(seeds.root(seed))[0]) for seed in range(SEEDS)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(template)]
    for k, name in enumerate(names):
        a, b = (np.stack([leaves[k] for leaves in side]).astype(np.float64) for side in (ours, theirs))
        assert a.shape == b.shape
        assert (a.std() == 0) == (b.std() == 0), name
        if b.std() == 0:
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        # Five standard errors of the mean, and of the standard deviation of values no heavier-tailed than a normal.
        assert abs(a.mean() - b.mean()) < 5 * b.std() * math.sqrt(2 / a.size), name
        assert abs(a.std() / b.std() - 1) < 5 / math.sqrt(a.size), name
        # The same distribution: the largest value of a uniform one lies at sqrt(3) standard deviations.
        uniform = [np.abs(x).max() / x.std() < 2 for x in (a, b)]
        assert uniform[0] == uniform[1], name


def test_initialisation_follows_the_rng(pair):
    _, in_jax = pair
    first, again, other = (in_jax.init_model_fn(seeds.root(seed))[0] for seed in (1, 1, 2))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
    assert all(jax.tree.leaves(same))
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, other)))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(first))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_equal_those_of_pytorch(pair, masked, smoothing, soft):
    pytorch, in_jax = pair
    labels = _batch(pytorch)["targets"]
    classes = 71 if labels.ndim == 2 else 10
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*labels.shape, classes, generator=generator)
    mask = (torch.rand(labels.shape, generator=generator) < 0.5).float() if masked else None
    if soft:
        labels = torch.rand(*labels.shape, classes, generator=generator).softmax(-1)
    expected = pytorch.loss_fn(labels, logits, mask, smoothing)
    arrays = [None if value is None else value.numpy() for value in (labels, logits, mask)]
    found = in_jax.loss_fn(*arrays, smoothing)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_evaluations_equal_those_of_pytorch(pair, weights):
    pytorch, in_jax = pair
    model, params = weights
    arguments = (seeds.root(1), "", None, 0)
    expected = pytorch.eval_model(pytorch.eval_batch_size, model, None, *arguments)
    found = in_jax.eval_model(in_jax.eval_batch_size, params, None, *arguments)
    assert list(found) == list(expected)
    for name, value in expected.items():
        # A rounding error may turn one prediction of two equally likely classes.
        tolerance = 0.002 if "accuracy" in name else 1e-5
        assert found[name] == pytest.approx(value, abs=tolerance, rel=1e-5), name
        assert isinstance(found[name], (int, float))


def test_evaluation_does_not_depend_on_its_batch_size(pair, weights):
    _, in_jax = pair
    split = ("test", in_jax.num_test_examples)
    results = [
        in_jax._eval_model_on_split(*split, size, weights[1], None, seeds.root(1), "")
        for size in (96, in_jax.eval_batch_size)  # the last batch of the former has padding
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_shapes_and_types_follow_the_tree(pair):
    _, in_jax = pair
    params, model_state = in_jax.init_model_fn(seeds.root(1))
    assert model_state is None
    shapes = jax.tree.map(lambda leaf, shape: leaf.shape == shape.shape_tuple, params, in_jax.param_shapes)
    assert all(jax.tree.leaves(shapes))
    types = in_jax.model_params_types
    assert jax.tree.structure(types) == jax.tree.structure(params)
    attention = types["blocks_0"]["attention"]
    assert attention["query"] == {"kernel": ParameterType.ATTENTION_Q, "bias": ParameterType.ATTENTION_BIAS}
    assert types["blocks_0"]["norm1"]["scale"] is ParameterType.LAYER_NORM_SCALE
    assert types["blocks_0"]["mlp"]["linear1"] == {"kernel": ParameterType.WEIGHT, "bias": ParameterType.BIAS}
    (output,) = [name for name in params if in_jax.is_output_params(name)]
    assert params[output]["kernel"].shape[-1] == _logits(in_jax, params, _batch(in_jax)).shape[-1]
    others = {"patches": ParameterType.CONV_WEIGHT, "symbols": ParameterType.EMBEDDING}
    for name in others.keys() & params.keys():
        assert others[name] in types[name].values()


def test_types_equal_those_of_pytorch(pair):
    pytorch, in_jax = pair
    pytorch.init_model_fn(seeds.root(1))
    in_jax.init_model_fn(seeds.root(1))
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(in_jax.model_params_types):
        *modules, kind = [entry.key for entry in path]
        name = re.sub(r"blocks_(\d)", r"blocks.\1", ".".join(modules))
        found[f"{name}.{'bias' if kind == 'bias' else 'weight'}"] = value
    assert found == pytorch.model_params_types


def test_dropout_acts_in_training_only_and_with_traced_rates(pair, weights):
    _, in_jax = pair
    _, params = weights
    batch = _batch(in_jax)
    traced = jax.jit(
        lambda rate, rng: in_jax.model_fn(params, batch, None, ForwardPassMode.TRAIN, rng, True, rate)[0]
    )
    rng = seeds.root(2).astype(np.uint32)
    plain = _logits(in_jax, params, batch)
    np.testing.assert_allclose(traced(0.0, rng), plain, rtol=1e-5, atol=1e-5)
    dropped = traced(0.3, rng)
    assert traced._cache_size() == 1
    assert not np.allclose(dropped, plain, atol=1e-3)
    np.testing.assert_array_equal(traced(0.3, rng), dropped)
    assert not np.allclose(traced(0.3, seeds.root(3).astype(np.uint32)), dropped, atol=1e-3)
    evaluated = _logits(in_jax, params, batch, ForwardPassMode.EVAL, 0.3)
    np.testing.assert_allclose(evaluated, plain, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean():
    from workloads.jax.transformer import Dropout

    x = jnp.ones((100, 100))
    y = np.asarray(Dropout().apply({}, x, jnp.float32(0.25), train=True, rngs={"dropout": jax.random.PRNGKey(0)}))
    assert set(np.unique(y)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.02)


def test_causal_model_does_not_see_the_future():
    workload = registry.load("bible_lm", "jax")
    params, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    before = _logits(workload, params, batch)
    batch["inputs"] = batch["inputs"].at[:, 40:].set((batch["inputs"][:, 40:] + 1) % 71)
    after = _logits(workload, params, batch)
    np.testing.assert_allclose(after[:, :40], before[:, :40], rtol=1e-5, atol=1e-5)
    assert not np.allclose(after[:, 40:], before[:, 40:], atol=1e-3)
