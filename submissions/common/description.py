"""What a submission says of itself: its name, what it does, its hyperparameters; plan and export read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NotRequired, Protocol, TypeAlias, TypedDict, TypeVar

from algoperf_kfac.config import as_mapping
from submissions.common.api import Hyperparameters
from submissions.common.hyperparameters import Check, TrainingConfig, check, names_of
from submissions.common.packages import Package


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
        packages: what it needs beside its framework.
        self_tuning: what replaces defaults in the self-tuning ruleset.
    """

    title: str
    text: str
    config: type[Config]
    defaults: Mapping[str, object]
    packages: tuple[Package, ...] = ()
    self_tuning: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def configure(self, hyperparameters: Hyperparameters) -> tuple[TrainingConfig, Config]:
        """A point of the search space, with the defaults for what it leaves open.

        Args:
            hyperparameters: a namedtuple of the external ruleset; None in self-tuning; a mapping is accepted too.

        Returns:
            What the training reads of it, and what the optimizer reads.

        Raises:
            ValueError: an unknown hyperparameter, or a value out of range; the message names it.
        """
        given = self.self_tuning if hyperparameters is None else as_mapping(hyperparameters)
        point = {**self.defaults, **given}
        training, own = names_of(TrainingConfig), names_of(self.config)
        unknown = sorted(set(point) - training - own)
        if unknown:
            raise ValueError(f"unknown hyperparameter {unknown[0]!r}: known are {sorted(training | own)}")
        return TrainingConfig(**_chosen(point, training)), self.config(**_chosen(point, own))


Hyperparameter: TypeAlias = tuple[object, Check]
"""A default, and the values allowed."""


class Said(TypedDict):
    """What a submission says of itself, where it is not a `Description` yet: the arguments of `describe`.

    Attributes:
        title: its name to people.
        text: what it does, in one paragraph, for the leaderboard.
        hyperparameters: the optimizer's own by name; `learning_rate` must be among them.
        training: defaults for fields of `TrainingConfig`, where they differ from its own.
    """

    title: str
    text: str
    hyperparameters: Mapping[str, Hyperparameter]
    training: NotRequired[Mapping[str, object]]


def describe(
    title: str,
    text: str,
    hyperparameters: Mapping[str, Hyperparameter],
    training: Mapping[str, object] | None = None,
    packages: Sequence[Package] = (),
) -> Description[Any]:
    """A description whose class of hyperparameters is made from a table; arguments as in `Said`.

    Args:
        packages: what it needs beside its framework.

    Raises:
        ValueError: there is no learning rate, a name is one of `TrainingConfig`'s, or a default is not allowed.
    """
    if "learning_rate" not in hyperparameters:
        raise ValueError(f"{title} declares no hyperparameter 'learning_rate'")
    both = sorted(names_of(TrainingConfig) & set(hyperparameters))
    if both:
        raise ValueError(
            f"{title} declares the hyperparameter {both[0]!r}, which the training reads: move it there"
        )

    def check_all(self: object) -> None:
        for name, (_, allowed) in hyperparameters.items():
            check(name, getattr(self, name), allowed)

    config = dataclasses.make_dataclass(
        "Config", list(hyperparameters), frozen=True, namespace={"__post_init__": check_all}
    )
    own = {name: default for name, (default, _) in hyperparameters.items()}
    described: Description[Any] = Description(
        title, text, config, own | dataclasses.asdict(TrainingConfig()) | dict(training or {}), tuple(packages)
    )
    described.configure(None)
    return described


def _chosen(point: Mapping[str, object], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name in names}
