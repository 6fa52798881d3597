"""Directions dealt to data-parallel processes: each computes those of its layers, and all get them all.

Who has which layer is a function of the covered layers alone, and so are the sizes of what is sent. A layer without
gradient on some process therefore leaves nobody waiting: its place in a message holds zeros, which nobody reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from algoperf_kfac.errors import warn
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.distributed import Place, Processes, send
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling
from algoperf_kfac.pytorch.stacks import Stack

# Equal gradients give equal momenta to the bit, those of different examples do not come near.
TOLERANCE = 1e-3


class Dealer:
    """Makes a step's directions, those of a part of the layers in each process.

    They are dealt as `Scaling.owners` says; not where processes turn out to have gradients of their own, of which
    each then makes directions of its own.

    Args:
        scaling: the optimizer's.
        processes: those that train together.
        wanted: whether to deal at all.
    """

    def __init__(self, scaling: Scaling, processes: Processes, *, wanted: bool = True) -> None:
        self._scaling, self._processes, self._wanted = scaling, processes, wanted
        self._layers: list[CoveredLayer] = []
        self._places: dict[str, Place] = {}
        self._agreed: bool | None = None

    def directions(
        self,
        stacks: Sequence[Stack],
        momenta: Sequence[Tensor],
        layers: Mapping[str, CoveredLayer],
        states: Mapping[str, LayerState],
        *,
        monitor: bool,
    ) -> list[Tensor]:
        """What the scaling makes of momenta, the momenta themselves of layers without a preconditioner.

        Args:
            stacks: of the layers that take part in the step.
            momenta: of each stack, (layers groups, P_out, P_in), with biases P_in + 1.
            layers: all covered ones by name, in one order on all processes.
            states: by name.
            monitor: whether to compare the momenta of all processes, which waits for the device; alike on all.
        """
        if self._wanted and self._processes.size > 1:
            places = self._places_of({name: la for name, la in layers.items() if states[name].refreshes})
            if places and (monitor or self._agreed is None):
                self._compare(stacks, momenta)
            if places and self._agreed:
                return self._dealt(stacks, momenta, places)
        return [
            stack.directions(self._scaling, momentum) if stack.refreshed else momentum
            for stack, momentum in zip(stacks, momenta, strict=True)
        ]

    def _places_of(self, layers: Mapping[str, CoveredLayer]) -> dict[str, Place]:
        """Where the directions of layers are computed and sent from; empty if nothing is dealt."""
        members = list(layers.values())
        if len(members) != len(self._layers) or not all(map(operator.is_, members, self._layers)):
            owners = self._scaling.owners([layer.spec for layer in members], self._processes.size)
            self._layers = members
            self._places = {
                name: Place(owner, layer.factor_dtype, layer.spec.num_parameters)
                for owner, (name, layer) in zip(owners, layers.items(), strict=bool(owners))
            }
        return self._places

    def _dealt(
        self, stacks: Sequence[Stack], momenta: Sequence[Tensor], places: Mapping[str, Place]
    ) -> list[Tensor]:
        mine: dict[str, Tensor] = {}
        for stack, momentum in zip(stacks, momenta, strict=True):
            if not stack.refreshed:
                continue
            numbers = range(len(stack.names))
            # Equal layers of one process stand side by side, in what is left of a stack at this step, too.
            for owner, run in groupby(numbers, key=lambda i: places[stack.names[i]].owner):
                if owner == self._processes.rank:
                    part = list(run)
                    found = stack.directions(self._scaling, momentum, part[0], part[-1] + 1)
                    names = stack.names[part[0] : part[-1] + 1]
                    mine |= zip(names, found.reshape(len(names), -1).unbind(), strict=True)
        device = self._layers[0].weight.device
        everywhere = send(mine, places, device, self._processes)
        directions = []
        for stack, momentum in zip(stacks, momenta, strict=True):
            direction = momentum
            if stack.refreshed:
                parts = [everywhere[name] for name in stack.names]
                joined = parts[0] if len(parts) == 1 else torch.cat(parts)
                direction = joined.view(momentum.shape).to(momentum.device)
            directions.append(direction)
        return directions

    def _compare(self, stacks: Sequence[Stack], momenta: Sequence[Tensor]) -> None:
        """See whether all processes have the same momenta: a direction of one is of no use to another if not."""
        names = [name for stack in stacks for name in stack.names]
        norms = [
            torch.linalg.vector_norm(m.reshape(len(stack.names), -1), dim=1, dtype=torch.float64)
            for stack, m in zip(stacks, momenta, strict=True)
        ]
        numbers = torch.cat([n.to(norms[0].device) for n in norms]).tolist() if norms else []
        everyone = self._processes.all_gather(dict(zip(names, numbers, strict=True)))
        first, differing = everyone[0], ""
        for other in everyone[1:]:
            for name in sorted(first.keys() | other.keys()):
                one, two = first.get(name), other.get(name)
                if one is None or two is None or not _alike(one, two):
                    differing = differing or name
        if differing and self._agreed is not False:
            warn(
                f"processes have different gradients of {differing}, so that each computes all directions "
                "itself, and their models drift apart. Average gradients over the processes before step(), as "
                "DistributedDataParallel does; if they are meant to differ, share_directions=False says so"
            )
        self._agreed = not differing

    def __getstate__(self) -> tuple[Scaling, Processes, bool]:
        """For deepcopy and pickle: who has what is found out anew."""
        return self._scaling, self._processes, self._wanted

    def __setstate__(self, state: tuple[Scaling, Processes, bool]) -> None:
        scaling, processes, wanted = state
        self.__init__(scaling, processes, wanted=wanted)  # type: ignore[misc]


def _alike(one: float, two: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(two)):
        return not (math.isfinite(one) or math.isfinite(two))
    return abs(one - two) <= TOLERANCE * max(one, two)
