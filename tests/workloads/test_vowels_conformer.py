"""vowels_conformer: its sequences, CTC, the error rate, its models in both frameworks."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import torch

from submissions.common.jax import compute_gradient, forward
from submissions.common.spec import ForwardPassMode, LossType
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds
from workloads.data.trees import map_arrays
from workloads.jax.losses import LOSSES as JAX_LOSSES
from workloads.jax.workload import _narrow
from workloads.pytorch.losses import LOSSES
from workloads.vowels_conformer import data
from workloads.vowels_conformer.pytorch import MaskedBatchNorm
from workloads.vowels_conformer.task import collapsed, edit_distance

CHANGES = {
    "base": {},
    "gelu and layer norm": {"activation": "gelu", "convolution_norm": "layer"},
    "lstm": {"encoder": "lstm"},
}


@functools.cache
def _workload(framework, changes="base"):
    """A workload of one block."""
    class_ = registry.WORKLOADS["vowels_conformer"].workload(framework)
    return type(class_.__name__, (class_,), {"depth": 1, **CHANGES[changes]})()


def _batch(workload, split="train", size=4):
    return next(workload._build_input_queue(seeds.root(1), split, "", size))


def test_parts_hold_each_utterance_once():
    parts = data.load()
    assert {name: len(part.lengths) for name, part in parts.items()} == {
        "train": 270,
        "validation": 187,
        "test": 183,
    }
    assert (np.bincount(parts["train"].speakers)[1:] == 30).all()
    utterances = [features.tobytes() for part in parts.values() for features in part.features]
    assert len(set(utterances)) == len(utterances) == 640
    train = parts["train"]
    spoken = np.arange(data.MAX_UTTERANCE) < train.lengths[:, None]
    np.testing.assert_allclose(train.features[spoken].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.features[spoken].std(axis=0), 1, atol=1e-5)
    assert not train.features[~spoken].any()


def test_sequences_are_the_utterances_one_after_the_other(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 0.0)
    part = data.load()["test"]
    speaker_of = {
        features[:length].tobytes(): speaker
        for features, length, speaker in zip(part.features, part.lengths, part.speakers, strict=True)
    }
    batch = data.eval_batch(part, 10, 0, 16)
    (features, paddings), (labels, label_paddings) = batch["inputs"], batch["targets"]
    np.testing.assert_array_equal(batch["weights"], [1] * 10 + [0] * 6)
    assert paddings[10:].all()
    assert label_paddings[10:].all()
    for row in range(10):
        frames = features[row, paddings[row] == 0]
        assert not features[row, paddings[row] == 1].any()
        found = []
        while len(frames):
            length = next(n for n in range(1, len(frames) + 1) if frames[:n].tobytes() in speaker_of)
            found.append(speaker_of[frames[:length].tobytes()])
            frames = frames[length:]
        assert found == labels[row, label_paddings[row] == 0].tolist()
        assert 3 <= len(found) <= 8


def test_training_batches_follow_rng_and_index_and_can_be_written_down():
    part = data.load()["train"]
    one, again, other = (data.train_batch(part, seeds.root(4), index, 256) for index in (0, 0, 1))
    for key in ("inputs", "targets"):
        for array, same, different in zip(one[key], again[key], other[key], strict=True):
            np.testing.assert_array_equal(array, same)
            assert not np.array_equal(array, different)
    (features, paddings), (labels, label_paddings) = one["inputs"], one["targets"]
    hidden = (features == 0).all(axis=2) & (paddings == 0)
    assert 0 < hidden.sum(axis=1).max() <= data.TIME_MASKS * data.MAX_TIME_MASK
    # CTC needs a position for each label, and a blank between two that are the same.
    positions = (1 - paddings[:, ::2]).sum(axis=1)
    repeated = ((labels[:, 1:] == labels[:, :-1]) & (label_paddings[:, 1:] == 0)).sum(axis=1)
    assert (positions >= (1 - label_paddings).sum(axis=1) + repeated).all()


def test_ctc_is_the_sum_over_all_paths():
    """Against an enumeration of all paths, in both frameworks; with padding in frames, labels and examples."""
    rng = np.random.RandomState(0)
    logits = rng.standard_normal((5, 4, 3)).astype(np.float32)
    labels = np.array([[1, 2], [1, 1], [2, 0], [0, 0], [0, 0]])
    numbers, lengths = np.array([2, 2, 1, 0, 0]), np.array([4, 4, 3, 2, 0])
    label_paddings = (np.arange(2) >= numbers[:, None]).astype(np.float32)
    paddings = (np.arange(4) >= lengths[:, None]).astype(np.float32)
    mask = np.array([1, 1, 1, 1, 0], np.float32)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.zeros(5)
    for n in range(4):
        paths = itertools.product(range(3), repeat=lengths[n])
        wanted = labels[n, : numbers[n]].tolist()
        matching = [
            sum(log_p[n, t, label] for t, label in enumerate(path)) for path in paths if collapsed(path) == wanted
        ]
        expected[n] = -math.log(sum(map(math.exp, matching)))

    ctc = JAX_LOSSES[LossType.CTC_LOSS]
    jax_loss = lambda scores: ctc((labels, label_paddings), (scores, paddings), mask, 0.0)  # noqa: E731
    in_jax = jax.jit(jax_loss)(logits)
    tensors = [torch.tensor(array) for array in (labels, label_paddings, logits, paddings, mask)]
    tensors[2].requires_grad_()
    in_torch = LOSSES[LossType.CTC_LOSS](tuple(tensors[:2]), tuple(tensors[2:4]), tensors[4], 0.0)
    in_torch["summed"].backward()
    for found in (in_jax, {key: value.detach().numpy() for key, value in in_torch.items()}):
        np.testing.assert_allclose(found["per_example"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["summed"], expected.sum(), rtol=1e-5)
        assert found["n_valid_examples"] == 5
    gradient = jax.jit(jax.grad(lambda scores: jax_loss(scores)["summed"]))(logits)
    np.testing.assert_allclose(gradient, tensors[2].grad, rtol=1e-4, atol=1e-6)
    assert not np.asarray(gradient)[paddings == 1].any()
    assert not tensors[2].grad.numpy()[paddings == 1].any()


def test_edit_distance_is_the_shortest_way_by_single_edits():
    def edits(word):
        for i in range(len(word) + 1):
            yield word[:i] + word[i + 1 :]
            for label in (1, 2):
                yield (*word[:i], label, *word[i:])
                yield (*word[:i], label, *word[i + 1 :])

    words = [word for size in range(4) for word in itertools.product((1, 2), repeat=size)]
    for start in words:
        distances, front = {start: 0}, [start]
        while front and not all(word in distances for word in words):
            reached = {word for known in front for word in edits(known) if word not in distances and len(word) < 7}
            distances |= dict.fromkeys(reached, distances[front[0]] + 1)
            front = list(reached)
        assert [edit_distance(start, word) for word in words] == [distances[word] for word in words]


def test_metrics_count_errors_per_label():
    assert collapsed([0, 3, 3, 0, 3, 5, 5]) == [3, 3, 5]
    batch = {
        "loss": np.float64(6.0),
        "n_valid": np.float64(4.0),
        "best": np.array([[1, 1, 0, 2], [3, 3, 4, 4], [5, 5, 5, 5]]),  # 1 2; 3; and one without weight
        "paddings": np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32),
        "labels": np.array([[1, 2, 2], [4, 0, 0], [1, 1, 1]]),
        "label_paddings": np.array([[0, 0, 0], [0, 1, 1], [0, 0, 0]], np.float32),
        "weights": np.array([1, 1, 0], np.float32),
    }
    # One label is missing, one is another.
    assert _workload("pytorch").metrics([batch, batch]) == {"loss": 1.5, "label_error_rate": 0.5}


@pytest.mark.parametrize("changes", CHANGES)
def test_both_frameworks_agree(changes):
    """Logits, loss, gradient and running statistics with the same weights; in training."""
    pytorch, in_jax = _workload("pytorch", changes), _workload("jax", changes)
    model, _ = pytorch.init_model_fn(seeds.root(1))
    batch = _batch(pytorch)
    (logits, paddings), _ = pytorch.model_fn(model, batch, None, ForwardPassMode.TRAIN, seeds.root(2), True)
    loss = pytorch.loss_fn(batch["targets"], (logits, paddings))
    (loss["summed"] / loss["n_valid_examples"]).backward()
    template, state = in_jax.init_model_fn(seeds.root(1))
    params = jax_params(model, template)
    arguments = (params, map_arrays(lambda value: _narrow(value.numpy()), batch), state, seeds.root(2))
    gradient, result = jax.jit(functools.partial(compute_gradient, in_jax))(*arguments)
    (found, pads), _ = jax.jit(functools.partial(forward, in_jax))(*arguments)
    visible = paddings.numpy() == 0
    np.testing.assert_array_equal(pads == 0, visible)
    np.testing.assert_allclose(found[visible], logits.detach().numpy()[visible], rtol=2e-4, atol=2e-5)
    assert float(result.loss) == pytest.approx(loss["summed"].item() / loss["n_valid_examples"].item(), rel=1e-5)
    expected = from_named({key: value.grad for key, value in model.named_parameters()}, params)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        tolerance = 2e-4 * max(np.abs(wanted).max(), 1e-2)  # that of a key's bias is 0 but for rounding
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=tolerance, err_msg=jax.tree_util.keystr(path))
    norms = [layer for layer in model.modules() if isinstance(layer, MaskedBatchNorm)]
    statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    for found, wanted in zip(jax.tree.leaves(result.new_model_state), statistics, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("changes", ["base", "lstm"])
def test_more_padding_changes_nothing(changes):
    workload = _workload("pytorch", changes)
    model, _ = workload.init_model_fn(seeds.root(1))
    features, paddings = _batch(workload)["inputs"]
    assert paddings[:, -1].sum() > 0
    with torch.no_grad():
        logits, short = model(features, paddings)
        wider, long = model(
            torch.nn.functional.pad(features, (0, 0, 0, 12)), torch.nn.functional.pad(paddings, (0, 12), value=1)
        )
    assert (long[:, 64:] == 1).all()
    torch.testing.assert_close(wider[:, :64][short == 0], logits[short == 0], rtol=1e-4, atol=1e-5)


def test_batch_norm_without_padding_is_that_of_torch():
    ours, theirs = MaskedBatchNorm(5), torch.nn.BatchNorm1d(5, eps=1e-3)
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(ours(x, visible), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    biased = 0.9 + 0.1 * x.flatten(0, 1).var(dim=0, correction=0)  # torch's own running variance is not
    torch.testing.assert_close(ours.running_var, biased)
    x[:, 3:], visible[:, 3:] = 100.0, False
    torch.testing.assert_close(ours(x, visible)[:, :3], ours(x[:, :3], visible[:, :3]))


def test_running_statistics_stay_without_an_update():
    workload = _workload("pytorch", "lstm")
    model, _ = workload.init_model_fn(seeds.root(1))
    batch, norm = _batch(workload), model.blocks[0].batch_norm
    outputs = []
    for update in (False, True):
        logits, _ = workload.model_fn(model, batch, None, ForwardPassMode.TRAIN, seeds.root(2), update)
        outputs.append(logits[0])
        assert (norm.running_mean.abs().max() > 0) == update
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("changes", ["base", "lstm"])
def test_an_evaluation_does_not_depend_on_its_batch_size(changes):
    workload = _workload("pytorch", changes)
    model, _ = workload.init_model_fn(seeds.root(1))
    first, other = (
        workload._eval_model_on_split("test", 32, size, model, None, seeds.root(1), "") for size in (20, 32)
    )
    assert first == pytest.approx(other, rel=1e-5)
    assert set(first) == {"loss", "label_error_rate"}
    assert math.isfinite(first["loss"])
