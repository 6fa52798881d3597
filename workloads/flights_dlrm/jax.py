"""flights_dlrm in JAX: its click model."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from workloads.flights_dlrm import data
from workloads.flights_dlrm.task import FlightsDlrmTask
from workloads.jax.transformer import Dropout, Rate, norm
from workloads.jax.workload import JaxWorkload


class DLRM(nn.Module):
    """A deep learning recommendation model (arXiv 1906.00091), as AlgoPerf has it.

    Dense features -> bottom MLP; categories -> rows of one table; products of each two of these vectors, and the
    bottom MLP's output once more -> top MLP -> one logit.

    Attributes:
        num_dense: how many columns of the inputs are dense features; the others are categories.
        vocabulary, embedding_width, embedding_scale: rows and columns of the table; initially uniform in
            [0, embedding_scale).
        bottom, top: widths of the hidden layers; the last of `bottom` is `embedding_width` without `resnet`.
        layer_norm: whether layer norm follows every activation and the table.
        resnet: whether hidden layers after an MLP's first are added to their inputs; the vectors themselves then
            take the place of their products. All of `bottom`, and all of `top`, are of one width.
    """

    num_dense: int
    vocabulary: int
    embedding_width: int
    embedding_scale: float
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    layer_norm: bool
    resnet: bool

    @nn.compact
    def __call__(self, inputs: jax.Array, dropout_rate: Rate = 0.0, *, train: bool = False) -> jax.Array:
        """Logits (N,) of inputs (N, num_dense + number of categories)."""
        dense = self._mlp(inputs[:, : self.num_dense], self.bottom, "bottom", nn.initializers.xavier_uniform())
        rows = inputs[:, self.num_dense :].astype(jnp.int32) % self.vocabulary
        init = nn.initializers.uniform(self.embedding_scale)
        table = nn.Embed(self.vocabulary, self.embedding_width, embedding_init=init, name="table")
        embedded = self._norm(table(rows), "table")  # (N, number of categories, embedding_width)
        x = embedded.reshape(len(inputs), -1) if self.resnet else _products(dense, embedded)
        x = jnp.concatenate([dense, x], axis=1)
        x = self._mlp(x, self.top, "top", nn.initializers.xavier_normal())
        x = Dropout()(x, dropout_rate, train=train)
        return _dense(1, nn.initializers.xavier_normal(), "output")(x).squeeze(1)

    def _mlp(
        self, x: jax.Array, widths: tuple[int, ...], name: str, kernel_init: nn.initializers.Initializer
    ) -> jax.Array:
        for index, width in enumerate(widths):
            hidden = nn.relu(_dense(width, kernel_init, f"{name}_{index}")(x))
            hidden = self._norm(hidden, f"{name}_{index}")
            x = x + hidden if self.resnet and index > 0 else hidden
        return x

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return norm(f"norm_{name}")(x) if self.layer_norm else x


def _products(dense: jax.Array, embedded: jax.Array) -> jax.Array:
    """Of each two of an example's vectors, and of each with itself: (N, number of pairs)."""
    vectors = jnp.concatenate([dense[:, None], embedded], axis=1)
    rows, columns = np.triu_indices(vectors.shape[1])
    return jnp.einsum("niw,njw->nij", vectors, vectors)[:, rows, columns]


def _dense(features: int, kernel_init: nn.initializers.Initializer, name: str) -> nn.Dense:
    """A linear layer, initialised as AlgoPerf's: its biases are normal."""
    bias_init = nn.initializers.normal(math.sqrt(1 / features))
    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, name=name)


class FlightsDlrmWorkload(JaxWorkload, FlightsDlrmTask):
    """See `FlightsDlrmTask`; inputs are (N, 21), targets, weights and logits (N,)."""

    def build_model(self) -> nn.Module:
        return DLRM(
            num_dense=len(data.DENSE),
            vocabulary=data.VOCABULARY,
            embedding_width=self.embedding_width,
            embedding_scale=self.embedding_scale,
            bottom=self.bottom,
            top=self.top,
            layer_norm=self.layer_norm,
            resnet=self.resnet,
        )
