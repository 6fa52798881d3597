"""Each workload keeps AlgoPerf's contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from commands.errors import UserError
from submissions.common.spec import ForwardPassMode, LossType, ParameterType
from workloads import registry, seeds

NAMES = ["bible_lm", "mnist_vit"]  # what holds for others too is in test_every_workload.py


@pytest.fixture(scope="module", params=NAMES)
def workload(request):
    return registry.load(request.param, "pytorch")


def _batch(workload, split="train", size=8):
    return next(workload._build_input_queue(seeds.root(1), split, "", size))


def _forward(workload, model, batch, mode=ForwardPassMode.TRAIN, dropout_rate=0.0):
    return workload.model_fn(model, batch, None, mode, seeds.root(2), True, dropout_rate)[0]


def test_constants_are_sound(workload):
    assert workload.target_metric_name in ("accuracy", "loss")
    assert workload.loss_type is LossType.SOFTMAX_CROSS_ENTROPY
    assert workload.step_hint > 5 * workload.eval_period_steps > 0
    assert workload.max_allowed_runtime_sec >= 300
    for split in ("train", "eval_train", "validation", "test"):
        assert getattr(workload, f"num_{split}_examples") > 0


def test_initialisation_follows_the_rng(workload):
    first = workload.init_model_fn(seeds.root(1))[0].state_dict()
    torch.rand(3)
    again = workload.init_model_fn(seeds.root(1))[0].state_dict()
    other = workload.init_model_fn(seeds.root(2))[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_first_loss_is_that_of_a_uniform_guess(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    logits = _forward(workload, model, batch)
    loss = workload.loss_fn(batch["targets"], logits)
    mean = loss["summed"].item() / loss["n_valid_examples"].item()
    assert mean == pytest.approx(math.log(logits.shape[-1]), rel=0.35)


def test_shapes_and_types_name_every_parameter(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    names = [name for name, _ in model.named_parameters()]
    assert list(workload.param_shapes) == list(workload.model_params_types) == names
    types = workload.model_params_types
    assert types["blocks.0.attention.query.weight"] is ParameterType.ATTENTION_Q
    assert types["blocks.0.attention.out.bias"] is ParameterType.ATTENTION_BIAS
    assert types["blocks.0.norm1.weight"] is ParameterType.LAYER_NORM_SCALE
    assert types["blocks.0.mlp.linear1.weight"] is ParameterType.WEIGHT
    outputs = [name for name in names if workload.is_output_params(name)]
    assert len(outputs) == 2
    assert all(
        workload.param_shapes[name][0] == _forward(workload, model, _batch(workload)).shape[-1] for name in outputs
    )


def test_shapes_are_known_only_after_initialisation():
    with pytest.raises(ValueError, match="init_model_fn"):
        _ = registry.load("mnist_vit", "pytorch").param_shapes


def test_masked_loss_counts_only_valid_entries(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    logits = _forward(workload, model, batch).detach()
    targets = batch["targets"]
    mask = (torch.arange(targets.numel()).view(targets.shape) % 3 == 0).float()
    loss = workload.loss_fn(targets, logits, mask)
    log_p = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert loss["n_valid_examples"].item() == mask.sum().item()
    torch.testing.assert_close(loss["per_example"], -log_p * mask)
    torch.testing.assert_close(loss["summed"], (-log_p * mask).sum())
    whole = workload.loss_fn(targets, logits)
    assert whole["n_valid_examples"].item() == targets.numel()
    assert whole["per_example"].shape == targets.shape


def test_masked_entries_have_no_gradient(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    logits = _forward(workload, model, batch).detach().requires_grad_()
    mask = torch.zeros(batch["targets"].shape)
    mask[0] = 1
    workload.loss_fn(batch["targets"], logits, mask)["summed"].backward()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1:].abs().sum() == 0


def test_label_smoothing_and_soft_labels_agree(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    logits = _forward(workload, model, batch).detach()
    classes = logits.shape[-1]
    soft = torch.nn.functional.one_hot(batch["targets"], classes) * 0.9 + 0.1 / classes
    smoothed = workload.loss_fn(batch["targets"], logits, label_smoothing=0.1)
    torch.testing.assert_close(workload.loss_fn(soft, logits)["summed"], smoothed["summed"])
    assert smoothed["summed"] > 0


def test_dropout_acts_in_training_only(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    output = next(name for name in workload.param_shapes if workload.is_output_params(name))
    torch.nn.init.normal_(model.state_dict()[output])  # mnist_vit's starts at zero
    batch = _batch(workload)
    plain = _forward(workload, model, batch)
    assert not torch.equal(plain, _forward(workload, model, batch, dropout_rate=0.3))
    evaluated = _forward(workload, model, batch, ForwardPassMode.EVAL, dropout_rate=0.3)
    torch.testing.assert_close(evaluated, plain)
    assert not evaluated.requires_grad
    assert plain.requires_grad


def test_causal_model_does_not_see_the_future():
    workload = registry.load("bible_lm", "pytorch")
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    before = _forward(workload, model, batch)
    batch["inputs"][:, 40:] = (batch["inputs"][:, 40:] + 1) % 71
    after = _forward(workload, model, batch)
    torch.testing.assert_close(after[:, :40], before[:, :40])
    assert not torch.allclose(after[:, 40:], before[:, 40:])


def test_evaluation_does_not_depend_on_its_batch_size_or_disturb_the_model(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = ("test", workload.num_test_examples)
    results = [workload._eval_model_on_split(*split, size, model, None, seeds.root(1), "") for size in (100, 128)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluation_names(workload):
    model, _ = workload.init_model_fn(seeds.root(1))
    result = workload.eval_model(workload.eval_batch_size, model, None, seeds.root(1), "", None, 0)
    expected = {f"{split}/{name}" for split in ("train", "validation", "test") for name in ("loss", "accuracy")}
    assert set(result) == expected | {"validation/num_examples", "test/num_examples"}
    assert result["validation/num_examples"] == workload.num_validation_examples


def test_targets_are_inclusive_and_nan_is_no_hit(workload):
    name, target = workload.target_metric_name, workload.validation_target_value
    worse = 0.01 if workload.lower_is_better else -0.01
    reached = workload.has_reached_validation_target
    assert reached({f"validation/{name}": target})
    assert not reached({f"validation/{name}": target + worse})
    assert not reached({f"validation/{name}": math.nan})
    assert workload.has_reached_test_target({f"test/{name}": workload.test_target_value - worse})


def test_queue_resumes_at_a_position(workload):
    queue = workload._build_input_queue(seeds.root(1), "train", "", 4)
    batches = [next(queue) for _ in range(3)]
    other = workload._build_input_queue(seeds.root(1), "train", "", 4)
    other.position = 2
    assert torch.equal(next(other)["inputs"], batches[2]["inputs"])


def test_tensors_equal_the_framework_free_batches(workload):
    batch = _batch(workload)
    arrays = workload.numpy_batch(seeds.root(1), "train", 0, 8)
    assert set(batch) == set(arrays)
    assert np.array_equal(batch["targets"].numpy(), arrays["targets"])
    assert np.array_equal(np.sort(batch["inputs"].numpy().ravel()), np.sort(arrays["inputs"].ravel()))


def test_unknown_names_are_listed():
    with pytest.raises(UserError, match=f"Known: {', '.join(registry.WORKLOADS)}"):
        registry.load("imagenet", "pytorch")
    with pytest.raises(UserError, match="Known: pytorch"):
        registry.load("mnist_vit", "tensorflow")
