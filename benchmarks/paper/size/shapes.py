"""Shapes of GPT-2 and GPT-3 as published, and a model of such a shape as it is seen on the meta device.

GPT-2: Radford et al. 2019, table 2 (layers, width), context 1,024, vocabulary 50,257 and batch 512 in its section
2.3; its names are those of the released checkpoints, whose parameters the table counts too low. GPT-3: Brown et al.
2020 (arXiv 2005.14165), table 2.1, context 2,048; batches in tokens. Its width of 5,140 at 13B is no multiple of 40
heads of 128 and is taken for 5,120.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Sighting
from algoperf_kfac.layers import Coverage
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.probe import Subject, sight
from workloads.pytorch.transformer import Block

VOCABULARY = 50_257  # of GPT-2's tokens, which GPT-3 has, too


@dataclasses.dataclass(frozen=True)
class Shape:
    """A published language model.

    Attributes:
        name: as it is known.
        parameters: as published.
        depth: blocks.
        width: of the residual stream; the MLP is four times as wide.
        heads: of the attention.
        context: positions of a sequence.
        batch_tokens: of a step.
    """

    name: str
    parameters: float
    depth: int
    width: int
    heads: int
    context: int
    batch_tokens: float


SHAPES = (
    Shape("GPT-2 124M", 124e6, 12, 768, 12, 1024, 512 * 1024),
    Shape("GPT-2 355M", 355e6, 24, 1024, 16, 1024, 512 * 1024),
    Shape("GPT-2 774M", 774e6, 36, 1280, 20, 1024, 512 * 1024),
    Shape("GPT-2 1.5B", 1558e6, 48, 1600, 25, 1024, 512 * 1024),
    Shape("GPT-3 2.7B", 2.7e9, 32, 2560, 32, 2048, 1e6),
    Shape("GPT-3 6.7B", 6.7e9, 32, 4096, 32, 2048, 2e6),
    Shape("GPT-3 13B", 13e9, 40, 5120, 40, 2048, 2e6),
    Shape("GPT-3 175B", 175e9, 96, 12288, 96, 2048, 3.2e6),
)


class GPT(nn.Module):
    """Pre-LN blocks between a table of symbols and the same table as output layer.

    Queries, keys and values have a layer each, where the originals have one for all three: parameters and flops are
    the same, and B has three blocks of the width instead of one of three times the width.
    """

    def __init__(self, shape: Shape, depth: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(
            Block(shape.width, 4 * shape.width, shape.heads, causal=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.symbols(symbols) + self.positions.weight[: symbols.shape[1]]
        for block in self.blocks:
            x = block(x, 0.0)
        return F.linear(self.norm(x), self.symbols.weight)


def seen(shape: Shape, config: KFACConfig, *, sequences: int, depth: int) -> Sighting:
    """A model of that shape, but of so many blocks, through one step on so many sequences."""
    subject = Subject(
        lambda: GPT(shape, depth),
        lambda model, examples: model(torch.zeros(examples, shape.context, dtype=torch.long, device="meta")),
        sequences,
    )
    found = sight(subject, lambda model: KFAC(model, config=config))
    assert not found.note  # on the meta device
    return found


def whole(shape: Shape, config: KFACConfig, *, sequences: int) -> Sighting:
    """The whole model, from what is seen of one block and of two."""
    one, two = (seen(shape, config, sequences=sequences, depth=depth) for depth in (1, 2))
    return grown(one, two, shape.depth)


def grown(one: Sighting, two: Sighting, depth: int) -> Sighting:
    """A model of `depth` equal blocks, from sightings of it with one and with two.

    Layers and loads of a block are repeated, bytes are taken on along the straight line.
    """
    prefix = "blocks.0."

    def copies(name: str) -> list[str]:
        number = len(prefix)
        return [f"blocks.{i}.{name[number:]}" for i in range(depth)] if name.startswith(prefix) else [name]

    def extended(first: float, second: float) -> float:
        return first + (depth - 1) * (second - first)

    layers = [
        dataclasses.replace(
            spec,
            name=name,
            weight=weight,
            bias=None if spec.bias is None else weight.removesuffix("weight") + "bias",
        )
        for spec in one.coverage.layers
        for name, weight in zip(copies(spec.name), copies(spec.weight), strict=True)
    ]
    layers.sort(key=lambda spec: int(spec.name.split(".")[1]) if spec.name.startswith("blocks.") else depth)
    fallbacks = [dataclasses.replace(f, name=name) for f in one.coverage.fallbacks for name in copies(f.name)]
    return dataclasses.replace(
        one,
        coverage=Coverage(tuple(layers), tuple(fallbacks)),
        loads={name: load for key, load in one.loads.items() for name in copies(key)},
        activation_bytes=extended(one.activation_bytes, two.activation_bytes),
        capture_bytes=extended(one.capture_bytes, two.capture_bytes),
    )
