"""mnist_resnet in PyTorch: its residual network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from workloads.data import mnist
from workloads.mnist_resnet.task import MnistResnetTask
from workloads.pytorch.activations import ACTIVATIONS
from workloads.pytorch.initialisers import lecun_normal_
from workloads.pytorch.workload import PyTorchWorkload

EXPANSION = 4  # output channels of a bottleneck, in its filters


class ResNet(nn.Module):
    """Stem, max pooling, stages of bottlenecks, mean over positions, linear head (He et al. 2016).

    Args:
        num_classes: size of the output.
        filters: of the stem and the first stage; each further stage has twice as many and half the resolution.
        stages: number of blocks in each.
        activation: a name in `workloads.pytorch.activations`.
    """

    def __init__(self, num_classes: int, filters: int, stages: Sequence[int], activation: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, filters, 7, stride=2, padding=3, bias=False)
        self.batch_norm = nn.BatchNorm2d(filters)
        self.activation = ACTIVATIONS[activation]
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        channels = filters
        for stage, blocks in enumerate(stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(Bottleneck(channels, filters * 2**stage, stride, activation))
                channels = EXPANSION * filters * 2**stage
        self.head = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.batch_norm3.weight)  # as AlgoPerf's: a block starts as its shortcut
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, 1, H, W); without dropout, as AlgoPerf's, whatever its rate."""
        del dropout_rate
        x = self.pool(self.activation(self.batch_norm(self.stem(images))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 (strided) and 1 x 1 beside a shortcut, projected where shapes differ."""

    def __init__(self, channels: int, filters: int, stride: int, activation: str) -> None:
        super().__init__()
        out = EXPANSION * filters
        self.conv1 = nn.Conv2d(channels, filters, 1, bias=False)
        self.batch_norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, stride=stride, padding=1, bias=False)
        self.batch_norm2 = nn.BatchNorm2d(filters)
        self.conv3 = nn.Conv2d(filters, out, 1, bias=False)
        self.batch_norm3 = nn.BatchNorm2d(out)
        self.activation = ACTIVATIONS[activation]
        self.projects = stride != 1 or channels != out
        if self.projects:
            self.projection = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.batch_norm_projection = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.batch_norm1(self.conv1(x)))
        y = self.activation(self.batch_norm2(self.conv2(y)))
        y = self.batch_norm3(self.conv3(y))
        if self.projects:
            x = self.batch_norm_projection(self.projection(x))
        return self.activation(x + y)


class MnistResnetWorkload(PyTorchWorkload, MnistResnetTask):
    """See `MnistResnetTask`; inputs are (N, 1, 28, 28)."""

    def build_model(self) -> nn.Module:
        return ResNet(mnist.NUM_CLASSES, self.filters, self.stages, self.activation)

    def prepare_inputs(self, inputs: np.ndarray) -> np.ndarray:
        return inputs.transpose(0, 3, 1, 2)
