"""Models that are compiled, beside twins that are not, for tests of statistics in their graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_factors, assert_same_parameters

OPTIONS = {"factor_interval": 2, "refresh_interval": 4, "initial_statistics": 1}
COMPILED = "statistics steps run compiled"
BEFORE_2_6 = not hasattr(torch.compiler, "set_stance")
POSITIONS: list[Callable[[Tensor], Any]] = [lambda mask: None, lambda mask: mask, lambda mask: "gradient"]


class Tokens(nn.Module):
    """Attention over tokens with a fused projection, and a layer without bias; padded tokens are zero."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.fused = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.fused(x).chunk(3, -1)
        return self.head(x + self.out(F.scaled_dot_product_attention(query, key, value)))


class Tied(nn.Module):
    """A table that is the output layer, too, as a language model has it."""

    def __init__(self, padding: int | None = None, lookups: int = 1) -> None:
        super().__init__()
        self.lookups = lookups
        self.table = nn.Embedding(9, 6, padding_idx=padding)
        self.up, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = sum(self.table(x.roll(shift, 1)) for shift in range(self.lookups))
        return self.head(self.up(rows).tanh())


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul, T": lambda h, table: torch.matmul(h, table.T),
    "@, t()": lambda h, table: h @ table.t(),
    ".matmul, transpose": lambda h, table: h.matmul(table.transpose(0, 1)),
    "mm, mT": lambda h, table: torch.mm(h.flatten(0, -2), table.mT).unflatten(0, h.shape[:-1]),
}


class Translation(nn.Module):
    """A table that encoder and decoder look up, and the output layer multiplies by, as AlgoPerf's wmt has it."""

    def __init__(self, product: str = "matmul, T", padding: int | None = None, lookups: int = 2) -> None:
        super().__init__()
        self.product, self.lookups = PRODUCTS[product], lookups
        self.table = nn.Embedding(9, 6, padding_idx=padding)
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(self.table(x)).tanh()
        for shift in range(1, self.lookups):
            h = self.decoder(h + self.table(x.roll(shift, 1))).tanh() if shift == 1 else h + self.table(x.flip(1))
        return self.product(h, self.table.weight) / 2.0


def steps(
    model: nn.Module,
    optimizer: KFAC,
    batches: list[tuple[Tensor, Tensor]],
    positions: Callable[[Tensor], Any] = lambda mask: None,
) -> None:
    """Steps on sequences, of which the loss leaves out positions with target -1."""
    for x, y in batches:
        optimizer.zero_grad()
        mask = (y >= 0).to(next(model.parameters()).dtype)
        with optimizer.capture(positions(mask), loss_normalizer=mask.sum()):
            F.cross_entropy(model(x).flatten(0, -2), y.flatten(), ignore_index=-1).backward()
        optimizer.step()


def sequences(count: int = 8, length: int = 5) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(count, length, 6, dtype=torch.float64), torch.randint(3, (count, length))
    y[torch.arange(length) >= torch.randint(1, length + 1, (count, 1))] = -1
    return x, y


def translated(count: int = 8) -> tuple[Tensor, Tensor]:
    _, y = sequences(count)
    return torch.randint(9, y.shape), torch.where(y < 0, y, 2 * y)


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Any, KFAC, nn.Module, KFAC]:
    """A model, the same compiled, its optimizer, and both for a twin that is not."""
    model = make().double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return model, compiled, KFAC(compiled, **OPTIONS, **options), twin, KFAC(twin, **OPTIONS, **options)


def assert_same(model: nn.Module, optimizer: KFAC, twin: nn.Module, other: KFAC) -> None:
    assert optimizer.coverage().note == COMPILED
    assert_same_factors(optimizer.factors(), other.factors(), rtol=1e-9, atol=1e-12)
    assert_same_parameters(model, twin, rtol=1e-8, atol=1e-10)
