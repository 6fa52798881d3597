"""Averaging the statistics of data-parallel processes, in one collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from algoperf_kfac.pytorch.statistics import Statistics


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def common(names: list[str]) -> list[str]:
    """The names that every process has, in the order of the first, so that all run the same collectives."""
    if not is_distributed():
        return names
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names)
    shared = set.intersection(*map(set, gathered))
    return [name for name in gathered[0] if name in shared]


def all_reduce_statistics(statistics: list[Statistics]) -> None:
    """Sum statistics over all processes, in place, with one flat all-reduce per dtype.

    Sums and their counts travel together, so that processes may hold different numbers of examples.

    Args:
        statistics: the same layers in the same order on every process.
    """
    if not statistics or not is_distributed():
        return
    pieces: list[Tensor] = []
    for s in statistics:
        counts = [torch.as_tensor(c).to((s.a or s.b)[0]) for c in (s.a_count, s.examples)]
        pieces += [*s.a, *s.b, *counts]
    for dtype in sorted({p.dtype for p in pieces}, key=str):
        group = [p for p in pieces if p.dtype == dtype]
        flat = torch.cat([p.reshape(-1) for p in group])
        dist.all_reduce(flat)
        parts = iter(flat.split([p.numel() for p in group]))
        for p in group:
            p.data = next(parts).view(p.shape)
    summed = iter(pieces)
    for s in statistics:
        s.a = [next(summed) for _ in s.a]
        s.b = [next(summed) for _ in s.b]
        s.a_count, s.examples = next(summed), next(summed)
