"""What an experiment is: one change, or several, against a base, on some workloads and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

Point = Mapping[str, object]
TUNED_ON = ("mnist_vit", "bible_lm", "mnist_resnet", "flights_dlrm")
SEEDS = (3001, 3002, 3003)  # used for nothing but experiments


@dataclass(frozen=True)
class Variant:
    """What is trained: a submission with some hyperparameters replaced.

    Attributes:
        point: what replaces the submission's own hyperparameters.
        submission: the name of a folder in submissions/, or of a file in `objects/` for what no hyperparameter
            says, such as a scaling; empty for the experiment's.
        share: of the experiment's horizon, which its schedule and its training take.
        inherits: whether the experiment's start and base hold for it, too; not of another kind of submission.
    """

    point: Point = field(default_factory=dict)
    submission: str = ""
    share: float = 1.0
    inherits: bool = True


@dataclass(frozen=True)
class Experiment:
    """Variants against a base.

    Attributes:
        name: unique, for the command line.
        change: what is tried, in a sentence.
        submission: of the base, and of variants that name none.
        start: the submission's hyperparameters as they were then, where they are others by now.
        base: what replaces the submission's own hyperparameters in the base, and in the variants.
        variants: by name.
        workloads: where; tuning is for `TUNED_ON` alone.
        horizon: of all schedules, relative to the step hints; training ends with it.
        seeds: the same for base and variants: initial weights and batches are paired.
        verdict: what was concluded; empty until it has been run.
    """

    name: str
    change: str
    submission: str
    variants: Mapping[str, Variant]
    start: Point = field(default_factory=dict)
    base: Point = field(default_factory=dict)
    workloads: tuple[str, ...] = TUNED_ON
    horizon: float = 0.36
    seeds: tuple[int, ...] = SEEDS
    verdict: str = ""
    framework: str = "pytorch"

    def all_variants(self) -> dict[str, Variant]:
        """Base first, each with its whole point."""
        every = {"base": Variant(), **self.variants}
        return {
            name: replace(
                one,
                point={**self.start, **self.base, **one.point} if one.inherits else one.point,
                submission=one.submission or self.submission,
            )
            for name, one in every.items()
        }
