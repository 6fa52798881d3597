"""flights_dlrm in PyTorch: its click model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from workloads.flights_dlrm import data
from workloads.flights_dlrm.task import FlightsDlrmTask
from workloads.pytorch.workload import PyTorchWorkload


class DLRM(nn.Module):
    """A deep learning recommendation model (arXiv 1906.00091), as AlgoPerf has it.

    Dense features -> bottom MLP; categories -> rows of one table; products of each two of these vectors, and the
    bottom MLP's output once more -> top MLP -> one logit.

    Args:
        num_dense, num_categorical: columns of the inputs, in this order.
        vocabulary, embedding_width, embedding_scale: rows and columns of the table; initially uniform in
            [0, embedding_scale).
        bottom, top: widths of the hidden layers; the last of `bottom` is `embedding_width` without `resnet`.
        layer_norm: whether layer norm follows every activation and the table.
        resnet: whether hidden layers after an MLP's first are added to their inputs; the vectors themselves then
            take the place of their products. All of `bottom`, and all of `top`, are of one width.
    """

    pairs: torch.Tensor

    def __init__(
        self,
        num_dense: int,
        num_categorical: int,
        vocabulary: int,
        embedding_width: int,
        embedding_scale: float,
        bottom: Sequence[int],
        top: Sequence[int],
        *,
        layer_norm: bool,
        resnet: bool,
    ) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.resnet = resnet
        self.table = nn.Embedding(vocabulary, embedding_width)
        nn.init.uniform_(self.table.weight, 0, embedding_scale)
        vectors = num_categorical + 1
        pairs = torch.triu_indices(vectors, vectors)
        # Where the pairs lie in a flattened matrix of products. Follows from the sizes, so not in the state_dict.
        self.register_buffer("pairs", pairs[0] * vectors + pairs[1], persistent=False)
        interactions = num_categorical * embedding_width if resnet else pairs.shape[1]
        self.bottom = nn.ModuleList(_linear_layers((num_dense, *bottom), uniform=True))
        self.top = nn.ModuleList(_linear_layers((bottom[-1] + interactions, *top), uniform=False))
        (self.output,) = _linear_layers((top[-1], 1), uniform=False)
        self.norm_table = _norm(embedding_width) if layer_norm else nn.Identity()
        self.norm_bottom = nn.ModuleList(_norm(width) if layer_norm else nn.Identity() for width in bottom)
        self.norm_top = nn.ModuleList(_norm(width) if layer_norm else nn.Identity() for width in top)

    def forward(self, inputs: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """Logits (N,) of inputs (N, num_dense + num_categorical)."""
        dense = self._mlp(inputs[:, : self.num_dense], self.bottom, self.norm_bottom)
        rows = inputs[:, self.num_dense :].long() % self.table.num_embeddings
        embedded = self.norm_table(self.table(rows))  # (N, num_categorical, embedding_width)
        x = embedded.flatten(1) if self.resnet else self._products(dense, embedded)
        x = self._mlp(torch.cat([dense, x], dim=1), self.top, self.norm_top)
        return self.output(F.dropout(x, dropout_rate, self.training)).squeeze(1)

    def _mlp(self, x: torch.Tensor, layers: nn.ModuleList, norms: nn.ModuleList) -> torch.Tensor:
        for index, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
            hidden = norm(F.relu(layer(x)))
            x = x + hidden if self.resnet and index > 0 else hidden
        return x

    def _products(self, dense: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Of each two of an example's vectors, and of each with itself: (N, number of pairs)."""
        vectors = torch.cat([dense[:, None], embedded], dim=1)
        return (vectors @ vectors.transpose(1, 2)).flatten(1)[:, self.pairs]


def _linear_layers(widths: Sequence[int], *, uniform: bool) -> list[nn.Linear]:
    """Linear layers from width to width, initialised as AlgoPerf's: by Glorot, and biases normal."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        initialise = nn.init.xavier_uniform_ if uniform else nn.init.xavier_normal_
        initialise(layer.weight)
        nn.init.normal_(layer.bias, std=math.sqrt(1 / fan_out))
        layers.append(layer)
    return layers


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class FlightsDlrmWorkload(PyTorchWorkload, FlightsDlrmTask):
    """See `FlightsDlrmTask`; inputs are (N, 21), targets, weights and logits (N,)."""

    def build_model(self) -> nn.Module:
        return DLRM(
            num_dense=len(data.DENSE),
            num_categorical=len(data.CATEGORICAL),
            vocabulary=data.VOCABULARY,
            embedding_width=self.embedding_width,
            embedding_scale=self.embedding_scale,
            bottom=self.bottom,
            top=self.top,
            layer_norm=self.layer_norm,
            resnet=self.resnet,
        )
