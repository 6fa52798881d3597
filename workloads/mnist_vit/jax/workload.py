"""mnist_vit in JAX."""

from __future__ import annotations

import flax.linen as nn

from workloads.data import mnist
from workloads.jax.workload import JaxWorkload
from workloads.mnist_vit import workload as base
from workloads.mnist_vit.jax.model import ViT


class MnistVitWorkload(JaxWorkload, base.BaseMnistVitWorkload):
    """See `BaseMnistVitWorkload`; inputs are (N, 28, 28, 1)."""

    def build_model(self) -> nn.Module:
        return ViT(
            patch_size=base.PATCH,
            num_classes=mnist.NUM_CLASSES,
            width=base.WIDTH,
            depth=base.DEPTH,
            heads=base.HEADS,
            hidden=base.MLP_WIDTH,
        )
