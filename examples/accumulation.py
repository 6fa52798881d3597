"""Shows gradient accumulation: micro-batches give the gradients, the factors and the step of the whole batch.

    python -m examples.accumulation

Each micro-batch has a capture of its own. What its summed loss is divided by, the number of examples N of the whole
step, goes to `loss_normalizer`. Micro-batches may differ in size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algoperf_kfac.pytorch import KFAC

SIZES = [10, 10, 10, 2]  # of the micro-batches


def update(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor, sizes: list[int]) -> None:
    """One step on a batch that is cut into micro-batches."""
    total = len(x)
    optimizer.zero_grad()
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        with optimizer.capture(loss_normalizer=total):
            loss = F.cross_entropy(model(part_x), part_y, reduction="sum") / total
            loss.backward()
    optimizer.step()


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 10)).double()
    parts = copy.deepcopy(whole)
    settings = {"approximation": "reduce", "learning_rate": 1e-2}
    by_whole, by_parts = KFAC(whole, **settings), KFAC(parts, **settings)
    for _ in range(3):
        x, y = torch.randn(sum(SIZES), 1, 8, 8).double(), torch.randint(10, (sum(SIZES),))
        update(whole, by_whole, x, y, [sum(SIZES)])
        update(parts, by_parts, x, y, SIZES)
    expected = by_whole.factors()
    worst = 0.0
    for name, factors in by_parts.factors().items():
        a, b = (largest_difference(*pair) for pair in zip(factors, expected[name], strict=True))
        print(f"layer {name}: A differs by {a:.0e}, B by {b:.0e}")
        worst = max(worst, a, b)
    pairs = zip(parts.parameters(), whole.parameters(), strict=True)
    weights = max(largest_difference(p.detach(), q.detach()) for p, q in pairs)
    print(f"after 3 steps of {SIZES} examples, weights differ by {weights:.0e}")
    assert max(worst, weights) < 1e-8


if __name__ == "__main__":
    main()
