"""NadamW in JAX: the same updates as in PyTorch, compiled once, state that can be saved."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from algoperf_kfac.jax.nadamw import scale_by_nadamw
from algoperf_kfac.pytorch.nadamw import NadamW
from submissions.common.jax import apply_directions, clip_gradient, compute_gradient
from submissions.common.logs import LOG_PERIOD
from submissions.common.spec import LossType
from submissions.kfac_reduce.jax import submission as jax_kfac
from submissions.nadamw.jax import submission as jax_submission
from submissions.nadamw.pytorch import submission as torch_submission
from workloads.jax import losses as jax_losses
from workloads.pytorch import losses as pytorch_losses

STEPS = 20
SHAPES = {"w": (5, 8), "b": (8,), "v": (8, 4)}


def _start() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("one_minus_beta1", "beta2", "weight_decay"), [(0.1, 0.999, 0.0), (0.2, 0.95, 0.3), (1.0, 0.0, 0.1)]
)
def test_updates_equal_those_of_pytorch(one_minus_beta1, beta2, weight_decay):
    start, generator = _start(), np.random.default_rng(1)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = NadamW(tensors.values(), betas=(1 - one_minus_beta1, beta2), weight_decay=weight_decay)
    transformation = scale_by_nadamw(one_minus_beta1, beta2)
    params: Any = {name: jnp.asarray(value) for name, value in start.items()}
    state = transformation.init(params)
    for step in range(STEPS):
        learning_rate = 0.01 * (step + 1)
        grads = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        directions, state = transformation.update(grads, state)
        params = apply_directions(params, directions, learning_rate, weight_decay)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert state.count == STEPS


def test_first_bias_correction_is_exact():
    # 1 - 0.999 in float32 is off by 5e-5; the first direction is g / |g| whatever the betas.
    transformation = scale_by_nadamw(0.001, 0.999, eps=0.0)
    grads = {"w": jnp.array([3.0, -0.25])}
    directions, _ = transformation.update(grads, transformation.init(grads))
    # m_hat = (beta1 (1 - beta1) + (1 - beta1)) g / (1 - beta1) = (1 + beta1) g
    np.testing.assert_allclose(directions["w"], [1.999, -1.999], rtol=1e-6)


def test_composes_with_optax():
    optimizer = optax.chain(scale_by_nadamw(0.1, 0.99), optax.add_decayed_weights(0.1), optax.scale(-0.01))
    params = {name: jnp.asarray(value) for name, value in _start().items()}
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    directions, _ = scale_by_nadamw(0.1, 0.99).update(params, scale_by_nadamw(0.1, 0.99).init(params))
    expected = apply_directions(params, directions, 0.01, 0.1)
    for name, value in optax.apply_updates(params, updates).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0.0, 0.9), "one_minus_beta1"),
        ((1.1, 0.9), "one_minus_beta1"),
        ((0.1, 1.0), "beta2"),
        ((0.1, 0.9, -1), "eps"),
    ],
)
def test_values_out_of_range_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        scale_by_nadamw(*arguments)


class _TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in _start().items():
            setattr(self, name, torch.nn.Parameter(torch.tensor(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w + self.b) @ self.v


def _workload(framework: str) -> Any:
    """A small classifier behind AlgoPerf's interface, the same in both frameworks."""

    def model_fn(params, augmented_and_preprocessed_input_batch, model_state, mode, rng, update_batch_norm, **kw):
        x = augmented_and_preprocessed_input_batch["inputs"]
        if framework == "pytorch":
            return params(x), model_state
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"], model_state

    owner: Any = pytorch_losses if framework == "pytorch" else jax_losses
    return SimpleNamespace(
        model_fn=model_fn,
        loss_fn=lambda label_batch, logits_batch, mask_batch, label_smoothing: owner.softmax_cross_entropy(
            label_batch, logits_batch, mask_batch, label_smoothing
        ),
        step_hint=2 * STEPS,
        loss_type=LossType.SOFTMAX_CROSS_ENTROPY,
        metrics_logger=None,
    )


def _batches(masked: bool) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(2)
    batches = []
    for _ in range(STEPS):
        batch = {
            "inputs": generator.normal(size=(16, 5)).astype(np.float32),
            "targets": generator.integers(0, 4, size=16),
        }
        if masked:
            batch["weights"] = (generator.uniform(size=16) < 0.7).astype(np.float32)
        batches.append(batch)
    return batches


def _train(
    submission: Any, workload: Any, params: Any, point: Any, batches: list[Any], rng: Any
) -> tuple[Any, Any]:
    state = submission.init_optimizer_state(workload, params, None, point, rng)
    for step, batch in enumerate(batches):
        state, params, _ = submission.update_params(
            workload=workload,
            current_param_container=params,
            current_params_types=None,
            model_state=None,
            hyperparameters=point,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=state,
            eval_results=[],
            global_step=step,
            rng=rng,
        )
    return state, params


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("point", [None, {"grad_clip": None, "label_smoothing": 0.1}, {"grad_clip": 0.05}])
def test_submissions_agree_over_twenty_steps(point, masked):
    batches = _batches(masked)
    tensors = [{key: torch.tensor(value) for key, value in batch.items()} for batch in batches]
    _, model = _train(torch_submission, _workload("pytorch"), _TorchNet(), point, tensors, None)
    rng = np.zeros(2, np.uint32)
    _, params = _train(jax_submission, _workload("jax"), _start(), point, batches, rng)
    for name, tensor in model.named_parameters():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-5)
        assert np.abs(params[name] - _start()[name]).max() > 0.01


def test_step_is_compiled_once_and_state_is_on_the_mesh():
    rng = np.zeros(2, np.uint32)
    (opt_state, run), params = _train(jax_submission, _workload("jax"), _start(), None, _batches(False), rng)
    assert run.compiled._cache_size() == 1
    for leaf in jax.tree.leaves((opt_state, params)):
        assert leaf.sharding.is_fully_replicated
        assert leaf.size > 0


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("submission", [jax_submission, jax_kfac], ids=["nadamw", "kfac"])
def test_a_model_may_ask_whether_it_drops_anything(submission, rate):
    """As AlgoPerf's criteo1tb_resnet does, which a traced rate cannot answer."""
    workload, given = _workload("jax"), []
    model_fn = workload.model_fn

    def asking(*args, dropout_rate, **kwargs):
        given.append(bool(dropout_rate))
        return model_fn(*args, **kwargs)

    workload.model_fn, workload.init_model_fn = asking, lambda rng: (_start(), None)
    _train(submission, workload, _start(), {"dropout_rate": rate}, _batches(False)[:2], np.zeros(2, np.uint32))
    assert set(given) == {rate > 0}


def test_official_checkpoint_functions_take_the_state():
    from flax import serialization

    rng = np.zeros(2, np.uint32)
    (opt_state, _), _ = _train(jax_submission, _workload("jax"), _start(), None, _batches(False)[:2], rng)
    saved = serialization.msgpack_restore(serialization.msgpack_serialize(serialization.to_state_dict(opt_state)))
    fresh, _ = jax_submission.init_optimizer_state(None, _start(), None, None, None)
    restored = serialization.from_state_dict(fresh, saved)
    for old, new in zip(jax.tree.leaves(opt_state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(old, new)


def test_clipping_is_that_of_pytorch():
    grads = _start()
    for max_norm in (None, 0.5, 1e3):
        clipped, norm = clip_gradient(grads, max_norm)
        tensors = [torch.nn.Parameter(torch.zeros(value.shape)) for value in grads.values()]
        for tensor, value in zip(tensors, grads.values(), strict=True):
            tensor.grad = torch.tensor(value)
        expected = torch.nn.utils.clip_grad_norm_(tensors, np.inf if max_norm is None else max_norm)
        np.testing.assert_allclose(norm, expected.item(), rtol=1e-6)
        for name, tensor in zip(grads, tensors, strict=True):
            np.testing.assert_allclose(clipped[name], tensor.grad.numpy(), rtol=1e-6)


def test_gradient_is_that_of_the_mean_over_valid_examples():
    batch = _batches(True)[0]
    gradient, result = compute_gradient(_workload("jax"), _start(), batch, None, None)
    kept = batch["weights"] == 1
    only = {"inputs": batch["inputs"][kept], "targets": batch["targets"][kept]}
    expected, without = compute_gradient(_workload("jax"), _start(), only, None, None)
    assert result.n_valid == without.n_valid == kept.sum()
    np.testing.assert_allclose(result.loss, without.loss, rtol=1e-6)
    for name, value in gradient.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-7)


def test_logging_is_sparse():
    rows = []
    workload = _workload("jax")
    workload.metrics_logger = SimpleNamespace(append_scalar_metrics=lambda row, step: rows.append((step, row)))
    batches = [copy.copy(batch) for batch in _batches(False) * (LOG_PERIOD // STEPS)] + _batches(False)[:1]
    _train(jax_submission, workload, _start(), None, batches, np.zeros(2, np.uint32))
    assert [step for step, _ in rows] == [0, LOG_PERIOD]
    assert all(set(row) == {"loss", "grad_norm"} and isinstance(row["loss"], float) for _, row in rows)
