"""mnist_vit in JAX: its vision transformer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from workloads.data import mnist
from workloads.jax.transformer import Block, Dropout, Rate, norm
from workloads.jax.workload import JaxWorkload
from workloads.mnist_vit.task import MnistVitTask


class ViT(nn.Module):
    """Patches -> transformer blocks -> mean over positions -> class logits.

    Attributes:
        patch_size: side of the square patches, in pixels.
        num_classes, width, depth, heads, hidden: sizes of output, model, stack, attention and MLP.
        glu: whether MLPs are gated.
    """

    patch_size: int
    num_classes: int
    width: int
    depth: int
    heads: int
    hidden: int
    glu: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, 1)."""
        patch = (self.patch_size, self.patch_size)
        # PyTorch's default initialisation of a convolution: weights and biases uniform within 1/sqrt(fan_in).
        x = nn.Conv(
            self.width,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=_uniform(1 / self.patch_size),
            name="patches",
        )(images)
        side = x.shape[1]
        x = x.reshape(x.shape[0], side * side, self.width) + sincos_2d(side, self.width)  # (N, R, width)
        x = Dropout()(x, dropout_rate, train=train)
        for index in range(self.depth):
            block = Block(self.hidden, self.heads, causal=False, glu=self.glu, name=f"blocks_{index}")
            x = block(x, dropout_rate, train=train)
        x = norm("norm")(x).mean(axis=1)
        # As AlgoPerf's ViT: all classes start equally likely.
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x)


def sincos_2d(side: int, width: int, temperature: float = 10_000.0) -> jax.Array:
    """Sine-cosine position codes of a side x side grid, row by row: (side^2, width); width divisible by 4."""
    frequencies = temperature ** -jnp.linspace(0, 1, width // 4)
    angles = jnp.arange(side)[:, None] * frequencies  # (side, width/4)
    rows = jnp.repeat(angles, side, axis=0)
    columns = jnp.tile(angles, (side, 1))
    return jnp.concatenate([jnp.sin(columns), jnp.cos(columns), jnp.sin(rows), jnp.cos(rows)], axis=1)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """An initialiser: uniform in [-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class MnistVitWorkload(JaxWorkload, MnistVitTask):
    """See `MnistVitTask`; inputs are (N, 28, 28, 1)."""

    def build_model(self) -> nn.Module:
        return ViT(
            patch_size=self.patch,
            num_classes=mnist.NUM_CLASSES,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            hidden=self.mlp_width,
            glu=self.glu,
        )
