"""mnist_resnet in JAX: its residual network."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from workloads.data import mnist
from workloads.jax.activations import ACTIVATIONS
from workloads.jax.transformer import Rate
from workloads.jax.workload import JaxWorkload
from workloads.mnist_resnet.task import MnistResnetTask

EXPANSION = 4  # output channels of a bottleneck, in its filters


class ResNet(nn.Module):
    """Stem, max pooling, stages of bottlenecks, mean over positions, linear head (He et al. 2016).

    Attributes:
        num_classes: size of the output.
        filters: of the stem and the first stage; each further stage has twice as many and half the resolution.
        stages: number of blocks in each.
        activation: a name in `workloads.jax.activations`.
    """

    num_classes: int
    filters: int
    stages: Sequence[int]
    activation: str

    @nn.compact
    def __call__(self, images: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, 1); without dropout, as AlgoPerf's, whatever its rate."""
        del dropout_rate
        x = conv(self.filters, 7, 2, "stem")(images)
        x = ACTIVATIONS[self.activation](batch_norm("batch_norm", train=train)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        index = 0
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"blocks_{index}"
                x = Bottleneck(self.filters * 2**stage, stride, self.activation, name=name)(x, train=train)
                index += 1
        head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="head")
        return head(x.mean(axis=(1, 2)))


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 (strided) and 1 x 1 beside a shortcut, projected where shapes differ."""

    filters: int
    stride: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        activation, out = ACTIVATIONS[self.activation], EXPANSION * self.filters
        y = activation(batch_norm("batch_norm1", train=train)(conv(self.filters, 1, 1, "conv1")(x)))
        y = activation(batch_norm("batch_norm2", train=train)(conv(self.filters, 3, self.stride, "conv2")(y)))
        y = conv(out, 1, 1, "conv3")(y)
        # As AlgoPerf's: a block starts as its shortcut.
        y = batch_norm("batch_norm3", train=train, scale_init=nn.initializers.zeros)(y)
        if self.stride != 1 or x.shape[-1] != out:
            x = conv(out, 1, self.stride, "projection")(x)
            x = batch_norm("batch_norm_projection", train=train)(x)
        return activation(x + y)


def conv(filters: int, size: int, stride: int, name: str) -> nn.Conv:
    """A convolution without bias, padded by PyTorch's rule: half the kernel on each side."""
    pad = size // 2
    return nn.Conv(filters, (size, size), (stride, stride), ((pad, pad), (pad, pad)), use_bias=False, name=name)


def batch_norm(
    name: str, *, train: bool, scale_init: nn.initializers.Initializer = nn.initializers.ones
) -> nn.BatchNorm:
    """Batch norm that keeps 0.9 of its statistics, and computes the variance as PyTorch does."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        scale_init=scale_init,
        use_fast_variance=False,
        name=name,
    )


class MnistResnetWorkload(JaxWorkload, MnistResnetTask):
    """See `MnistResnetTask`; inputs are (N, 28, 28, 1)."""

    def build_model(self) -> nn.Module:
        return ResNet(mnist.NUM_CLASSES, self.filters, self.stages, self.activation)
