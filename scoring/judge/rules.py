"""The rules of one version of the benchmark under one ruleset: targets, budgets, held-out sets, what counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from commands.errors import UserError


@dataclass(frozen=True)
class Target:
    """What a workload asks for. ``budget`` is in seconds, without the ruleset's factor; unknown figures are NaN."""

    metric: str
    value: float
    higher_is_better: bool
    budget: float = np.inf
    step_hint: float = np.nan
    eval_period: float = np.nan
    test_value: float = np.nan

    @property
    def column(self) -> str:
        """The column of the evaluations that is compared with the target."""
        return f"validation/{self.metric}"

    def distance(self, value: float) -> float:
        """How far ``value`` is from the target, positive while it is not reached."""
        return self.value - value if self.higher_is_better else value - self.value

    def relaxed(self, fraction: float) -> Target:
        """The target made easier by a share of its value, as ``--target_relaxations`` of the official scorer."""
        sign = -1.0 if self.higher_is_better else 1.0
        return replace(self, value=self.value * (1.0 + sign * fraction))


@dataclass(frozen=True)
class Rules:
    """One version of the benchmark under one ruleset.

    Attributes:
      targets: by workload, base and held-out.
      base: the workloads a score counts.
      held_out: variant -> the base workload whose credit depends on it.
      studies: how many studies the median is over; a missing one is a miss. 0: as many as a submission has.
      trials: how many trials of a study count, those of the lowest numbers; 0: all.
      unscored: workloads known to occur in logs of this version without counting.
      assumed: what had to be assumed, a sentence each; said before anything else.
      relaxations: share by which the target of a workload was made easier.
    """

    version: str
    targets: Mapping[str, Target]
    base: tuple[str, ...]
    held_out: Mapping[str, str]
    studies: int = 0
    trials: int = 0
    ruleset: str = "external"
    budget_factor: float = 1.0
    unscored: tuple[str, ...] = ()
    qualification: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    relaxations: Mapping[str, float] = field(default_factory=dict)

    def budget(self, workload: str) -> float:
        """Seconds a run of ``workload`` may take under the ruleset."""
        return self.budget_factor * self.targets[workload].budget

    @property
    def scored(self) -> tuple[str, ...]:
        """Base workloads and, behind them, their held-out variants."""
        return (*self.base, *(name for name in self.held_out if self.held_out[name] in self.base))

    @property
    def title(self) -> str:
        """Version and ruleset in a few words, as every table is headed."""
        name = "own targets" if self.version == "embedded" else f"AlgoPerf {self.version}"
        factor = "" if self.budget_factor == 1 else f" (budgets x {self.budget_factor:g})"
        relaxed = ""
        if self.relaxations:
            shares = sorted(set(self.relaxations.values()))
            relaxed = f", targets relaxed by {', '.join(f'{100 * share:g}' for share in shares)} %"
        return f"{name}, {self.ruleset}{'-' if self.ruleset == 'self' else ' '}tuning{factor}{relaxed}"

    def restricted(self, workloads: Iterable[str]) -> Rules:
        """The same rules over some base workloads only, with their held-out variants.

        Raises:
          UserError: a name is no base workload of this version.
        """
        names = tuple(dict.fromkeys(workloads))
        unknown = [name for name in names if name not in self.base]
        if unknown or not names:
            what = f"unknown workload {', '.join(unknown)}" if unknown else "no workload is named"
            raise UserError(f"{what}: known are {', '.join(self.base)}")
        held_out = {name: base for name, base in self.held_out.items() if base in names}
        return replace(self, base=names, held_out=held_out)

    def with_targets(self, values: Mapping[str, float]) -> Rules:
        """The same rules with other target values for some workloads.

        Raises:
          UserError: a workload has no target.
        """
        self._known(values)
        changed = {name: replace(self.targets[name], value=value) for name, value in values.items()}
        return replace(self, targets={**self.targets, **changed})

    def relaxed(self, shares: Mapping[str, float]) -> Rules:
        """The same rules with easier targets; ``all`` stands for every workload, later names override earlier.

        A base workload's share holds for its held-out variant as well.

        Raises:
          UserError: a workload has no target.
        """
        self._known(name for name in shares if name != "all")
        chosen: dict[str, float] = {}
        for name, share in shares.items():
            variants = [variant for variant, base in self.held_out.items() if base == name]
            chosen |= dict.fromkeys(self.targets if name == "all" else [name, *variants], share)
        targets = {
            name: target.relaxed(chosen[name]) if name in chosen else target
            for name, target in self.targets.items()
        }
        return replace(self, targets=targets, relaxations={name: share for name, share in chosen.items() if share})

    def _known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.targets]
        if unknown:
            raise UserError(f"unknown workload {', '.join(unknown)}: known are {', '.join(self.targets)}")


def parse_relaxations(text: str) -> dict[str, float]:
    """``all=0.05,imagenet_resnet=0.10`` as a mapping, in the order given.

    Raises:
      UserError: a part is not NAME=SHARE with a share from 0 to below 1, or names a workload twice.
    """
    found: dict[str, float] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, share = part.rpartition("=")
        name = name.strip()
        try:
            value = float(share)
        except ValueError:
            value = np.nan
        if not name or name in found or not 0.0 <= value < 1.0:
            raise UserError(f"--target_relaxations: {part!r}: write NAME=SHARE once, a share from 0 to below 1")
        found[name] = value
    return found
