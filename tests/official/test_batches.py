"""The batches are what AlgoPerf's pipelines make, where it matters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from benchmarks.official import batches
from commands.errors import UserError
from workloads import algoperf
from workloads.algoperf import VARIANTS

torch = pytest.importorskip("torch")


def numpy_of(tensor):
    return tensor.numpy() if hasattr(tensor, "numpy") else np.asarray(tensor)


def test_every_workload_has_a_batch():
    assert {name for name in batches.RECIPES if name not in batches.OTHER_CUTS} == set(algoperf.WORKLOADS)


def test_every_variant_belongs_to_a_workload():
    assert {algoperf.base_of(name) for name in VARIANTS} == set(algoperf.WORKLOADS) - {
        "finewebedu_lm",
        "mnist",
        "cifar",
    }
    with pytest.raises(UserError, match="imagenet_mlp"):
        algoperf.base_of("imagenet_mlp")


@pytest.mark.skipif(not algoperf.installed(), reason=algoperf.NOT_INSTALLED)
def test_the_registry_holds_nothing_else():
    from algoperf.workloads import workloads

    assert set(workloads.WORKLOADS) == {*algoperf.here(), *VARIANTS}


def test_what_is_cut_in_a_second_way_has_a_name_of_its_own():
    for name, official in batches.OTHER_CUTS.items():
        assert name not in VARIANTS
        assert algoperf.base_of(name) == official
        assert batches.recipe_name(name) == name
    assert batches.recipe_name("wmt_post_ln") == "wmt"
    true = batches.LANGUAGE_MODELS["finewebedu_lm_all_words"]
    assert (true.layers, true.vocabulary) == (1, 50_257)
    assert batches.RECIPES["finewebedu_lm_all_words"].cut.startswith("1 layer, 50,257 words and 64 tokens, not 12")


@pytest.mark.skipif(not algoperf.installed() or algoperf.is_older(), reason="needs AlgoPerf 1.0")
@pytest.mark.parametrize("framework", ["pytorch", "jax"])
def test_the_language_model_is_as_large_as_it_says(framework):
    """In a process of its own: flags of absl are parsed once."""
    program = f"""
from benchmarks.official import batches, one_batch
from benchmarks.official.environment import load_runner
runner = load_runner("{framework}", "finewebedu_lm")
for name, size in batches.LANGUAGE_MODELS.items():
    made = one_batch.make_workload(runner, name, "{framework}", (), data_parallel=False)
    assert (made._n_layers, made._vocab_size, made._seq_len) == (size.layers, size.vocabulary, size.length)
    assert (made._emb_dim, made._mlp_dim) == (1024, 4096)  # the true ones
    assert made.batch["inputs"].shape == (2, size.length)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", batches.LANGUAGE_MODELS)
def test_the_language_model_reads_one_stream(name):
    batch = batches.make_batch(name, "pytorch")
    assert batch["weights"] is None
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (torch.int32, torch.int64)
    assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all()
    vocabulary = batches.LANGUAGE_MODELS[name].vocabulary
    assert 0.5 * vocabulary < batch["targets"].max() < vocabulary


def test_mnist_is_raw():
    inputs = batches.make_batch("mnist", "pytorch")["inputs"]
    assert inputs.shape[1:] == (1, 28, 28)
    assert inputs.min() < -0.4
    assert 400 < inputs.max() <= (255 - 0.1307) / 0.3081 + 1e-3


@pytest.mark.parametrize("name", ["cifar", "imagenet_resnet", "imagenet_vit", "fastmri"])
def test_no_weights_where_the_pipeline_has_none(name):
    assert "weights" not in batches.make_batch(name, "pytorch")


def test_mixup():
    targets = batches.make_batch("imagenet_vit", "pytorch")["targets"]
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
    assert ((targets > 0).sum(1) == 2).all()


def test_wmt_is_packed_and_padded():
    batch = {key: numpy_of(value) for key, value in batches.make_batch("wmt", "pytorch").items()}
    for side in ("inputs", "targets"):
        tokens, position, segment = (batch[side + suffix] for suffix in ("", "_position", "_segmentation"))
        assert ((tokens == 0) == (segment == 0)).all()
        assert (tokens == 0).any()
        assert (segment.max(1) == 3).all()
        starts = (np.diff(segment, prepend=0) != 0) & (segment > 0)
        assert (position[starts] == 0).all()
        inside = ~starts & (segment > 0)
        assert (position[inside] == np.roll(position, 1, axis=1)[inside] + 1).all()
    assert (batch["weights"] == (batch["targets"] > 0)).all()


def test_ogbg_graphs_differ_and_the_last_is_padding():
    pytest.importorskip("jraph")
    batch = batches.make_batch("ogbg", "pytorch")
    graph, weights = batch["inputs"], batch["weights"]
    size = batches.RECIPES["ogbg"].examples
    assert len(graph.nodes) == graph.n_node.sum() == 26 * size + 1
    assert len(graph.edges) == graph.n_edge.sum() == 56 * size
    assert graph.n_node.unique().numel() > 3
    real = weights.any(1)
    assert not real[-1]
    assert real.sum() >= 3
    assert not weights[real].all(), "labels with gaps"
    assert torch.isfinite(batch["targets"]).all()


def test_criteo_categories_are_skewed_and_large():
    inputs = batches.make_batch("criteo1tb", "pytorch")["inputs"]
    assert inputs.shape[1] == 39
    assert inputs[:, 13:].max() > 1e6
    assert inputs[:, :13].min() == 0


@pytest.mark.parametrize("name", ["librispeech_conformer", "librispeech_deepspeech"])
def test_speech_is_padded_at_the_end(name):
    batch = batches.make_batch(name, "pytorch")
    for values, paddings in (batch["inputs"], batch["targets"]):
        assert values.dtype == paddings.dtype == torch.float32
        assert (paddings.diff(dim=1) >= 0).all()
        assert (values[paddings == 1] == 0).all()
        assert (paddings.sum(1) > 0).all()
