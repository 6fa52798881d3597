"""The structural similarity of two images, as fastMRI and AlgoPerf compute it."""

from __future__ import annotations

import numpy as np

WINDOW = 7  # pixels, either way
K1, K2 = 0.01, 0.03


def structural_similarity(first: np.ndarray, second: np.ndarray, data_range: np.ndarray) -> np.ndarray:
    """The mean over all windows of 7 x 7 pixels that lie within the image (Wang et al. 2004, equation 13).

    Variances and the covariance are a sample's: divided by 48, not 49.

    Args:
        first, second: (N, height, width), both sides at least 7.
        data_range: (N,), the values' largest possible difference.

    Returns:
        (N,), between -1 and 1; 1 for images that are equal.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    first_mean, second_mean = _window_means(first), _window_means(second)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    first_variance = sample * (_window_means(first**2) - first_mean**2)
    second_variance = sample * (_window_means(second**2) - second_mean**2)
    covariance = sample * (_window_means(first * second) - first_mean * second_mean)
    c1, c2 = ((k * data_range.astype(np.float64)[:, None, None]) ** 2 for k in (K1, K2))
    luminance = (2 * first_mean * second_mean + c1) / (first_mean**2 + second_mean**2 + c1)
    structure = (2 * covariance + c2) / (first_variance + second_variance + c2)
    similarity: np.ndarray = np.clip((luminance * structure).mean(axis=(1, 2)), -1, 1)
    return similarity


def _window_means(images: np.ndarray) -> np.ndarray:
    """Of all windows within the images: (N, height - 6, width - 6), from sums along one side, then the other."""
    sums = np.cumsum(np.pad(images, ((0, 0), (1, 0), (0, 0))), axis=1)
    rows = sums[:, WINDOW:] - sums[:, :-WINDOW]
    sums = np.cumsum(np.pad(rows, ((0, 0), (0, 0), (1, 0))), axis=2)
    return (sums[:, :, WINDOW:] - sums[:, :, :-WINDOW]) / WINDOW**2
