"""A plan beside what it is compared with: the memory, speed and budget at hand."""

from __future__ import annotations

import dataclasses

from algoperf_kfac.cost import Plan
from algoperf_kfac.seconds import Paced, Seconds, Speed, paced, seconds_of, with_blocks
from workloads.algoperf import Budget


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory of a device.

    Attributes:
        total: bytes.
        share: of them that the framework may use.
    """

    total: float
    share: float

    @property
    def usable(self) -> float:
        return self.total * self.share

    def __str__(self) -> str:
        text = f"{self.usable / 1e9:.4g} GB"
        return text if self.share == 1 else f"{text} ({self.share:.0%} of {self.total / 1e9:.4g} GB)"


@dataclasses.dataclass(frozen=True)
class Named:
    """A plan, and what it is compared with.

    Attributes:
        name: of the workload or model.
        plan: its plan.
        note: how the model was seen, if not with the real shapes.
        batch_size: global.
        room: memory of a device.
        speed: of the device at hand; None if it was not measured.
        budget: what AlgoPerf allows, for its workloads.
    """

    name: str
    plan: Plan
    note: str
    batch_size: int
    room: Room
    speed: Speed | None = None
    budget: Budget | None = None

    @property
    def seconds(self) -> Seconds | None:
        return None if self.speed is None else seconds_of(self.plan, self.speed)

    def paced(self, max_factor_dim: int | None = None) -> Paced | None:
        """What a refresh budget comes to, where the seconds of a step are known; also with smaller blocks."""
        share = self.plan.config.refresh_budget
        if share is None or self.speed is None or self.budget is None:
            return None
        plan = self.plan if max_factor_dim is None else with_blocks(self.plan, max_factor_dim)
        return paced(plan, self.speed, self.budget.per_step, share)

    @property
    def seconds_then(self) -> float | None:
        """What K-FAC adds to a step at the interval that a refresh budget comes to."""
        found, each = self.paced(), self.seconds
        if found is None or each is None:
            return None
        return each.total - each.refresh + found.refresh / found.interval
