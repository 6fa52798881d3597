"""Recordings of nine speakers (JapaneseVowels, out of sktime), joined to sequences: who speaks, in what order?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workloads import seeds
from workloads.data.source import Source, cached_arrays

FILES = {
    "TRAIN": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "TEST": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
SOURCES = [
    Source(
        package="sktime",
        requirement="sktime==1.2.0",
        path=f"datasets/data/JapaneseVowels/JapaneseVowels_{name}.ts",
        sha256=sha256,
    )
    for name, sha256 in FILES.items()
]
NUM_SPEAKERS = 9  # numbered from 1: 0 is CTC's blank
NUM_FEATURES = 12
MAX_UTTERANCE = 29  # frames
FRAMES = 128  # of a sequence
MIN_LABELS, MAX_LABELS = 3, 8
NUM_SEQUENCES = {"eval_train": 32, "validation": 128, "test": 32}
NOISE = 2.0  # standard deviation, in those of the features
TIME_MASKS, MAX_TIME_MASK, MAX_FEATURE_MASK = 2, 8, 3
_EVAL_SEED = 20250


@dataclass(frozen=True)
class Utterances:
    """Recordings of one part.

    Attributes:
        features: cepstra, normalised by the training part's, 0 behind an utterance's end, float32, (N, 29, 12).
        lengths: in frames, int64, (N,).
        speakers: from 1 to 9, int64, (N,).
    """

    features: np.ndarray
    lengths: np.ndarray
    speakers: np.ndarray


Batch = dict[str, "np.ndarray | tuple[np.ndarray, np.ndarray]"]


def load() -> dict[str, Utterances]:
    """The parts 'train' (270 utterances), 'validation' (187) and 'test' (183), the same on every machine.

    The archive's own training file, and every other utterance of each speaker in its test file.

    Raises:
        UserError: sktime is not installed or its files are not the expected ones.
    """
    arrays = cached_arrays("vowels-v1", SOURCES, _parse)
    features, lengths, speakers = arrays["features"], arrays["lengths"], arrays["speakers"].astype(np.int64)
    in_test = arrays["in_test"]
    spoken = np.arange(MAX_UTTERANCE) < lengths[:, None]
    known = features[spoken & ~in_test[:, None]]
    features = (features - known.mean(axis=0)) / known.std(axis=0) * spoken[..., None]
    turn = np.zeros(len(speakers), dtype=np.int64)
    for speaker in range(1, NUM_SPEAKERS + 1):
        of_speaker = in_test & (speakers == speaker)
        turn[of_speaker] = np.arange(of_speaker.sum()) % 2
    chosen = {"train": ~in_test, "validation": in_test & (turn == 0), "test": in_test & (turn == 1)}
    return {
        name: Utterances(features[rows].astype(np.float32), lengths[rows].astype(np.int64), speakers[rows])
        for name, rows in chosen.items()
    }


def train_batch(part: Utterances, rng: np.ndarray, index: int, batch_size: int) -> Batch:
    """Batch `index` of the endless stream of joined, noisy, masked utterances: a function of (rng, index).

    As in SpecAugment (Park et al. 2019, arXiv 1904.08779) stretches of frames and a few features are set to 0.

    Returns:
        inputs: features (batch_size, 128, 12) and their paddings (batch_size, 128), 1 behind the end, float32.
        targets: speakers (batch_size, 8) int64 and their paddings (batch_size, 8), float32.

    Raises:
        ValueError: the batch is larger than the part.
    """
    if batch_size > len(part.lengths):
        raise ValueError(f"batch size {batch_size} exceeds the {len(part.lengths)} training utterances")
    generator = seeds.generator(seeds.fold_in(rng, index))
    (features, paddings), targets = _joined(part, generator, batch_size)
    lengths = (1 - paddings).sum(axis=1)
    hidden = np.zeros(features.shape, dtype=bool)
    for _ in range(TIME_MASKS):
        widths = generator.randint(0, MAX_TIME_MASK + 1, size=batch_size)
        hidden |= _span(generator, widths, lengths, FRAMES)[:, :, None]
    widths = generator.randint(0, MAX_FEATURE_MASK + 1, size=batch_size)
    hidden |= _span(generator, widths, np.full(batch_size, NUM_FEATURES), NUM_FEATURES)[:, None, :]
    features[hidden] = 0
    return {"inputs": (features, paddings), "targets": targets}


def eval_batch(part: Utterances, num_sequences: int, index: int, batch_size: int) -> Batch:
    """Batch `index` of `num_sequences` fixed, noisy sequences, starting again at the end; the last one is padded.

    Returns:
        inputs and targets as in `train_batch`, and weights (batch_size,) float32, 0 on sequences of padding alone.
    """
    inputs, targets = _joined(part, seeds.generator(seeds.root(_EVAL_SEED)), num_sequences)
    per_epoch = -(-num_sequences // batch_size)
    rows = slice((index % per_epoch) * batch_size, (index % per_epoch + 1) * batch_size)
    missing = batch_size - len(inputs[0][rows])

    def padded(array: np.ndarray, value: float = 0) -> np.ndarray:
        return np.pad(array[rows], ((0, missing), *[(0, 0)] * (array.ndim - 1)), constant_values=value)

    return {
        "inputs": (padded(inputs[0]), padded(inputs[1], 1)),
        "targets": (padded(targets[0]), padded(targets[1], 1)),
        "weights": padded(np.ones(num_sequences, dtype=np.float32)),
    }


def _joined(
    part: Utterances, generator: np.random.RandomState, count: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Three to eight utterances one after the other, as many as fit into 128 frames, with noise on them."""
    features = np.zeros((count, FRAMES, NUM_FEATURES), dtype=np.float32)
    labels = np.zeros((count, MAX_LABELS), dtype=np.int64)
    ends, numbers = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    wanted = generator.randint(MIN_LABELS, MAX_LABELS + 1, size=count)
    chosen = generator.randint(0, len(part.lengths), size=(count, MAX_LABELS))
    for row in range(count):
        for utterance in chosen[row, : wanted[row]]:
            length = part.lengths[utterance]
            if ends[row] + length > FRAMES:
                break
            features[row, ends[row] : ends[row] + length] = part.features[utterance, :length]
            labels[row, numbers[row]] = part.speakers[utterance]
            ends[row] += length
            numbers[row] += 1
    paddings = (np.arange(FRAMES) >= ends[:, None]).astype(np.float32)
    noise = NOISE * generator.standard_normal(size=features.shape)
    features = (features + noise * (1 - paddings[:, :, None])).astype(np.float32)
    return (features, paddings), (labels, (np.arange(MAX_LABELS) >= numbers[:, None]).astype(np.float32))


def _span(generator: np.random.RandomState, widths: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """Stretches of these widths somewhere below these lengths: bool, (N, size)."""
    starts = np.floor(generator.uniform(size=len(widths)) * (lengths - widths + 1)).astype(np.int64)
    places = np.arange(size)
    return (places >= starts[:, None]) & (places < (starts + widths)[:, None])


def _parse(train: bytes, test: bytes) -> dict[str, np.ndarray]:
    """Lines behind @data: per feature its values, then the speaker, set apart by colons."""
    lines = [content.decode("ascii").partition("@data")[2].split() for content in (train, test)]
    rows = [line.split(":") for line in lines[0] + lines[1]]
    series = [np.array([column.split(",") for column in columns], dtype=np.float32).T for *columns, _ in rows]
    return {
        "features": np.stack([np.pad(frames, ((0, MAX_UTTERANCE - len(frames)), (0, 0))) for frames in series]),
        "lengths": np.array([len(frames) for frames in series], dtype=np.uint8),
        "speakers": np.array([speaker for *_, speaker in rows], dtype=np.uint8),
        "in_test": np.arange(len(rows)) >= len(lines[0]),
    }
