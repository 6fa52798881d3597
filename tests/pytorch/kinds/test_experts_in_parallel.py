"""Stacked experts of which each process sees others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.pytorch import KFAC
from tests.pytorch import processes

EXPERTS, STEPS = 3, 4
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Mixture(nn.Module):
    """Tokens go to the expert they name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(EXPERTS, 4, 5) / 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 4)
        for e in route.unique():
            (tokens,) = (e == route).nonzero(as_tuple=True)
            out = out.index_add(0, tokens, F.linear(x[tokens], self.experts[e]).tanh())
        return self.head(out)


def train(model: nn.Module, bare: Mixture, mine: slice) -> dict[str, Any]:
    optimizer = KFAC(model, learning_rate=1e-2, factor_interval=1, refresh_interval=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)
        # The first half sees experts 0 and 1, the second 0 and 2.
        route = torch.tensor([0, 1, 0, 1, 0, 2, 2, 2])
        optimizer.zero_grad()
        with optimizer.capture(loss_normalizer=float(len(x[mine]))):
            F.cross_entropy(model(x[mine], route[mine]), y[mine]).backward()
        optimizer.step()
    factors = {name: tuple(pair) for name, pair in optimizer.factors().items()}
    return {"parameters": bare.state_dict(), "factors": factors, "fraction": optimizer.coverage().fraction}


def build() -> Mixture:
    torch.manual_seed(0)
    return Mixture().double()


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    model = build()
    mine = slice(0, 4) if rank == 0 else slice(4, None)
    with processes.joined(rank, world, folder):
        processes.save(train(DistributedDataParallel(model), model, mine), rank, folder)


def test_every_process_has_every_expert(tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = processes.ranks_of(worker, tmp_path_factory)(2)
    alone = build()
    want = train(alone, alone, slice(None))
    assert first["fraction"] == second["fraction"] == want["fraction"] == 1
    for got in (first, second):
        assert set(got["factors"]) == {"head", *(f"experts.{e}" for e in range(EXPERTS))}
        torch.testing.assert_close(got["parameters"], want["parameters"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    # Inputs are the same whichever process saw them.
    torch.testing.assert_close(first["factors"]["experts.2"][0], want["factors"]["experts.2"][0], rtol=1e-9, atol=0)
