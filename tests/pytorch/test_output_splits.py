"""Fused projections: one A, and a block of B for each part."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import assert_same_parameters, capture_once


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(4, 12)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def loss(x: Tensor, model: nn.Module) -> Tensor:
    return model(x).square().sum(-1).mean()


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("limit", "sizes"), [(64, [4, 4, 4]), (3, [2, 2, 2, 2, 2, 2])])
def test_blocks_of_b(approximation: str, limit: int, sizes: list[int]) -> None:
    model, x = Fused(), torch.randn(6, 5, 4)

    def factors(**options):
        m = copy.deepcopy(model)
        return capture_once(m, lambda m: loss(x, m), approximation=approximation, **options).factors()["in_proj"]

    whole, cut = factors(), factors(output_splits={"in_*": 3}, max_factor_dim=limit)
    assert [len(m) for m in cut.B] == sizes
    start = 0
    for block in cut.B:
        part = slice(start, start + len(block))
        torch.testing.assert_close(block, whole.B[part, part])
        start += len(block)
    if limit > 4:
        torch.testing.assert_close(cut.A, whole.A)


def test_as_three_layers_of_their_own() -> None:
    """Without grafting and with damping by trace off, each part moves as if it were a module."""

    class Apart(nn.Module):
        def __init__(self, fused: Fused) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.out = copy.deepcopy(fused.out)
            chunks = zip(fused.in_proj.weight.chunk(3), fused.in_proj.bias.chunk(3), strict=True)
            with torch.no_grad():
                for part, (weight, bias) in zip(self.parts, chunks, strict=True):
                    part.weight.copy_(weight)
                    part.bias.copy_(bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(*(part(x) for part in self.parts)))

    fused = Fused().double()
    apart, x = Apart(fused).double(), torch.randn(6, 5, 4, dtype=torch.float64)
    options = {"grafting": False, "damping": 1e-12, "scaling": "root", "learning_rate": 0.01}
    capture_once(fused, lambda m: loss(x, m), output_splits={"in_proj": 3}, **options)
    capture_once(apart, lambda m: loss(x, m), **options)
    joined = torch.cat([part.weight for part in apart.parts])
    torch.testing.assert_close(fused.in_proj.weight, joined, rtol=1e-6, atol=1e-8)


def test_bad_splits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output_splits: no module matches 'proj'"):
        KFAC(Fused(), output_splits={"proj": 3})
    with pytest.raises(ValueError, match=r"output_splits\['in_proj'\]=5 does not fit in_proj, a linear layer"):
        KFAC(Fused(), output_splits={"in_proj": 5})
    with pytest.raises(ValueError, match="a conv layer"):
        KFAC(nn.Sequential(nn.Conv1d(2, 4, 3)), output_splits={"0": 2})


def test_they_resume() -> None:
    model, x = Fused(), torch.randn(6, 5, 4)
    options = {"output_splits": {"in_proj": 3}, "factor_interval": 1, "refresh_interval": 1}
    optimizer = capture_once(model, lambda m: loss(x, m), **options)
    twin = copy.deepcopy(model)
    resumed = KFAC(twin, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, resumed)):
        o.zero_grad()
        with o.capture():
            loss(x, m).backward()
        o.step()
    assert_same_parameters(model, twin, rtol=0, atol=0)
