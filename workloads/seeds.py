"""Random numbers from a seed and a path of integers, the same on every machine and NumPy version.

An rng is, as in AlgoPerf's PyTorch harness, an int32 array of two entries; `rng[0]` seeds a framework's generator.
Everything drawn in a step depends on (seed, step) alone, so a resumed run needs no generator state.
"""

from __future__ import annotations

import numpy as np

_UPPER = 2**31 - 1


def root(seed: int) -> np.ndarray:
    """The rng of a run, of shape (2,), from any integer seed."""
    return _draw(np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint64), 1)[0]


def split(rng: np.ndarray, count: int) -> np.ndarray:
    """`count` independent rngs, as an array of shape (count, 2)."""
    return _draw(rng, count)


def fold_in(rng: np.ndarray, value: int) -> np.ndarray:
    """The rng of shape (2,) that belongs to `value` (a step, an epoch, a batch) under `rng`."""
    return _draw(np.append(np.asarray(rng), value), 1)[0]


def generator(rng: np.ndarray) -> np.random.RandomState:
    """A generator seeded by `rng`. RandomState, because NumPy froze its stream; `Generator` may change."""
    return np.random.RandomState(np.asarray(rng).astype(np.uint32))


def _draw(key: np.ndarray, count: int) -> np.ndarray:
    return generator(key).randint(0, _UPPER, size=(count, 2)).astype(np.int32)
