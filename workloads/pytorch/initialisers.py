"""Initial distributions that flax has and PyTorch has not."""

from __future__ import annotations

import math

import torch
from torch import nn

# Standard deviation of a standard normal variable cut off at -2 and 2.
_TRUNCATED_STDDEV = 0.87962566103423978


def lecun_normal_(weight: torch.Tensor) -> None:
    """Fills (out, in, ...) in place with a normal of variance 1 / fan-in, cut off at two standard deviations.

    Flax's default of dense layers and convolutions (LeCun et al. 1998, "Efficient BackProp", 4.6).
    """
    stddev = math.sqrt(1.0 / weight[0].numel()) / _TRUNCATED_STDDEV
    nn.init.trunc_normal_(weight, std=stddev, a=-2.0 * stddev, b=2.0 * stddev)
