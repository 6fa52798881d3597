"""Slices of the MNI152 template (the package nilearn), and what undersampled k-space shows of them.

The template is the average of magnetic resonance images of 152 brains. Its k-space is simulated, not measured.
"""

from __future__ import annotations

import gzip
import sys

import numpy as np

from commands.errors import UserError
from workloads import seeds
from workloads.data.source import Source, cached_arrays

SOURCE = Source(
    package="nilearn",
    requirement="nilearn==0.14.1",
    path="datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    sha256="421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
)
READER = "nibabel==5.4.2"
# The first and last axial slice of each part; gaps between them, because neighbours are much alike.
SLICES = {"train": (26, 96), "validation": (101, 116), "test": (121, 138)}
SIZE = 64  # pixels of an image, either way
MAX_SHIFT = 40  # pixels by which an image lies off the middle of its slice, either way
CENTER_FRACTION = 0.08  # of the columns of k-space, always measured
ACCELERATION = 4  # columns there are to columns measured, in the mean
NOISE = 0.005  # standard deviation of the noise in either part of a k-space sample; the volume's maximum is 1
CLIP = 6.0  # normalised images are cut to -6 to 6, as fastMRI's
_EVAL_SEED = 20280

Part = np.ndarray
"""The slices of a part, (slices, height, width) float32 in [0, 1]."""


def load() -> dict[str, Part]:
    """The slices of the parts 'train' (71), 'validation' (16) and 'test' (18), of 197 x 233 pixels.

    Raises:
        UserError: nilearn is not installed or its file is not the expected one, or nibabel is needed and missing.
    """
    slices = cached_arrays("mni152-v2", SOURCE, _parse)["slices"]
    return {name: slices[first : last + 1] for name, (first, last) in SLICES.items()}


def train_batch(part: Part, rng: np.ndarray, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of the endless stream of random, mirrored or transposed crops: a function of (rng, index).

    Returns:
        inputs, targets: (batch_size, 64, 64) float32, the zero-filled reconstruction and the whole image, both
            normalised by the former.
        mean, std: (batch_size,) float32 of the former; volume_max: (batch_size,) float32 of the volume.
        weights: (batch_size,) float32, ones.
    """
    generator = seeds.generator(seeds.fold_in(rng, index))
    return _examples(_crops(part, generator, generator.randint(0, len(part), size=batch_size)), generator)


def eval_examples(part: Part, num_examples: int, seed: int) -> dict[str, np.ndarray]:
    """Fixed crops of the slices of a part in turn, with fixed masks and noise; keys as in `train_batch`."""
    generator = seeds.generator(seeds.fold_in(seeds.root(_EVAL_SEED), seed))
    return _examples(_crops(part, generator, np.arange(num_examples) % len(part)), generator)


def eval_batch(examples: dict[str, np.ndarray], index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of the examples in order, starting again at their end; the last is padded with weight 0."""
    num_examples = len(examples["weights"])
    per_epoch = -(-num_examples // batch_size)
    start = (index % per_epoch) * batch_size
    missing = max(0, start + batch_size - num_examples)
    return {
        key: np.pad(value[start : start + batch_size], ((0, missing), *((0, 0),) * (value.ndim - 1)))
        for key, value in examples.items()
    }


def sampling_masks(generator: np.random.RandomState, count: int) -> np.ndarray:
    """Which columns of k-space are measured, frequency 0 in the middle: (count, 64), 1 or 0.

    Those in the centre are, and each other with the probability that makes a fourth of all in the mean, as in
    fastMRI's random Cartesian masks (arXiv 1811.08839, section 4.4).
    """
    center = round(SIZE * CENTER_FRACTION)
    first = (SIZE - center + 1) // 2
    probability = (SIZE / ACCELERATION - center) / (SIZE - center)
    masks = (generator.random_sample((count, SIZE)) < probability).astype(np.float64)
    masks[:, first : first + center] = 1
    return masks


def zero_filled(images: np.ndarray, masks: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The magnitude of the inverse transform of masked, noisy k-space.

    Args:
        images: (N, 64, 64).
        masks: (N, 64) of the columns.
        noise: (N, 64, 64), complex, added to k-space.
    """
    k_space = np.fft.fftshift(np.fft.fft2(images, norm="ortho"), axes=(1, 2)) + noise
    masked = np.fft.ifftshift(k_space * masks[:, None, :], axes=(1, 2))
    return np.abs(np.fft.ifft2(masked, norm="ortho"))


def _crops(part: Part, generator: np.random.RandomState, chosen: np.ndarray) -> np.ndarray:
    """A crop near the middle of each chosen slice, half of them mirrored, half of them transposed: (N, 64, 64)."""
    count = len(chosen)
    tops, lefts = (
        (length - SIZE) // 2 + generator.randint(-MAX_SHIFT, MAX_SHIFT + 1, size=count) for length in part.shape[1:]
    )
    span = np.arange(SIZE)
    crops = part[chosen[:, None, None], (tops[:, None] + span)[:, :, None], (lefts[:, None] + span)[:, None, :]]
    mirrored, transposed = generator.randint(0, 2, size=(2, count, 1, 1)) == 1
    crops = np.where(mirrored, crops[:, ::-1], crops)
    return np.where(transposed, crops.transpose(0, 2, 1), crops)


def _examples(images: np.ndarray, generator: np.random.RandomState) -> dict[str, np.ndarray]:
    count = len(images)
    masks = sampling_masks(generator, count)
    noise = NOISE * (generator.standard_normal((2, *images.shape)))
    reconstructed = zero_filled(images, masks, noise[0] + 1j * noise[1])
    mean, std = reconstructed.mean(axis=(1, 2)), reconstructed.std(axis=(1, 2))

    def normalised(values: np.ndarray) -> np.ndarray:
        return np.clip((values - mean[:, None, None]) / std[:, None, None], -CLIP, CLIP).astype(np.float32)

    return {
        "inputs": normalised(reconstructed),
        "targets": normalised(images),
        "mean": mean.astype(np.float32),
        "std": std.astype(np.float32),
        "volume_max": np.ones(count, dtype=np.float32),
        "weights": np.ones(count, dtype=np.float32),
    }


def _parse(content: bytes) -> dict[str, np.ndarray]:
    volume = _read_volume(content)
    return {"slices": np.moveaxis(volume / volume.max(), 2, 0).astype(np.float32)}


def _read_volume(content: bytes) -> np.ndarray:
    """The voxels, (197, 233, 189): from left to right, from back to front, from below to above."""
    try:
        import nibabel  # needed only when the cache is made
    except ModuleNotFoundError:
        remedy = f"{sys.executable} -m pip install --no-deps '{READER}'"
        raise UserError(f"The data package 'nibabel' is not installed. Run: {remedy}") from None
    return np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj, dtype=np.float64)
