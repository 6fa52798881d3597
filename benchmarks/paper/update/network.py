"""A wide residual network (Zagoruyko and Komodakis 2016, arXiv 1605.07146), small enough for a processor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SIDE, CLASSES = 16, 10
BLOCKS, WIDEN = 1, 2  # per stage: depth 6 BLOCKS + 4 = 10
STAGES = ((16, 1), (32, 2), (64, 2))  # channels before widening, and stride


class Block(nn.Module):
    """Normalisation, ReLU and convolution, twice, beside the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.beside = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(x))
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(x)))) + self.beside(x)
        return out


def wide_resnet() -> nn.Module:
    """Of (N, 3, `SIDE`, `SIDE`) to (N, `CLASSES`)."""
    width = 16
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
    for channels, stride in STAGES:
        for number in range(BLOCKS):
            blocks.append(Block(width, channels * WIDEN, stride if number == 0 else 1))
            width = channels * WIDEN
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*blocks, *head)
