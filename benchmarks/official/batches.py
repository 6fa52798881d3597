"""Small batches with the keys, shapes, types and oddities of those AlgoPerf's real input pipelines make.

AlgoPerf's own test feeds fake batches that differ from the real ones where it matters to K-FAC: no packed
sequences, no soft labels, graphs of one node, constant categories. Here everything is synthetic too, but made as
the pipelines make it. Only batch, sequence and image sizes are cut, and the two models that are too large for a
small machine: see `RECIPES`. One of these two is cut in a second way, under a name of its own: see `OTHER_CUTS`.

Imports jraph and AlgoPerf's sharding only where a batch needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from submissions.common.api import Batch, Tree
from workloads.algoperf import GRAPH_EDGES, GRAPH_NODES, base_of

FASTMRI_SIZE = 64  # true: 320
AUDIO_SAMPLES = 64_000  # true: 320,000
LABEL_LENGTH = 256
WMT_LENGTH = 32  # true: 256
WMT_VOCABULARY = 32_000
OGBG_TASKS = 128  # labels of a molecule
# Hash buckets of Criteo's 26 categorical columns.
CRITEO_BUCKETS = (
    39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63, 38_532_951, 2_953_546, 403_346, 10,
    2_208, 11_938, 155, 4, 976, 14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36,
)  # fmt: skip


@dataclass(frozen=True)
class LanguageModel:
    """How large finewebedu_lm is made; the width of its layers is the true one.

    Attributes:
        layers: true: 12.
        vocabulary: true: 50,257.
        length: tokens of a row; true: 1024.
    """

    layers: int
    vocabulary: int
    length: int


LANGUAGE_MODELS = {
    "finewebedu_lm": LanguageModel(layers=2, vocabulary=2_048, length=64),
    "finewebedu_lm_all_words": LanguageModel(layers=1, vocabulary=50_257, length=64),
}
# Workloads that are cut in a second way, under names that AlgoPerf does not have, with AlgoPerf's names.
OTHER_CUTS = {"finewebedu_lm_all_words": "finewebedu_lm"}


def recipe_name(workload_name: str) -> str:
    """Which of `RECIPES` makes its batch: a variant's is its base's.

    Raises:
        UserError: unknown workload.
    """
    return workload_name if workload_name in RECIPES else base_of(workload_name)


def make_batch(workload_name: str, framework: str, seed: int = 0) -> Batch:
    """A batch as the training pipeline of that workload and framework yields it, on one CPU device.

    Raises:
        UserError: unknown workload.
    """
    base, recipe = base_of(workload_name), RECIPES[recipe_name(workload_name)]
    batch = recipe.make(np.random.RandomState(seed), recipe.examples, framework)
    return _as_torch(base, batch) if framework == "pytorch" else _as_jax(base, batch)


def _smooth(rng: np.random.RandomState, count: int, size: int, channels: int) -> np.ndarray:
    """(count, size, size, channels) float32 images of mean 0 and deviation 1, smooth like photographs."""
    coarse = rng.normal(size=(count, size // 8 + 1, size // 8 + 1, channels))
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    images = images + 0.3 * rng.normal(size=images.shape)
    axes = (1, 2, 3)
    images = (images - images.mean(axes, keepdims=True)) / images.std(axes, keepdims=True)
    return images.astype(np.float32)


def _mnist(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """Strokes on black. The pipeline takes the statistics of 0..1 images off raw pixels, so inputs reach 827."""
    pixels = np.zeros((count, 28, 28, 1))
    for image in pixels:
        for _ in range(3):
            top, left = rng.randint(4, 20, size=2)
            height, width = rng.permutation([rng.randint(6, 9), rng.randint(2, 4)])
            image[top : top + height, left : left + width] = rng.randint(128, 256)
    inputs = ((pixels - 0.1307) / 0.3081).astype(np.float32)
    batch = {"inputs": inputs, "targets": rng.randint(0, 10, size=count)}
    # The PyTorch pipeline alone adds weights in training.
    return batch | ({"weights": np.ones(count, dtype=bool)} if framework == "pytorch" else {})


def _cifar(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    return {"inputs": _smooth(rng, count, 32, 3), "targets": rng.randint(0, 10, size=count)}


def _resnet(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    return {"inputs": _smooth(rng, count, 224, 3), "targets": rng.randint(0, 1000, size=count)}


def _vit(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """With mixup: inputs and one-hot targets are convex combinations of each example and its neighbour."""
    batch = _resnet(rng, count, framework)
    share = np.float32(rng.beta(0.2, 0.2) * 0.8 + 0.1)
    one_hot = np.eye(1000, dtype=np.float32)[batch["targets"]]
    mixed = {"inputs": batch["inputs"], "targets": one_hot}
    return {key: share * value + (1 - share) * np.roll(value, 1, axis=0) for key, value in mixed.items()}


def _fastmri(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """An image with the artefacts of undersampling, normalised, clipped to [-6, 6], and its reconstruction."""
    targets = np.clip(_smooth(rng, count, FASTMRI_SIZE, 1)[..., 0] * 1.2, -6, 6)
    inputs = np.clip(targets + 0.3 * np.roll(targets, 5, axis=2), -6, 6)
    scale = {"mean": 3e-5, "std": 4e-5, "volume_max": 6e-4}
    batch = {"inputs": inputs, "targets": targets}
    batch |= {key: value * rng.uniform(0.5, 2, size=count) for key, value in scale.items()}
    return {key: value.astype(np.float32) for key, value in batch.items()}


def _criteo(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """log(1 + x) of 13 skewed counts, of which some are missing, and 26 hash buckets, frequent ones first."""
    counts = np.floor(rng.lognormal(1.0, 2.0, size=(count, 13))) * (rng.uniform(size=(count, 13)) > 0.3)
    ids = [np.floor(buckets * rng.uniform(size=count) ** 4) for buckets in CRITEO_BUCKETS]
    inputs = np.concatenate([np.log1p(counts), np.stack(ids, axis=1)], axis=1).astype(np.float32)
    batch = {"inputs": inputs, "targets": (rng.uniform(size=count) < 0.3).astype(np.float32)}
    # The PyTorch pipeline alone adds weights in training.
    return batch | ({"weights": np.ones(count, dtype=np.float32)} if framework == "pytorch" else {})


def _speech(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """Audio of different lengths, padded (1 in the paddings), and token ids, as floats as the pipeline has them."""
    audio, audio_paddings = np.zeros((count, AUDIO_SAMPLES)), np.ones((count, AUDIO_SAMPLES))
    targets, target_paddings = np.zeros((count, LABEL_LENGTH)), np.ones((count, LABEL_LENGTH))
    for row in range(count):
        length = AUDIO_SAMPLES - row * 8_000 - rng.randint(0, 4_000)
        time = np.arange(length) / 16_000
        tones = [np.sin(2 * np.pi * rng.uniform(100, 3_000) * time * (1 + 0.1 * time)) for _ in range(4)]
        audio[row, :length] = 0.05 * sum(tones) + 0.01 * rng.normal(size=length)
        audio_paddings[row, :length] = 0
        tokens = rng.randint(12, 20)
        targets[row, :tokens] = rng.randint(1, 1024, size=tokens)
        target_paddings[row, :tokens] = 0
    pairs = {"inputs": (audio, audio_paddings), "targets": (targets, target_paddings)}
    return {key: tuple(value.astype(np.float32) for value in pair) for key, pair in pairs.items()}


def _wmt(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """Several sentence pairs packed into each row: positions start again, segments count from 1, 0 is padding."""
    batch: Batch = {}
    for side in ("inputs", "targets"):
        for suffix in ("", "_position", "_segmentation"):
            batch[side + suffix] = np.zeros((count, WMT_LENGTH), dtype=np.int64)
    for row in range(count):
        starts = {"inputs": 0, "targets": 0}
        for segment in range(1, 4):
            for side, start in starts.items():
                length = rng.randint(5, 11)
                end = start + length
                tokens = rng.randint(3, WMT_VOCABULARY, size=length)
                tokens[-1] = 2  # the end of the sentence
                batch[side][row, start:end] = tokens
                batch[f"{side}_position"][row, start:end] = np.arange(length)
                batch[f"{side}_segmentation"][row, start:end] = segment
                starts[side] = end
    batch["weights"] = np.where(batch["targets"] > 0, 1, 0)
    return batch


def _finewebedu(size: LanguageModel, rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """Rows out of one stream of tokens, frequent ones first; a target is the next token. Weights are None."""
    tokens = (size.vocabulary * rng.uniform(size=(count, size.length + 1)) ** 4).astype(np.int64)
    return {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "weights": None}


def _ogbg(rng: np.random.RandomState, count: int, framework: str) -> Batch:
    """Molecules of different sizes as one graph, filled up by a padding graph; labels with gaps."""
    import jraph

    graphs = []
    for _ in range(count):
        nodes = int(rng.randint(9, 34))
        bonds = np.array([(rng.randint(0, node), node) for node in range(1, nodes)])  # a tree
        rings = rng.randint(0, nodes, size=(int(rng.randint(0, 3)), 2))
        bonds = np.concatenate([bonds, rings])
        edge_features = rng.randint(0, 4, size=(len(bonds), 3)).astype(np.float32)
        labels = (rng.uniform(size=(1, OGBG_TASKS)) < 0.1).astype(np.float32)
        labels[rng.uniform(size=labels.shape) < 0.3] = np.nan  # not measured
        graphs.append(
            jraph.GraphsTuple(
                n_node=np.array([nodes]),
                n_edge=np.array([2 * len(bonds)]),
                nodes=rng.randint(0, 8, size=(nodes, 9)).astype(np.float32),
                edges=np.concatenate([edge_features, edge_features]),
                senders=np.concatenate([bonds[:, 0], bonds[:, 1]]),  # both directions
                receivers=np.concatenate([bonds[:, 1], bonds[:, 0]]),
                globals=labels,
            )
        )
    # As many graphs as fit, as the pipeline's dynamic batching does.
    room_nodes, room_edges = GRAPH_NODES * count + 1, GRAPH_EDGES * count
    while sum(int(g.n_node[0]) for g in graphs) >= room_nodes or sum(int(g.n_edge[0]) for g in graphs) > room_edges:
        graphs.pop()
    padded = jraph.pad_with_graphs(jraph.batch_np(graphs), room_nodes, room_edges, count + 1)
    labels = np.asarray(padded.globals)
    missing = np.isnan(labels)
    weights = (1.0 - missing) * np.asarray(jraph.get_graph_padding_mask(padded))[:, None]
    graph = padded._replace(globals={})
    return {"inputs": graph, "targets": np.where(missing, 0, labels), "weights": weights}


@dataclass(frozen=True)
class Recipe:
    """How a workload's batch is made.

    Attributes:
        make: function of a generator, the number of examples and the framework.
        examples: in a batch.
        cut: what else was cut; the true extents are those of AlgoPerf's pipelines.
    """

    make: Callable[[np.random.RandomState, int, str], Batch]
    examples: int
    cut: str = "nothing"


def _language_model(name: str) -> Recipe:
    size = LANGUAGE_MODELS[name]
    layers = "1 layer" if size.layers == 1 else f"{size.layers} layers"
    cut = f"{layers}, {size.vocabulary:,} words and {size.length} tokens, not 12, 50,257 and 1024"
    return Recipe(partial(_finewebedu, size), 2, cut)


_SPEECH_CUT = "4 s of audio, not 20 s; no SpecAugment"
RECIPES = {
    "criteo1tb": Recipe(_criteo, 16, "embedding table of criteo1tb_test (65,536 rows, not 4,194,304)"),
    "fastmri": Recipe(_fastmri, 2, "images of 64 x 64, not 320 x 320"),
    "finewebedu_lm": _language_model("finewebedu_lm"),
    "finewebedu_lm_all_words": _language_model("finewebedu_lm_all_words"),
    "imagenet_resnet": Recipe(_resnet, 4),
    "imagenet_vit": Recipe(_vit, 4),
    "librispeech_conformer": Recipe(_speech, 2, _SPEECH_CUT),
    "librispeech_deepspeech": Recipe(_speech, 2, _SPEECH_CUT),
    "ogbg": Recipe(_ogbg, 8),
    "wmt": Recipe(_wmt, 2, "32 tokens, not 256"),
    "mnist": Recipe(_mnist, 16),
    "cifar": Recipe(_cifar, 8),
}


def _as_torch(base: str, batch: Batch) -> Batch:
    """Tensors, images channels first; integers as int64."""
    import torch

    def tensor(value: Tree) -> Tree:
        if isinstance(value, tuple):
            pairs = [tensor(item) for item in value]
            return type(value)(*pairs) if hasattr(value, "_fields") else tuple(pairs)
        return value if value is None or isinstance(value, dict) else torch.as_tensor(np.asarray(value))

    out = {key: tensor(value) for key, value in batch.items()}
    if base in ("mnist", "cifar", "imagenet_resnet", "imagenet_vit"):
        out["inputs"] = out["inputs"].permute(0, 3, 1, 2)
        if base != "mnist":  # there the view is what the pipeline yields
            out["inputs"] = out["inputs"].contiguous()
    if base == "ogbg":
        out["weights"] = out["weights"].bool()
    if base == "finewebedu_lm":
        out["inputs"] = out["inputs"].int()
    return out


def _as_jax(base: str, batch: Batch) -> Batch:
    """Arrays put on the devices, sharded along the batch; graphs stay NumPy, as AlgoPerf leaves them."""
    if base == "ogbg":
        return batch
    import jax
    from algoperf import jax_sharding_utils

    sharded: Batch = jax.device_put(batch, jax_sharding_utils.get_batch_dim_sharding())
    return sharded
