"""brain_unet: slices apart from each other, simulated k-space, the metric, and one model in two frameworks."""

from __future__ import annotations

import gzip
import sys

import jax
import numpy as np
import pytest
import torch

from commands.errors import UserError
from submissions.common.spec import ForwardPassMode, LossType
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds
from workloads.brain_unet import data
from workloads.brain_unet.ssim import structural_similarity
from workloads.data import source

NAMES = ["brain_unet_layernorm", "brain_unet_mse"]  # with norms that have parameters and without, both losses


@pytest.fixture(scope="module")
def parts():
    return data.load()


@pytest.fixture
def double_precision():
    """JAX keeps float64 arrays as they are."""
    before = jax.config.values["jax_enable_x64"]
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def test_parts_are_slabs_with_gaps_between(parts):
    assert {name: part.shape for name, part in parts.items()} == {
        "train": (71, 197, 233),
        "validation": (16, 197, 233),
        "test": (18, 197, 233),
    }
    bounds = [bound for name in ("train", "validation", "test") for bound in data.SLICES[name]]
    assert min(later - earlier for earlier, later in zip(bounds[1::2], bounds[2::2], strict=False)) >= 5
    assert min(part.min() for part in parts.values()) >= 0
    assert max(part.max() for part in parts.values()) <= 1
    # The voxel (80, 100, 36), x running fastest in the file's 352 bytes of header and then voxels.
    voxels = gzip.decompress(source.read(data.SOURCE))[352:]
    assert parts["train"][10, 80, 100] * max(voxels) == pytest.approx(voxels[80 + 197 * (100 + 233 * 36)])


def test_training_batches_follow_rng_and_index(parts):
    first, again, other = (data.train_batch(parts["train"], seeds.root(1), index, 6) for index in (3, 3, 4))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["inputs"], other["inputs"])
    assert not np.array_equal(first["targets"], other["targets"])


def test_crops_are_pieces_of_their_slices_mirrored_or_transposed():
    part = np.arange(2 * 197 * 233, dtype=np.float64).reshape(2, 197, 233)  # every voxel tells where it was
    crops = data._crops(part, seeds.generator(seeds.root(2)), np.arange(40) % 2)
    kinds = set()
    for k, crop in enumerate(crops):
        transposed = abs(crop[0, 1] - crop[0, 0]) > 1
        upright = crop.T if transposed else crop
        mirrored = upright[1, 0] < upright[0, 0]
        upright = upright[::-1] if mirrored else upright
        slice_, top, left = np.unravel_index(int(upright[0, 0]), part.shape)
        assert slice_ == k % 2
        assert abs(top - 66) <= 40
        assert abs(left - 84) <= 40
        np.testing.assert_array_equal(upright, part[slice_, top : top + 64, left : left + 64])
        kinds.add((transposed, mirrored))
    assert len(kinds) == 4


def test_masks_keep_the_centre_and_a_fourth_of_the_columns():
    masks = data.sampling_masks(seeds.generator(seeds.root(1)), 2_000)
    assert set(np.unique(masks)) == {0, 1}
    assert masks[:, 30:35].all()
    assert masks.mean() == pytest.approx(1 / 4, abs=0.005)
    assert len(np.unique(masks, axis=0)) > 1_900


def test_whole_k_space_gives_the_image_back_and_columns_alias_it(parts):
    images = parts["validation"][:2, :64, :64].astype(np.float64)
    nothing = np.zeros(images.shape)
    np.testing.assert_allclose(data.zero_filled(images, np.ones((2, 64)), nothing), images, atol=1e-12)
    # Every other column: the mean of the image and the image shifted by half its width.
    every_other = np.tile(np.arange(64) % 2 == 0, (2, 1))
    aliased = (images + np.roll(images, 32, axis=2)) / 2
    np.testing.assert_allclose(data.zero_filled(images, every_other, nothing), aliased, atol=1e-12)


def test_inputs_are_normalised_and_both_are_cut():
    images = np.zeros((1, 64, 64))
    images[0, 20, 20] = 1.0
    batch = data._examples(images, seeds.generator(seeds.root(1)))
    assert np.abs(batch["inputs"]).max() == pytest.approx(6)
    assert batch["targets"][0, 20, 20] == 6
    smooth = data._examples(np.outer(np.hanning(64), np.hanning(64))[None], seeds.generator(seeds.root(1)))
    assert smooth["inputs"].mean() == pytest.approx(0, abs=1e-5)
    assert smooth["inputs"].std() == pytest.approx(1, abs=1e-5)


def test_ssim_is_that_of_a_direct_loop():
    random = np.random.RandomState(0)
    first = random.rand(2, 12, 10)
    second = first + 0.2 * random.randn(2, 12, 10)
    data_range = np.array([1.0, 1.7])
    for found, x, y, span in zip(
        structural_similarity(first, second, data_range), first, second, data_range, strict=True
    ):
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        values = []
        for i in range(12 - 6):
            for j in range(10 - 6):
                a, b = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
                covariance = np.cov(a, b)
                above = (2 * a.mean() * b.mean() + c1) * (2 * covariance[0, 1] + c2)
                below = (a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
                values.append(above / below)
        assert found == pytest.approx(np.mean(values), rel=1e-10)
    np.testing.assert_allclose(structural_similarity(first, first, data_range), 1.0)


def test_padding_changes_no_metric():
    workload = registry.load("brain_unet", "pytorch")
    model, _ = workload.init_model_fn(seeds.root(1))
    arguments = (model, None, seeds.root(1), "")
    whole, padded = (workload._eval_model_on_split("test", 18, size, *arguments) for size in (18, 7))
    assert set(whole) == {"loss", "ssim"}
    assert padded == pytest.approx(whole, rel=1e-5)


def test_missing_reader_names_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"'nibabel'.*not installed.*pip install .*nibabel==5\.4\.2"):
        data.load()


@pytest.mark.parametrize("name", NAMES)
def test_both_frameworks_agree(name, request):
    """In double precision: in single, a rounding error may take a unit or a residual to the other side of zero."""
    pytorch, in_jax = registry.load(name, "pytorch"), registry.load(name, "jax")
    model, _ = pytorch.init_model_fn(seeds.root(1))
    template, _ = in_jax.init_model_fn(seeds.root(1))
    params = jax.tree.map(lambda value: value.astype(np.float64), jax_params(model, template))
    request.getfixturevalue("double_precision")
    model.double()
    arrays = pytorch.numpy_batch(seeds.root(1), "train", 0, 2)
    # A corner of the images, as the model takes any size: in double precision convolutions are slow.
    inputs, targets = (arrays[key][:, :16, :16].astype(np.float64) for key in ("inputs", "targets"))
    batch = {"inputs": torch.tensor(inputs), "targets": torch.tensor(targets)}
    outputs, _ = pytorch.model_fn(model, batch, None, ForwardPassMode.TRAIN, seeds.root(2), True)
    loss = pytorch.loss_fn(batch["targets"], outputs)
    difference = outputs - batch["targets"]
    squared = pytorch.loss_type is LossType.MEAN_SQUARED_ERROR
    torch.testing.assert_close(loss["summed"], (difference**2 if squared else difference.abs()).mean((1, 2)).sum())
    (loss["summed"] / loss["n_valid_examples"]).backward()

    def mean_loss(params):
        batch = {"inputs": inputs, "targets": targets}
        outputs, _ = in_jax.model_fn(params, batch, None, ForwardPassMode.EVAL, None, update_batch_norm=False)
        loss = in_jax.loss_fn(targets, outputs)
        return loss["summed"] / loss["n_valid_examples"], outputs

    gradient, found = jax.jit(jax.grad(mean_loss, has_aux=True))(params)
    np.testing.assert_allclose(found, outputs.detach().numpy(), rtol=1e-6, atol=1e-6)
    wanted = from_named({key: parameter.grad for key, parameter in model.named_parameters()}, params)
    for (path, value), target in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(value, target, rtol=1e-5, atol=1e-5 * np.abs(target).max(), err_msg=str(path))
