"""Models and training runs whose states version 0.1.0 saved; the same for who makes the files and who loads them.

Nothing here is drawn at random when the states are loaded: parameters and batches come out of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax import KFAC as KFACInJAX
from algoperf_kfac.pytorch import KFAC

FOLDER = Path(__file__).parents[1] / "data" / "kfac-0.1.0"
CLASSES = 3
MORE_STEPS = 6  # after the state was saved: two statistics steps, in which every layer is refreshed


class Convolutions(nn.Module):
    """A convolution, one with channel groups, and a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2)
        self.head = nn.Linear(4, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.grouped(torch.tanh(self.conv(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM between an embedding table and the output layer that is the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, CLASSES)
        self.lstm = nn.LSTM(CLASSES, CLASSES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.lstm(self.embedding(x))[0], self.embedding.weight)


class Late(nn.Module):
    """Layers whose place changes in use: one that is never called, and a raw weight read from step `START` on."""

    START = 10

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.unused = nn.Linear(2, 2)
        self.late = nn.Parameter(torch.randn(6, 6) / 4)
        self.head = nn.Linear(6, CLASSES)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.calls >= self.START:
            x = torch.tanh(F.linear(x, self.late))
        self.calls += 1
        return self.head(x)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES))


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 4, 4, generator=generator), torch.randint(CLASSES, (5,), generator=generator)


def sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two positions per example, so that the layers share their weights."""
    return torch.randn(6, 2, 4, generator=generator), torch.randint(CLASSES, (6, 2), generator=generator)


def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(6, (6, 3), generator=generator), torch.randint(6, (6, 3), generator=generator)


@dataclasses.dataclass(frozen=True)
class Case:
    """One saved state.

    Attributes:
        model: makes the model.
        batch: draws a batch.
        options: of the optimizer.
        stop: the step before which the state was saved.
        groups: from the model to the optimizer's parameter groups, None for one group.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    options: dict[str, Any]
    stop: int
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None

    def optimizer(self, model: nn.Module, **more: Any) -> KFAC:
        params = None if self.groups is None else self.groups(model)
        return KFAC(model, params, learning_rate=0.05, **(DEFAULTS | INTERVALS | self.options), **more)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The first layer with settings of its own, the rest with the configuration's."""
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}, {"params": rest}]


# Statistics at steps 0, 1, 3, 6, 9, 12, ...; from step 6 on refreshes are staggered, in turns at 6, 9, 12, ....
INTERVALS = {"factor_interval": 3, "refresh_interval": 6, "initial_statistics": 2}
# Those of version 0.1.0, and what it did where it had no such field.
DEFAULTS = {
    name: value
    for name, value in {
        "damping": 1e-4, "noise_floor": 0.0, "initial_refreshes": "every", "max_factor_dim": 4096,
    }.items()
    if name in {field.name for field in dataclasses.fields(KFACConfig)}
}  # fmt: skip
CASES = {
    "expand": Case(perceptron, sequences, {"weight_decay": 0.01}, stop=9),
    "reduce": Case(Convolutions, images, {"approximation": "reduce"}, stop=8),
    "second_moment": Case(
        perceptron, sequences, {"scaling": "second_moment", "approximation": "reduce", "fisher": "mc"}, stop=10
    ),
    "inverse": Case(
        perceptron,
        sequences,
        {"preconditioner": "inverse", "damping_mode": "absolute", "damping": 1e-2, "grafting": False},
        stop=7,
        groups=two_groups,
    ),
    "lstm_and_tied_table": Case(Recurrent, tokens, {"approximation": {"linear": "reduce"}}, stop=8),
    "joining_and_leaving": Case(
        Late,
        lambda generator: (
            torch.randn(8, 4, generator=generator),
            torch.randint(CLASSES, (8,), generator=generator),
        ),
        {"max_factor_dim": 4, "drift_tolerance": 0.3, "allow_partial_coverage": True},
        stop=8,
    ),
}


def train(
    model: nn.Module, optimizer: KFAC, batches: Sequence[tuple[Tensor, Tensor]], fisher: str = "empirical"
) -> None:
    """A step for each batch."""
    for x, y in batches:
        optimizer.zero_grad()
        with optimizer.capture(loss_normalizer=y.numel()) as capture:
            outputs = model(x)
            if fisher != "empirical":
                capture.backward_fisher(outputs, "softmax_cross_entropy")
            F.cross_entropy(outputs.flatten(0, -2), y.flatten()).backward()
        optimizer.step()


# In JAX: the same algorithm with the state as a pytree.


def embedded(params: Any, x: Any, y: Any) -> Any:
    """A tied table around two layers of equal shape, which share a stack."""
    h = params["table"][x]
    for name in ("first", "second"):
        h = jnp.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    return h @ params["table"].T


def convolved(params: Any, x: Any, y: Any) -> Any:
    """A convolution, one with channel groups, and a linear layer without bias."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    for name, groups in (("conv", 1), ("grouped", 2)):
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "VALID", dimension_numbers=dimensions, feature_group_count=groups
        )
        x = jnp.tanh(x + params[name]["bias"])
    return x.mean((1, 2)) @ params["head"]["kernel"]


def cross_entropy(outputs: Any, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


@dataclasses.dataclass(frozen=True)
class JAXCase:
    """One saved state.

    Attributes:
        apply: the model.
        shapes: of its parameters.
        batch: draws a batch.
        options: of the optimizer.
        stop: the step before which the state was saved.
    """

    apply: Callable[..., Any]
    shapes: dict[str, Any]
    batch: Callable[[np.random.Generator], tuple[Any, Any]]
    options: dict[str, Any]
    stop: int

    def optimizer(self, params: Any, batch: tuple[Any, Any], **more: Any) -> KFACInJAX:
        options = {"learning_rate": 0.05, **DEFAULTS, **INTERVALS, **self.options, **more}
        return KFACInJAX(self.apply, cross_entropy, params, *batch, **options)


JAX_CASES = {
    "expand": JAXCase(
        embedded,
        {"table": (6, 4), "first": {"kernel": (4, 4), "bias": (4,)}, "second": {"kernel": (4, 4), "bias": (4,)}},
        lambda rng: (rng.integers(6, size=(6, 3)), rng.integers(6, size=(6, 3))),
        {"weight_decay": 0.01},
        stop=8,
    ),
    "second_moment": JAXCase(
        convolved,
        {
            "conv": {"kernel": (2, 2, 2, 4), "bias": (4,)},
            "grouped": {"kernel": (2, 2, 2, 4), "bias": (4,)},
            "head": {"kernel": (4, CLASSES)},
        },
        lambda rng: (rng.standard_normal((5, 4, 4, 2)), rng.integers(CLASSES, size=5)),
        {"scaling": "second_moment", "approximation": "reduce"},
        stop=10,
    ),
}


def train_in_jax(
    optimizer: KFACInJAX, apply: Callable[..., Any], params: Any, state: Any, batches: Any, start: int
) -> Any:
    """A step for each batch, the first of them the step number `start`; returns parameters and state."""

    @jax.jit
    def plain(params: Any, state: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(lambda p: cross_entropy(apply(p, x, y), x, y))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def with_statistics(params: Any, state: Any, x: Any, y: Any) -> Any:
        _, gradient, statistics = optimizer.value_grad_and_statistics(params, x, y, loss_normalizer=float(y.size))
        updates, state = optimizer.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    for step, batch in enumerate(batches, start):
        run = with_statistics if optimizer.is_statistics_step(step) else plain
        params, state = run(params, state, *map(jnp.asarray, batch))
    return params, state


def read_jax(name: str) -> dict[str, Any]:
    """The file of a case in JAX: arrays and, for the optimizer's state, bytes."""
    found: dict[str, Any] = flax.serialization.msgpack_restore((FOLDER / f"jax-{name}.msgpack").read_bytes())
    return found
