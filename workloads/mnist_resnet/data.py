"""MNIST images of `workloads.data.mnist` under noise: new noise in training, always the same in evaluation."""

from __future__ import annotations

import numpy as np

from workloads import seeds
from workloads.data import mnist

NOISE = 2.5  # standard deviation of what is added, where that of the pixels is 1
_EVAL_SEED = 20242
# Splits that are evaluated -> the part they are the first images of (of each class equally many).
_PARTS = {"eval_train": "train", "validation": "validation", "test": "test"}


def load(num_examples: dict[str, int]) -> dict[str, mnist.Part]:
    """'train' without noise, and 'eval_train', 'validation' and 'test' with theirs.

    Args:
        num_examples: split -> how many images to evaluate on.

    Raises:
        UserError: see `workloads.data.mnist.load`.
    """
    parts = mnist.load()
    found = {"train": parts["train"]}
    for number, (split, name) in enumerate(_PARTS.items()):
        part, count = parts[name], num_examples[split]
        images = _noisy(part.images[:count], seeds.fold_in(seeds.root(_EVAL_SEED), number))
        found[split] = mnist.Part(images, part.labels[:count], part.rows[:count])
    return found


def train_batch(part: mnist.Part, rng: np.ndarray, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of `workloads.data.mnist.train_batch`, shifted images, with noise of its own."""
    batch = mnist.train_batch(part, rng, index, batch_size)
    # What the shifts are drawn from ends in 1.
    noise_rng = seeds.fold_in(seeds.fold_in(rng, index), 2)
    return {**batch, "inputs": _noisy(batch["inputs"], noise_rng)}


def _noisy(images: np.ndarray, rng: np.ndarray) -> np.ndarray:
    noise = seeds.generator(rng).standard_normal(images.shape)
    return images + (NOISE * noise).astype(np.float32)
