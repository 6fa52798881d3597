"""mnist_resnet: its noise, its running statistics, and the same in both frameworks."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch

from submissions.common.jax import compute_gradient
from submissions.common.spec import ForwardPassMode
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds
from workloads.data import mnist
from workloads.mnist_resnet import data
from workloads.mnist_resnet.task import MnistResnetTask

RNG = seeds.root(1)
SIZE = 6


@pytest.fixture(scope="module")
def workload():
    return registry.load("mnist_resnet", "pytorch")


def _model(workload):
    """A model whose blocks and head do something from the start."""
    model, _ = workload.init_model_fn(RNG)
    for name, parameter in model.named_parameters():
        if "batch_norm3" in name or "head" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _logits(workload, model, batch, mode=ForwardPassMode.TRAIN, *, update_batch_norm=True):
    return workload.model_fn(model, batch, None, mode, RNG, update_batch_norm)[0]


def _train_batch(workload):
    return next(workload._build_input_queue(RNG, "train", "", SIZE))


def test_evaluation_has_fixed_noise_of_the_same_strength_as_training(workload):
    clean, noisy = mnist.load(), data.load({"eval_train": 20, "validation": 50, "test": 30})
    noise = {
        split: noisy[split].images - clean[name].images[: len(noisy[split].images)]
        for split, name in (("eval_train", "train"), ("validation", "validation"), ("test", "test"))
    }
    for values in noise.values():
        assert values.std() == pytest.approx(data.NOISE, rel=0.03)
    assert not np.allclose(noise["validation"][:20], noise["test"][:20])
    plain, batch = (module.train_batch(clean["train"], RNG, 3, 50) for module in (mnist, data))
    assert (plain["targets"] == batch["targets"]).all()
    assert (batch["inputs"] - plain["inputs"]).std() == pytest.approx(data.NOISE, rel=0.03)
    counts = np.bincount(noisy["validation"].labels, minlength=10)
    assert (counts == 5).all()


def test_a_block_starts_as_its_shortcut(workload):
    model, _ = workload.init_model_fn(RNG)
    first, second = model.blocks[1], model.blocks[2]
    assert first.projects
    assert not second.projects
    x = torch.rand(2, second.conv1.in_channels, 4, 4)
    torch.testing.assert_close(second(x), x)


def test_evaluation_normalises_by_running_statistics(workload):
    """By hand, in the stem; what a training pass adds to them is a tenth of the batch's."""
    model = _model(workload)
    batch = _train_batch(workload)
    with torch.no_grad():
        stem = model.stem(batch["inputs"])
    norm = model.batch_norm
    _logits(workload, model, batch, update_batch_norm=False)
    assert norm.running_mean.abs().sum() == 0
    assert norm.num_batches_tracked == 0
    _logits(workload, model, batch)
    torch.testing.assert_close(norm.running_mean, 0.1 * stem.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * stem.var(dim=(0, 2, 3)))
    seen = {}
    hook = norm.register_forward_hook(lambda module, args, out: seen.update(out=out))
    _logits(workload, model, batch, ForwardPassMode.EVAL)
    hook.remove()
    shape = (1, -1, 1, 1)
    expected = (stem - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
    torch.testing.assert_close(seen["out"], expected)


def test_both_frameworks_agree(monkeypatch):
    """Logits in training and evaluation, gradients, and running statistics, of all kinds of blocks."""
    monkeypatch.setattr(MnistResnetTask, "stages", (1, 2))
    workload, in_jax = (registry.load("mnist_resnet", framework) for framework in ("pytorch", "jax"))
    model = _model(workload)
    template, state = in_jax.init_model_fn(RNG)
    params = jax_params(model, template)
    batch, ours = (_train_batch(one) for one in (workload, in_jax))
    loss = workload.loss_fn(batch["targets"], _logits(workload, model, batch))
    (loss["summed"] / SIZE).backward()
    differentiate = jax.jit(functools.partial(compute_gradient, in_jax))
    gradient, result = differentiate(params, ours, state, RNG.astype(np.uint32))
    np.testing.assert_allclose(result.loss, loss["summed"].item() / SIZE, rtol=2e-4)
    expected = from_named({name: parameter.grad for name, parameter in model.named_parameters()}, params)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * np.abs(other).max())
    stem = result.new_model_state["batch_stats"]["batch_norm"]
    np.testing.assert_allclose(stem["mean"], model.batch_norm.running_mean, rtol=2e-4, atol=1e-6)
    # PyTorch keeps the unbiased variance, flax the biased one.
    count = SIZE * 14 * 14
    biased = 0.9 + (model.batch_norm.running_var - 0.9) * (count - 1) / count
    np.testing.assert_allclose(stem["var"], biased, rtol=2e-4)
    evaluated = _logits(workload, model, batch, ForwardPassMode.EVAL)
    running = dict(model.named_buffers())
    statistics = jax.tree_util.tree_map_with_path(
        lambda path, leaf: running[
            ".".join(entry.key for entry in path[:-1]).replace("blocks_", "blocks.") + f".running_{path[-1].key}"
        ].numpy(),
        state["batch_stats"],
    )
    logits = jax.jit(
        lambda p, s: in_jax.model_fn(p, ours, s, ForwardPassMode.EVAL, None, update_batch_norm=False)[0]
    )(params, {"batch_stats": statistics})
    np.testing.assert_allclose(logits, evaluated, rtol=2e-4, atol=2e-4)
