"""mnist_vit in PyTorch."""

from __future__ import annotations

import numpy as np
from torch import nn

from workloads.data import mnist
from workloads.mnist_vit import workload as base
from workloads.mnist_vit.pytorch.model import ViT
from workloads.pytorch.workload import PyTorchWorkload


class MnistVitWorkload(PyTorchWorkload, base.BaseMnistVitWorkload):
    """See `BaseMnistVitWorkload`; inputs are (N, 1, 28, 28)."""

    def build_model(self) -> nn.Module:
        return ViT(
            image_size=mnist.SIZE,
            patch_size=base.PATCH,
            num_classes=mnist.NUM_CLASSES,
            width=base.WIDTH,
            depth=base.DEPTH,
            heads=base.HEADS,
            hidden=base.MLP_WIDTH,
        )

    def prepare_inputs(self, inputs: np.ndarray) -> np.ndarray:
        return inputs.transpose(0, 3, 1, 2)
