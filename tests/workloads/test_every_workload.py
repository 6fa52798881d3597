"""What holds for every embedded workload and every held-out variant, in both frameworks."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
import torch

from submissions.common.jax import compute_gradient
from submissions.common.spec import ForwardPassMode, LossType
from workloads import registry, seeds
from workloads.pytorch import parameter_types
from workloads.target_file import FOLDER

NAMES = list(registry.WORKLOADS)
VARIANTS = [name for name in NAMES if registry.WORKLOADS[name].is_variant]
RNG = seeds.root(1)
SIZE = 8


def _same(one, other):
    a, b = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _batch(workload, split="train", size=SIZE):
    return next(workload._build_input_queue(RNG, split, "", size))


@pytest.fixture(scope="module", params=NAMES)
def in_pytorch(request):
    return registry.load(request.param, "pytorch")


@pytest.fixture(scope="module", params=registry.BASES)
def in_jax(request):
    return registry.load(request.param, "jax")


def test_the_suite_holds_every_loss_of_algoperf():
    assert {registry.WORKLOADS[name].task().loss_type for name in NAMES} == set(LossType)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_and_targets(name):
    task = registry.WORKLOADS[name].task()
    assert task.name == name
    assert task.base == registry.WORKLOADS[name].base
    assert 5 * task.eval_period_steps < task.step_hint <= 400
    assert task.max_allowed_runtime_sec >= 300
    entry = json.loads((FOLDER / task.base / "targets.json").read_text())[name]
    assert math.isfinite(entry["validation"])
    assert math.isfinite(entry["test"])
    assert entry.get("how") or entry["command"]


@pytest.mark.parametrize("name", registry.BASES)
def test_each_has_a_held_out_variant_and_a_card(name):
    assert registry.WORKLOADS[name].task().VARIANTS
    card = (FOLDER.parent / "docs" / "workloads" / f"{name}.md").read_text()
    for variant in registry.WORKLOADS[name].task().VARIANTS:
        assert f"{name}_{variant}" in card


@pytest.mark.parametrize("name", registry.BASES)
def test_batches_are_functions_of_their_arguments(name):
    workload = registry.load(name, "pytorch")
    for split in ("train", "eval_train", "validation", "test"):
        first, again, second = (workload.numpy_batch(RNG, split, index, SIZE // 2) for index in (0, 0, 1))
        assert _same(first, again)
        assert not _same(first["inputs"], second["inputs"])
        assert ("weights" in first) or split == "train"
        assert all(leaf.dtype in (np.float32, np.int32, np.int64) for leaf in jax.tree.leaves(first))
    other = workload.numpy_batch(seeds.root(2), "train", 0, SIZE)
    assert not _same(other["inputs"], workload.numpy_batch(RNG, "train", 0, SIZE)["inputs"])
    validation = workload.numpy_batch(seeds.root(2), "validation", 0, SIZE)
    assert _same(validation, workload.numpy_batch(RNG, "validation", 0, SIZE))


def test_pytorch_every_parameter_is_named_typed_and_trained(in_pytorch):
    model, model_state = in_pytorch.init_model_fn(RNG)
    names = [name for name, _ in model.named_parameters()]
    assert list(in_pytorch.param_shapes) == list(in_pytorch.model_params_types) == names
    assert any(in_pytorch.is_output_params(name) for name in names)
    assert in_pytorch.model_params_types == parameter_types.parameter_types(model)
    for name, value in model.state_dict().items():
        if in_pytorch.is_output_params(name) and value.is_floating_point():
            torch.nn.init.normal_(value, std=0.1)  # some start at zero, and pass no gradient on
    for module in model.modules():  # the last scale of a residual block too
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.ones_(module.weight)
    batch = _batch(in_pytorch)
    logits, _ = in_pytorch.model_fn(model, batch, model_state, ForwardPassMode.TRAIN, RNG, True)
    loss = in_pytorch.loss_fn(batch["targets"], logits, batch.get("weights"))
    assert loss["n_valid_examples"] > 0
    torch.testing.assert_close(loss["per_example"].sum(), loss["summed"])
    loss["summed"].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_pytorch_evaluation_does_not_depend_on_its_batch_size_or_disturb_the_model(in_pytorch):
    model, model_state = in_pytorch.init_model_fn(RNG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = ("validation", 24)
    results = [in_pytorch._eval_model_on_split(*split, size, model, model_state, RNG, "") for size in (8, 24)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert {"loss", in_pytorch.target_metric_name} <= set(results[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_pytorch_batch_norm_is_updated_where_asked(in_pytorch):
    model, model_state = in_pytorch.init_model_fn(RNG)
    before = {name: value.clone() for name, value in model.named_buffers()}
    batch = _batch(in_pytorch)
    in_pytorch.model_fn(model, batch, model_state, ForwardPassMode.TRAIN, RNG, update_batch_norm=False)
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    in_pytorch.model_fn(model, batch, model_state, ForwardPassMode.TRAIN, RNG, update_batch_norm=True)
    changed = {name for name, value in model.named_buffers() if not torch.equal(before[name], value)}
    assert {name for name in before if name.endswith(("running_mean", "running_var"))} <= changed


@pytest.mark.parametrize("name", registry.BASES)
def test_both_frameworks_see_the_same_batches(name):
    ours, theirs = (_batch(registry.load(name, framework), "validation") for framework in ("jax", "pytorch"))
    assert set(ours) == set(theirs)
    a, b = jax.tree.leaves(ours), jax.tree.leaves(jax.tree.map(lambda value: value.numpy(), theirs))
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(np.sort(np.ravel(x)), np.sort(np.ravel(y)))


def test_jax_state_and_gradients(in_jax):
    """Traced; compiled where the model keeps a state. The tests of each workload compare numbers with PyTorch's."""
    rng = RNG.astype(np.uint32)
    params, model_state = jax.eval_shape(in_jax.init_model_fn, rng)
    assert jax.tree.structure(in_jax.model_params_types) == jax.tree.structure(params)
    batch = _batch(in_jax)

    def gradient(params, model_state):
        return compute_gradient(in_jax, params, batch, model_state, rng)

    found, result = jax.eval_shape(gradient, params, model_state)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert result.loss.shape == ()
    assert jax.tree.structure(result.new_model_state) == jax.tree.structure(model_state)
    kept = jax.eval_shape(
        lambda p, s: in_jax.model_fn(p, batch, s, ForwardPassMode.TRAIN, rng, update_batch_norm=False)[1],
        params,
        model_state,
    )
    assert jax.tree.structure(kept) == jax.tree.structure(model_state)
    if model_state is not None:
        params, model_state = in_jax.init_model_fn(RNG)
        found, result = jax.jit(gradient)(params, model_state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, result.loss)))
        pairs = zip(jax.tree.leaves(model_state), jax.tree.leaves(result.new_model_state), strict=True)
        assert not any(_same(before, after) for before, after in pairs)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_base(name):
    """In its initial parameters or in what it computes of the same; traced in JAX, computed in PyTorch."""
    entry = registry.WORKLOADS[name]
    variant, base = (registry.load(one, "pytorch") for one in (name, entry.base))
    outputs, initial = [], []
    for workload in (variant, base):
        model, state = workload.init_model_fn(RNG)
        initial.append([parameter.detach().clone() for parameter in model.parameters()])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        batch = _batch(workload)
        logits, _ = workload.model_fn(model, batch, state, ForwardPassMode.TRAIN, RNG, True)
        outputs.append(workload.loss_fn(batch["targets"], logits, batch.get("weights"))["summed"].item())
    assert outputs[0] != pytest.approx(outputs[1], rel=1e-6) or not _same(*initial)
    in_jax = registry.load(name, "jax")

    def traced(rng):
        params, state = in_jax.init_model_fn(rng)
        return in_jax.model_fn(params, _batch(in_jax), state, ForwardPassMode.TRAIN, rng, True)[0]

    assert jax.tree.leaves(jax.eval_shape(traced, RNG.astype(np.uint32)))
