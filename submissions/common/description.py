"""What a submission says of itself: its name, what it does, its hyperparameters; plan and export read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from algoperf_kfac.config import as_mapping
from submissions.common.api import Hyperparameters
from submissions.common.hyperparameters import TrainingConfig, names_of


class OptimizerConfig(Protocol):
    """An optimizer's own hyperparameters: a dataclass that checks them."""

    @property
    def learning_rate(self) -> float:
        """The base learning rate; the schedule multiplies it."""


Config = TypeVar("Config", bound=OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class Description(Generic[Config]):
    """A submission in words and numbers, the same in every framework: `DESCRIPTION` in its submission.py.

    Attributes:
        title: its name to people.
        text: what it does, in one paragraph, for the leaderboard.
        config: the class of its optimizer's hyperparameters; KFACConfig for K-FAC.
        defaults: its own point: what self-tuning trains with, and what a search space leaves open.
    """

    title: str
    text: str
    config: type[Config]
    defaults: Mapping[str, object]

    def configure(self, hyperparameters: Hyperparameters) -> tuple[TrainingConfig, Config]:
        """A point of the search space, with the defaults for what it leaves open.

        Args:
            hyperparameters: a namedtuple of the external ruleset; None in self-tuning; a mapping is accepted too.

        Returns:
            What the training reads of it, and what the optimizer reads.

        Raises:
            ValueError: an unknown hyperparameter, or a value out of range; the message names it.
        """
        point = {**self.defaults, **as_mapping(hyperparameters)}
        training, own = names_of(TrainingConfig), names_of(self.config)
        unknown = sorted(set(point) - training - own)
        if unknown:
            raise ValueError(f"unknown hyperparameter {unknown[0]!r}: known are {sorted(training | own)}")
        return TrainingConfig(**_chosen(point, training)), self.config(**_chosen(point, own))


def _chosen(point: Mapping[str, object], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name in names}
