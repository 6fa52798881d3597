"""What data-parallel processes share: the sums of their statistics, and the work of refreshing preconditioners.

Every function here is a collective operation: all processes call it with the same layers in the same order.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from algoperf_kfac.cost import assign, cubes
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch import refresh as here
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.refresh import Refresh
from algoperf_kfac.pytorch.scalings import Scaling
from algoperf_kfac.pytorch.statistics import Statistics

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 without others."""
    return dist.get_rank() if is_distributed() else 0


def all_gather(value: T) -> list[T]:
    """A small picklable value of every process, by rank."""
    if not is_distributed():
        return [value]
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def generator_for(seed: int, step: int, capture: int, device: torch.device) -> torch.Generator:
    """The label draws of a step's n-th capture, independent between steps, captures and processes.

    A function of its arguments and the rank, so that processes continue each with its own draws from a state
    that only one of them saved.
    """
    generator = torch.Generator(device=device)
    digest = hashlib.blake2b(f"{seed} {step} {capture} {rank()}".encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "little"))


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


def refresh(layers: list[tuple[LayerSpec, LayerState]], scaling: Scaling) -> None:
    """Recompute the preconditioners of `layers`, each in one of the processes; afterwards all have them all.

    The outcomes travel first (one small all-reduce), so that every process knows the sizes of what follows: one
    broadcast per process, of what it renewed. Balanced work is not balanced size, and a staggered refresh may
    leave most processes without work: an all-gather would pad all of them to the largest.
    """
    if not is_distributed():
        here.refresh(layers, scaling)
        return
    owners = assign([cubes(spec) for spec, _ in layers], dist.get_world_size())
    mine = [i for i, owner in enumerate(owners) if owner == rank()]
    results = [Refresh() for _ in layers]
    for i, result in zip(mine, here.decompose([layers[i][1] for i in mine], scaling), strict=True):
        results[i] = result
    _share_outcomes(results, layers[0][1].weight.device)
    _share_matrices(layers, results, owners, scaling)
    for (_, state), result in zip(layers, results, strict=True):
        here.install(state, result, scaling)


def _share_outcomes(results: list[Refresh], device: torch.device) -> None:
    """Counts and drift of every layer, from its owner to all: the others hold zeros, so a sum is a copy."""
    rows = [[float(r.renewed), float(r.skipped), float(r.failures), r.drift] for r in results]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(table)
    for result, (renewed, skipped, failures, drift) in zip(results, table.tolist(), strict=True):
        result.renewed, result.skipped = bool(renewed), bool(skipped)
        result.failures, result.drift = int(failures), drift


def _share_matrices(
    layers: list[tuple[LayerSpec, LayerState]], results: list[Refresh], owners: list[int], scaling: Scaling
) -> None:
    """Bases and values of every layer, from its owner to all, as bytes whatever their dtypes.

    The owner, too, takes them from the buffer: equal numbers in another memory layout may round differently.
    """
    device = layers[0][1].weight.device
    shapes = [_shapes(spec, result, scaling) for (spec, _), result in zip(layers, results, strict=True)]
    sent = []
    for owner in sorted(set(owners)):
        theirs = [i for i, o in enumerate(owners) if o == owner]
        size = sum(
            math.prod(shape) * layers[i][1].weight.element_size()
            for i in theirs
            for of_field in shapes[i].values()
            for shape in of_field
        )
        if not size:
            continue
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        if owner == rank():
            matrices = [m for i in theirs for field in shapes[i] for m in getattr(results[i], field)]
            torch.cat([_as_bytes(m).to(device) for m in matrices], out=buffer)
        sent.append((theirs, buffer, dist.broadcast(buffer, src=owner, async_op=True)))
    for theirs, buffer, work in sent:
        work.wait()
        start = 0
        for i in theirs:
            like = layers[i][1].weight
            for field, of_field in shapes[i].items():
                matrices = []
                for shape in of_field:
                    end = start + math.prod(shape) * like.element_size()
                    # A copy: aligned for its dtype, and the buffer as a whole need not stay.
                    matrices.append(buffer[start:end].clone().view(like.dtype).view(shape).to(like.device))
                    start = end
                setattr(results[i], field, matrices)


def _shapes(spec: LayerSpec, result: Refresh, scaling: Scaling) -> dict[str, list[tuple[int, ...]]]:
    """What a refresh changed, by field of `Refresh`."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for side, sizes in (("a", spec.in_blocks), ("b", spec.out_blocks)):
        if result.renewed:
            shapes[f"{side}_basis"] = [(spec.groups, size, size) for size in sizes]
        if scaling.uses_bases and (result.renewed or result.skipped):
            shapes[f"{side}_values"] = [(spec.groups, size) for size in sizes]
    return shapes


def _as_bytes(m: Tensor) -> Tensor:
    return m.contiguous().view(torch.uint8).flatten()
