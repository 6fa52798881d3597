"""brain_unet in JAX: its U-Net."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from submissions.common.api import Batch, Tree
from workloads.brain_unet.task import BrainUnetTask
from workloads.jax.transformer import Dropout, Rate
from workloads.jax.workload import JaxWorkload

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, Activation] = {"leaky_relu": lambda x: nn.leaky_relu(x, 0.2), "tanh": jnp.tanh}


class ConvBlock(nn.Module):
    """Twice a 3 x 3 convolution, a norm, the activation and a dropout of channels, over (N, H, W, C)."""

    channels: int
    activation: Activation
    layer_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        for index in ("1", "2"):
            x = nn.Conv(self.channels, (3, 3), use_bias=False, name=f"conv{index}")(x)
            x = _layer_norm(f"norm{index}")(x) if self.layer_norm else instance_norm(x)
            x = self.activation(x)
            kept = jnp.ones((x.shape[0], 1, 1, self.channels), x.dtype)
            x = x * Dropout()(kept, dropout_rate, train=train)
        return x


class UpBlock(nn.Module):
    """A 2 x 2 transposed convolution of stride 2, instance norm and the activation: twice the resolution.

    It has instance norm in every variant, as AlgoPerf's.
    """

    channels: int
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.ConvTranspose(self.channels, (2, 2), strides=(2, 2), use_bias=False, name="conv")(x)
        return self.activation(instance_norm(x))


class UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) as AlgoPerf's fastmri has it.

    Attributes:
        pools: how often the resolution is halved, and doubled again.
        channels: of the highest resolution; twice as many after every pooling.
        activation: between the layers.
        layer_norm: whether convolutions are followed by layer norm with a scale and a bias for each channel, in
            place of instance norm without parameters.
    """

    pools: int
    channels: int
    activation: Activation
    layer_norm: bool

    @nn.compact
    def __call__(self, images: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False) -> jax.Array:
        """Images (N, H, W) of images (N, H, W); both sides are divisible by 2**pools."""
        widths = [self.channels * 2**level for level in range(self.pools)]
        x = images[..., None]
        skipped = []
        for index, width in enumerate(widths):
            x = self._block(width, f"down_{index}")(x, dropout_rate, train=train)
            skipped.append(x)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = self._block(2 * widths[-1], "bottom")(x, dropout_rate, train=train)
        for index, width in enumerate(reversed(widths)):
            x = UpBlock(width, self.activation, name=f"up_{index}")(x)
            x = jnp.concatenate([x, skipped.pop()], axis=-1)
            x = self._block(width, f"merge_{index}")(x, dropout_rate, train=train)
        return nn.Conv(1, (1, 1), name="output")(x)[..., 0]

    def _block(self, channels: int, name: str) -> ConvBlock:
        return ConvBlock(channels, self.activation, self.layer_norm, name=name)


def instance_norm(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Each channel of each example with mean 0 and variance 1, over (N, H, W, C); no parameters."""
    centred = x - x.mean(axis=(1, 2), keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=(1, 2), keepdims=True) + epsilon)


def _layer_norm(name: str) -> nn.LayerNorm:
    """Over all of an example, as PyTorch's group norm of one group."""
    return nn.LayerNorm(epsilon=1e-6, reduction_axes=(1, 2, 3), use_fast_variance=False, name=name)


class BrainUnetWorkload(JaxWorkload, BrainUnetTask):
    """See `BrainUnetTask`; inputs, targets and outputs are (N, 64, 64)."""

    def build_model(self) -> nn.Module:
        return UNet(self.pools, self.channels, ACTIVATIONS[self.activation], self.layer_norm)

    def evaluation_of(self, logits: Tree, batch: Batch) -> dict[str, jax.Array]:
        return {"outputs": logits, **{key: value for key, value in batch.items() if key != "inputs"}}
