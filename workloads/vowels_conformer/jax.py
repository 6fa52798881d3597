"""vowels_conformer in JAX: a conformer, and the bidirectional LSTMs of its variant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from submissions.common.api import Batch
from workloads.jax.transformer import Attention, Dropout, Rate, dense, norm, sinusoids
from workloads.jax.workload import JaxWorkload
from workloads.vowels_conformer.task import RecognizerConfig, VowelsConformerTask

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swish": nn.silu,
    "gelu": partial(nn.gelu, approximate=True),
}


class Recognizer(nn.Module):
    """Frames -> half as many positions -> blocks -> logits of CTC, at each position."""

    config: RecognizerConfig

    @nn.compact
    def __call__(
        self, features: jax.Array, paddings: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Logits (N, R, num_classes) and their paddings (N, R) of features (N, 2R, 12) and paddings (N, 2R)."""
        config = self.config
        block = {"conformer": ConformerBlock, "lstm": LstmBlock}[config.encoder]
        x, paddings = Subsampling(config, name="subsampling")(features, paddings, dropout_rate, train=train)
        visible = paddings == 0
        for index in range(config.depth):
            x = block(config, name=f"blocks_{index}")(x, visible, dropout_rate, train=train)
        return dense(config.num_classes, "output")(norm("norm")(x)), paddings


class Subsampling(nn.Module):
    """Two convolutions over frames and features; the first halves both, the second the features alone."""

    config: RecognizerConfig

    @nn.compact
    def __call__(
        self, features: jax.Array, paddings: jax.Array, dropout_rate: Rate, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Positions (N, R, width) with position codes, and their paddings."""
        paddings = paddings[:, ::2]
        kept = (1 - paddings)[:, :, None, None]
        x = features[..., None]
        for name, strides in (("convolution1", (2, 2)), ("convolution2", (1, 2))):
            x = nn.Conv(
                self.config.channels,
                kernel_size=(3, 3),
                strides=strides,
                padding="SAME",
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )(x)
            x = nn.relu(x) * kept
        x = dense(self.config.width, "linear")(x.reshape(*x.shape[:2], -1))
        x = x + sinusoids(x.shape[1], x.shape[2])
        return Dropout()(x, dropout_rate, train=train), paddings


class ConformerBlock(nn.Module):
    """Half a feed-forward part, self-attention, convolution, the other half, each added; then layer norm.

    Gulati et al. 2020, arXiv 2005.08100.
    """

    config: RecognizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        config = self.config
        x = x + 0.5 * FeedForward(config, name="feed_forward1")(x, visible, dropout_rate, train=train)
        attention = Attention(config.heads, causal=False, name="attention")
        update = attention(norm("norm_attention")(x), dropout_rate, visible=visible, train=train)
        x = x + Dropout()(update, dropout_rate, train=train)
        x = x + Convolution(config, name="convolution")(x, visible, dropout_rate, train=train)
        x = x + 0.5 * FeedForward(config, name="feed_forward2")(x, visible, dropout_rate, train=train)
        return norm("norm")(x)


class FeedForward(nn.Module):
    """Layer norm, then two linear layers with an activation between them."""

    config: RecognizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        hidden = dense(self.config.mlp_width, "linear1")(norm("norm")(x))
        hidden = Dropout()(ACTIVATIONS[self.config.activation](hidden), dropout_rate, train=train)
        update = dense(self.config.width, "linear2")(hidden) * visible[..., None]
        return Dropout()(update, dropout_rate, train=train)


class Convolution(nn.Module):
    """Layer norm, gated linear layer, depthwise convolution over positions, norm, activation, linear layer."""

    config: RecognizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        config = self.config
        x = norm("norm")(x)
        gate = nn.sigmoid(dense(config.width, "gate")(x))
        x = dense(config.width, "linear")(x) * gate * visible[..., None]
        x = nn.Conv(
            config.width,
            kernel_size=(config.kernel_size,),
            padding="SAME",
            feature_group_count=config.width,
            use_bias=False,
            kernel_init=nn.initializers.xavier_uniform(),
            name="depthwise",
        )(x)
        x = batch_norm(x, visible, train) if config.convolution_norm == "batch" else norm("norm_convolution")(x)
        x = dense(config.width, "out")(ACTIVATIONS[config.activation](x))
        return Dropout()(x, dropout_rate, train=train)


class LstmBlock(nn.Module):
    """Batch norm, then an LSTM in both directions, added: as AlgoPerf's librispeech_deepspeech."""

    config: RecognizerConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, dropout_rate: Rate, *, train: bool) -> jax.Array:
        update = Lstm(self.config.width // 2, name="lstm")(batch_norm(x, visible, train), visible)
        return x + Dropout()(update, dropout_rate, train=train)


class Lstm(nn.Module):
    """An LSTM forwards and one backwards over the positions that are visible, side by side; 0 elsewhere."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array) -> jax.Array:
        """Positions (N, R, 2 * features) of positions (N, R, width) and which are visible (N, R)."""
        init = nn.initializers.xavier_uniform()
        lengths = visible.sum(axis=1)
        outputs: list[jax.Array] = []
        for name in ("forward", "backward"):
            cell = nn.OptimizedLSTMCell(self.features, kernel_init=init, recurrent_kernel_init=init, name=name)
            recurrence = nn.RNN(cell, reverse=name == "backward", keep_order=True)
            output: jax.Array = recurrence(x, seq_lengths=lengths)  # type: ignore[assignment]  # no carry
            outputs.append(output)
        return jnp.concatenate(outputs, axis=-1) * visible[..., None]


def batch_norm(x: jax.Array, visible: jax.Array, train: bool) -> jax.Array:
    """Batch norm over (N, R, width) by the statistics of the positions that are visible (N, R)."""
    layer = nn.BatchNorm(momentum=0.9, epsilon=1e-3, use_fast_variance=False, name="batch_norm")
    normalised: jax.Array = layer(x, use_running_average=not train, mask=visible[..., None])
    return normalised


class VowelsConformerWorkload(JaxWorkload, VowelsConformerTask):
    """See `VowelsConformerTask`; features are (N, 128, 12), logits (N, 64, 10)."""

    def build_model(self) -> nn.Module:
        return Recognizer(self.config)

    def evaluation_of(self, logits: tuple[jax.Array, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """What `metrics` counts errors in."""
        (scores, paddings), (labels, label_paddings) = logits, batch["targets"]
        return {
            "best": scores.argmax(axis=-1),
            "paddings": paddings,
            "labels": labels,
            "label_paddings": label_paddings,
            "weights": batch["weights"],
        }
