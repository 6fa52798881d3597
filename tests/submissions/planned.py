"""A small model with every kind of layer, and how the plan sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from algoperf_kfac import cost
from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import Coverage
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.scalings import scaling_of
from submissions.cli.pytorch_probe import Subject, sight_optimizer

BATCH = 4


class Net(nn.Module):
    """Every kind of layer with a plan, a raw weight, and parameters without one."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2, bias=False)
        self.raw = nn.Parameter(torch.randn(7, 5))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.up(torch.relu(self.norm(self.conv(x))))
        return self.head(torch.tanh(nn.functional.linear(x.flatten(2).transpose(1, 2), self.raw)))


class Branching(Net):
    """Its code looks at a value, which the meta device does not have."""

    def forward(self, x):
        return super().forward(x if x.sum().item() < 1e9 else -x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.lstm(x)[0]


def make_plan(coverage: Coverage, loads: Mapping[str, cost.Load], config: KFACConfig, **options) -> cost.Plan:
    """The plan of PyTorch's optimizer."""
    moments = 2 if config.length_rule == "graft" else 1
    return cost.make_plan(
        coverage, loads, config, scaling_of(config), moments_of_covered=moments, counts=1, **options
    )


def inputs(n: int = BATCH) -> torch.Tensor:
    return torch.randn(n, 4, 8, 6)


def seen_by(model: Callable[[], Net] = Net, batch_size: int = BATCH, small: int | None = None, **config):
    subject = Subject(model, lambda net, n: net(inputs(n)), batch_size, small)
    return sight_optimizer(subject, lambda net: KFAC(net, **config))
