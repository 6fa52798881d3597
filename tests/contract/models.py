"""One architecture, spelled once for PyTorch and once for JAX: the same layers under the same names.

Inputs come as numpy arrays, images with the channels last. Layers are called alike in both spellings; their weights
are `first.weight` in PyTorch and `first/kernel` in JAX.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in both frameworks.

    Attributes:
        module: makes the PyTorch module.
        apply: the JAX function of (params, *inputs).
        shapes: of the JAX parameters.
        inputs: of one batch.
    """

    module: Callable[[], nn.Module]
    apply: Callable[..., Any]
    shapes: Any
    inputs: tuple[np.ndarray, ...]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


class Layers(nn.Module):
    """Layers by name, and how the inputs go through them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *inputs: Any) -> Any:
        return self._forward(self, *inputs)


def dense(inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of a linear layer's parameters."""
    return {"kernel": (inputs, outputs), **({"bias": (outputs,)} if bias else {})}


def linear(layer: Any, x: Any) -> Any:
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def perceptron(sizes: Sequence[int], *inputs: np.ndarray, bias: bool = True) -> Model:
    """Linear layers l0, l1, ... with tanh between them, on inputs with any leading dimensions."""
    pairs = dict(enumerate(itertools.pairwise(sizes)))

    def forward(module: Any, x: Tensor) -> Tensor:
        for i in pairs:
            x = getattr(module, f"l{i}")(torch.tanh(x) if i else x)
        return x

    def apply(params: Any, x: Any, *_: Any) -> Any:
        for i in pairs:
            x = linear(params[f"l{i}"], jnp.tanh(x) if i else x)
        return x

    return Model(
        lambda: Layers(forward, **{f"l{i}": nn.Linear(a, b, bias) for i, (a, b) in pairs.items()}),
        apply,
        {f"l{i}": dense(a, b, bias) for i, (a, b) in pairs.items()},
        inputs or (normal(6, sizes[0]),),
    )


def convolutional() -> Model:
    """A convolution, one with two groups, a depthwise one, a transposed one of stride 2, a layer without bias."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.conv(x.permute(0, 3, 1, 2)))
        x = torch.tanh(m.depthwise(torch.tanh(m.grouped(x))))
        return m.head(torch.tanh(m.up(x)).mean((2, 3)))

    def convolved(layer: Any, x: Any, groups: int, stride: int = 1) -> Any:
        """With a stride: transposed, zeros between the inputs."""
        out = jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            (1, 1),
            "VALID" if stride == 1 else [(1, 1), (1, 1)],
            lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.tanh(out + layer["bias"])

    def apply(p: Any, x: Any, *_: Any) -> Any:
        x = convolved(p["conv"], x, 1)
        x = convolved(p["depthwise"], convolved(p["grouped"], x, 2), 4)
        return convolved(p["up"], x, 1, 2).mean((1, 2)) @ p["head"]["kernel"]

    def kernel(inputs: int, outputs: int, *size: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (*size, inputs, outputs), "bias": (outputs,)}

    return Model(
        lambda: Layers(
            forward,
            conv=nn.Conv2d(3, 4, (3, 2)),
            grouped=nn.Conv2d(4, 4, 2, groups=2),
            depthwise=nn.Conv2d(4, 8, (1, 2), groups=4),
            up=nn.ConvTranspose2d(8, 5, 2, stride=2),
            head=nn.Linear(5, 2, bias=False),
        ),
        apply,
        {
            "conv": kernel(3, 4, 3, 2),
            "grouped": kernel(2, 4, 2, 2),
            "depthwise": kernel(1, 8, 1, 2),
            "up": kernel(8, 5, 2, 2),
            "head": dense(5, 2, bias=False),
        },
        (normal(5, 6, 6, 3),),
    )


def images() -> Model:
    """A convolution and a linear layer on the mean over its outputs."""

    def apply(p: Any, x: Any, *_: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=layout)
        return linear(p["head"], jnp.tanh(x).mean((1, 2)))

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.conv(x.permute(0, 3, 1, 2))).mean((2, 3)))

    return Model(
        lambda: Layers(forward, conv=nn.Conv2d(2, 3, 2, bias=False), head=nn.Linear(3, 2)),
        apply,
        {"conv": {"kernel": (2, 2, 2, 3)}, "head": dense(3, 2)},
        (normal(5, 4, 3, 2),),
    )


def called_twice() -> Model:
    """One linear layer, on its own output."""
    return Model(
        lambda: Layers(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(3, 3)),
        lambda p, x, *_: linear(p["layer"], jnp.tanh(linear(p["layer"], x))),
        {"layer": dense(3, 3)},
        (normal(6, 3),),
    )


def tied(vocabulary: int = 9, features: int = 4) -> Model:
    """An embedding table that is the output layer, too, and a linear layer between."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.hidden(m.table(x))), m.table.weight)

    def apply(p: Any, x: Any, *_: Any) -> Any:
        return jnp.tanh(linear(p["hidden"], p["table"]["kernel"][x])) @ p["table"]["kernel"].T

    return Model(
        lambda: Layers(forward, table=nn.Embedding(vocabulary, features), hidden=nn.Linear(features, features)),
        apply,
        {"table": {"kernel": (vocabulary, features)}, "hidden": dense(features, features)},
        (np.arange(12).reshape(4, 3) % vocabulary,),
    )


def recurrent() -> Model:
    """An LSTM over sequences: nn.LSTM, and flax's cell in a scan; in float64 alone."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.lstm(x)[0])

    class Recurrent(fnn.Module):
        @fnn.compact
        def __call__(self, x: Any) -> Any:
            x = fnn.RNN(fnn.OptimizedLSTMCell(3, **dtypes), name="lstm")(x)
            return fnn.Dense(2, **dtypes, name="head")(x)

    x = normal(4, 5, 2)
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    shapes = jax.eval_shape(lambda: Recurrent().init(jax.random.key(0), x))["params"]
    return Model(
        lambda: Layers(forward, lstm=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 2)),
        lambda p, x, *_: Recurrent().apply({"params": p}, x),
        jax.tree.map(lambda leaf: tuple(leaf.shape), shapes),
        (x,),
    )


def graphs(nodes: Sequence[int], edges: Sequence[int], count: int) -> Model:
    """A batch of `count` graphs: `node` and `edge` see the rows that `nodes` and `edges` assign to graphs, `head` a
    row per graph."""
    node_ids, edge_ids = np.array(nodes), np.array(edges)

    def forward(m: Any, x: Tensor, e: Tensor) -> Tensor:
        h, g = torch.tanh(m.node(x)), torch.tanh(m.edge(e))
        pooled = h.new_zeros(count, 3).index_add(0, torch.as_tensor(node_ids), h)
        return m.head(pooled.index_add(0, torch.as_tensor(edge_ids), g))

    def apply(p: Any, x: Any, e: Any, *_: Any) -> Any:
        h, g = jnp.tanh(linear(p["node"], x)), jnp.tanh(linear(p["edge"], e))
        pooled = jax.ops.segment_sum(h, node_ids, count) + jax.ops.segment_sum(g, edge_ids, count)
        return linear(p["head"], pooled)

    return Model(
        lambda: Layers(forward, node=nn.Linear(4, 3), edge=nn.Linear(2, 3), head=nn.Linear(3, 2)),
        apply,
        {"node": dense(4, 3), "edge": dense(2, 3), "head": dense(3, 2)},
        (normal(len(nodes), 4), normal(len(edges), 2)),
    )
