"""What data-parallel processes share: the sums of their statistics, and the work of refreshing preconditioners and
of making directions (`dealing.py` says whose are whose).

Every function here is a collective operation: all processes call it with the same layers in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from algoperf_kfac.assignment import assign
from algoperf_kfac.cost import cubes
from algoperf_kfac.errors import listed
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch import refresh as here
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.refresh import Refresh
from algoperf_kfac.pytorch.scalings import Scaling
from algoperf_kfac.pytorch.statistics import Statistics

T = TypeVar("T")
SAME_NUMBER = (
    "all processes must make the same number of steps, give each the same number of batches (DistributedSampler, "
    "drop_last=True)"
)


class Processes:
    """The processes that train one model on parts of a batch; this one alone, without a group.

    Args:
        group: their group, None for this process alone.
        parallel: DistributedDataParallel around the model, if it gave the group.
    """

    def __init__(
        self, group: ProcessGroup | None = None, parallel: nn.parallel.DistributedDataParallel | None = None
    ) -> None:
        self._group, self._parallel = group, parallel
        self.reopen()

    def reopen(self) -> None:
        """Let this process join others, if it is alone: its state is a new one, or one that all of them loaded."""
        self._open, self._looked = self._group is None, False

    def look(self) -> None:
        """A pass of the model has shown whom it may join, before there are statistics."""
        self._looked = True

    def close(self) -> None:
        """Let it join no others from now on: it has statistics of its own."""
        self._open = False

    @property
    def strangers(self) -> int:
        """How many processes there are that share nothing with this one, as nobody said that they do."""
        known = self._group is not None or not (dist.is_available() and dist.is_initialized())
        return 0 if known else dist.get_world_size() - 1

    @property
    def may_join(self) -> bool:
        """Whether a pass is to show if this process shares with others: it does where DistributedDataParallel is at
        work around the model."""
        return self._open and not self._looked and self.strangers > 0

    def meet(self, seen: Iterable[nn.parallel.DistributedDataParallel], params: Mapping[str, Tensor]) -> None:
        """Join the processes of DistributedDataParallel that averages the gradients of all parameters.

        All of its processes are here, at the same step: the forward pass that showed it is theirs, too.

        Args:
            seen: those that were at work in a capture.
            params: the parameters to train, by name.

        Raises:
            RuntimeError: if it is around a part of them, or this process has statistics of its own.
        """
        if self._group is not None:
            return
        trained = {id(p): name for name, p in params.items() if p.requires_grad}
        around = [p for p in seen if any(id(q) in trained for q in p.parameters())]
        around = [p for p in around if dist.get_world_size(p.process_group) > 1]
        if not around:
            return
        averaged = {id(p) for parallel in around for p in parallel.parameters()}
        apart = [name for key, name in trained.items() if key not in averaged]
        several = any(parallel.process_group is not around[0].process_group for parallel in around)
        if apart or several:
            part = (
                "in several process groups" if several else f"around a part of the model, without {listed(apart)}"
            )
            raise RuntimeError(
                f"DistributedDataParallel is at work {part}, and processes that share no statistics would make "
                "different steps of equal gradients. Say which processes share: KFAC(model, process_group=...), "
                "with all gradients averaged over them; or make an optimizer for each part"
            )
        if not self._open:
            raise RuntimeError(
                "DistributedDataParallel is at work around the model, and this process has taken statistics of its "
                "own before: processes would make different steps of equal gradients. Make the optimizer of the "
                "wrapped model, KFAC(parallel, ...), or with process_group=..., and load the state of one process "
                "into all of them"
            )
        self._group, self._parallel = around[0].process_group, around[0]

    @classmethod
    def of(cls, model: nn.Module, group: ProcessGroup | None = None) -> Processes:
        """Those of a model: a group that is given, else that of DistributedDataParallel around it.

        That other processes exist is no reason to share with them: their models may be others. Where
        DistributedDataParallel comes around the model later, `meet` sees to it.
        """
        while group is None:
            if isinstance(model, nn.parallel.DistributedDataParallel):
                return cls(model.process_group, model)
            inner = getattr(model, "_orig_mod", None)
            if inner is None:
                break
            model = inner
        return cls(group)

    def __deepcopy__(self, memo: dict[int, object]) -> Processes:
        """The same processes; an optimizer that is alone and its copy may join others, or not, each for itself."""
        copy = Processes(self._group, self._parallel)
        copy._open, copy._looked = self._open, self._looked
        return copy

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        """A group cannot be pickled: a copy from a pickle is alone."""
        return (Processes, ())

    @property
    def size(self) -> int:
        return 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return 0 if self._group is None else dist.get_rank(self._group)

    def all_gather(self, value: T) -> list[T]:
        """A small picklable value of every process, by rank."""
        if self.size == 1:
            return [value]
        joining = getattr(self._parallel, "_join_config", None)
        if joining is not None and joining.enable:
            raise RuntimeError(f"torch's Join is not supported: {SAME_NUMBER}")
        gathered = [value] * self.size
        with _explained():
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over the processes, in place."""
        if self.size > 1:
            with _explained():
                dist.all_reduce(tensor, group=self._group)

    def broadcast(self, tensor: Tensor, rank: int) -> Callable[[], None]:
        """Begin to send a tensor of one process to all; returns what waits for it."""
        assert self._group is not None
        with _explained():
            source = dist.get_global_rank(self._group, rank)
            work = dist.broadcast(tensor, src=source, group=self._group, async_op=True)

        def wait() -> None:
            with _explained():
                work.wait()

        return wait


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Names what is usually behind a collective operation that does not come to its end."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"a process did not take part in K-FAC's exchange of statistics or directions: {SAME_NUMBER}. "
            f"{type(error).__name__}: {error}"
        ) from error


def generator_for(
    seed: int, step: int, capture: int, device: torch.device, processes: Processes
) -> torch.Generator:
    """The label draws of a step's n-th capture, independent between steps, captures and processes.

    A function of its arguments and the rank, so that processes continue each with its own draws from a state
    that only one of them saved.
    """
    generator = torch.Generator(device=device)
    digest = hashlib.blake2b(f"{seed} {step} {capture} {processes.rank}".encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "little"))


def all_reduce_statistics(statistics: list[Statistics], processes: Processes) -> None:
    """Sum statistics over all processes, in place, with one flat all-reduce per dtype.

    Sums and their counts travel together, so that processes may hold different numbers of examples.

    Args:
        statistics: the same layers in the same order on every process.
        processes: all of them.
    """
    if not statistics or processes.size == 1:
        return
    pieces: list[Tensor] = []
    for s in statistics:
        like = (s.a or s.b)[0]
        counts = [
            torch.as_tensor(c, device=like.device).to(like.dtype) for c in (s.a_count, s.examples, s.vanished)
        ]
        pieces += [*s.a, *s.b, *counts]
    for dtype in sorted({p.dtype for p in pieces}, key=str):
        group = [p for p in pieces if p.dtype == dtype]
        flat = torch.cat([p.reshape(-1) for p in group])
        processes.all_reduce(flat)
        parts = iter(flat.split([p.numel() for p in group]))
        for p in group:
            p.data = next(parts).view(p.shape)
    summed = iter(pieces)
    for s in statistics:
        s.a = [next(summed) for _ in s.a]
        s.b = [next(summed) for _ in s.b]
        s.a_count, s.examples, s.vanished = (next(summed) for _ in range(3))


def refresh(layers: list[tuple[LayerSpec, LayerState]], scaling: Scaling, processes: Processes) -> None:
    """Recompute the preconditioners of `layers`, each in one of the processes; afterwards all have them all.

    The outcomes travel first (one small all-reduce), so that every process knows the sizes of what follows: one
    broadcast per process, of what it renewed. Balanced work is not balanced size, and a staggered refresh may
    leave most processes without work: an all-gather would pad all of them to the largest.
    """
    if processes.size == 1:
        here.refresh(layers, scaling)
        return
    owners = assign([cubes(spec) for spec, _ in layers], processes.size)
    mine = [i for i, owner in enumerate(owners) if owner == processes.rank]
    results = [Refresh() for _ in layers]
    for i, result in zip(mine, here.decompose([layers[i][1] for i in mine], scaling), strict=True):
        results[i] = result
    _share_outcomes(results, layers[0][1].weight.device, processes)
    _share_matrices(layers, results, owners, scaling, processes)
    for (_, state), result in zip(layers, results, strict=True):
        here.install(state, result, scaling)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer's numbers are computed, and in what form they are sent.

    Attributes:
        owner: the process.
        dtype: of the numbers.
        size: how many they are.
    """

    owner: int
    dtype: torch.dtype
    size: int


def send(
    mine: Mapping[str, Tensor], places: Mapping[str, Place], device: torch.device, processes: Processes
) -> dict[str, Tensor]:
    """Every layer's numbers, (size,) each, from its owner to all: one broadcast per process and dtype.

    The owner, too, takes them from the buffer, so that they lie in memory alike on all.

    Args:
        mine: those of this process by layer; zeros are sent for what is missing.
        places: of the layers, the same in the same order on every process.
        device: where messages are put together.
        processes: all of them.
    """
    messages: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, place in places.items():
        messages.setdefault((place.owner, place.dtype), []).append(name)
    sent = []
    for owner, dtype in sorted(messages, key=lambda message: (message[0], str(message[1]))):
        names = messages[owner, dtype]
        sizes = [places[name].size for name in names]
        buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
        if owner == processes.rank:
            parts = [
                mine[name].to(device) if name in mine else buffer.new_zeros(size)
                for name, size in zip(names, sizes, strict=True)
            ]
            torch.cat(parts, out=buffer)
        sent.append((names, sizes, buffer, processes.broadcast(buffer, owner)))
    found: dict[str, Tensor] = {}
    for names, sizes, buffer, wait in sent:
        wait()
        found |= zip(names, buffer.split(sizes), strict=True)
    return found


def _share_outcomes(results: list[Refresh], device: torch.device, processes: Processes) -> None:
    """Counts and drift of every layer, from its owner to all: the others hold zeros, so a sum is a copy."""
    rows = [[float(r.renewed), float(r.skipped), float(r.failures), r.drift] for r in results]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    processes.all_reduce(table)
    for result, (renewed, skipped, failures, drift) in zip(results, table.tolist(), strict=True):
        result.renewed, result.skipped = bool(renewed), bool(skipped)
        result.failures, result.drift = int(failures), drift


def _share_matrices(
    layers: list[tuple[LayerSpec, LayerState]],
    results: list[Refresh],
    owners: list[int],
    scaling: Scaling,
    processes: Processes,
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
        if owner == processes.rank:
            matrices = [m for i in theirs for field in shapes[i] for m in getattr(results[i], field)]
            torch.cat([_as_bytes(m).to(device) for m in matrices], out=buffer)
        sent.append((theirs, buffer, processes.broadcast(buffer, owner)))
    for theirs, buffer, wait in sent:
        wait()
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
