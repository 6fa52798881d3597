"""Batch norm whose running statistics stay as they are in a training pass: `update_batch_norm=False`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it batch norm normalises by the batch's statistics and keeps none of them."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [layer.track_running_stats for layer in layers]
    buffers = [(layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, tracks, (mean, variance) in zip(layers, kept, buffers, strict=True):
            layer.track_running_stats = tracks
            layer.running_mean, layer.running_var = mean, variance
