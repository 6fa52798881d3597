"""Processes whose clocks differ refresh at one pace, and so at the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac import pace
from algoperf_kfac.pytorch import KFAC
from tests.pytorch import processes

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def train(rank: int, folder: str) -> None:
    """Seven steps; the second process takes twice as long for refreshes as the first."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    steps = iter(range(7))
    pace.now = lambda: (step := next(steps)) + (1 + rank) * min(step + 1, 3)  # all layers at steps 0, 1 and 2
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    optimizer = KFAC(model, factor_interval=1, refresh_interval=2, initial_statistics=0, refresh_budget=0.1)
    for _ in range(7):
        optimizer.zero_grad()
        with optimizer.capture():
            model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    Path(folder, str(rank)).write_text(json.dumps(optimizer.metrics()))
    dist.destroy_process_group()


def test_processes_agree(tmp_path: Path) -> None:
    processes.run(train, (str(tmp_path),), 2)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    # In turns both layers take as long as together, by work: the smaller one leaves a process idle.
    assert first["refresh_interval"] == second["refresh_interval"] > 18
    assert first["refreshes"] == second["refreshes"]
