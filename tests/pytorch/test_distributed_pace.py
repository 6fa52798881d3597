"""Processes whose clocks differ refresh at one pace, and so at the same steps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac import pace
from algoperf_kfac.pytorch import KFAC
from tests.pytorch import processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def train(rank: int, world: int, folder: str) -> None:
    """Seven steps; the second process takes twice as long for refreshes as the first."""
    steps = iter(range(7))
    pace.now = lambda: (step := next(steps)) + (1 + rank) * min(step + 1, 3)  # all layers at steps 0, 1 and 2
    with processes.joined(rank, world, folder):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        optimizer = KFAC(model, factor_interval=1, refresh_interval=2, initial_statistics=0, refresh_budget=0.1)
        for _ in range(7):
            optimizer.zero_grad()
            with optimizer.capture():
                model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
        processes.save(optimizer.metrics(), rank, folder)


def test_processes_agree(tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = processes.ranks_of(train, tmp_path_factory)(2)
    # In turns both layers take as long as together, by work: the smaller one leaves a process idle.
    assert first["refresh_interval"] == second["refresh_interval"] > 18
    assert first["refreshes"] == second["refreshes"]
