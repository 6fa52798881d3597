"""Sees a PyTorch model as a submission would train it; the library does the seeing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Sighting
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch import probe as library
from algoperf_kfac.pytorch.probe import plan_of
from commands.errors import UserError
from submissions.common.api import Workload
from submissions.common.kfac.pytorch import make_optimizer

__all__ = ["Subject", "plan_of", "sight", "sight_optimizer"]


@dataclasses.dataclass(frozen=True)
class Subject(library.Subject):
    """A model to see.

    Attributes:
        workload: what the submission is told of the model, if it belongs to a workload.
    """

    workload: Workload | None = None


def sight(subject: Subject, config: KFACConfig) -> Sighting:
    """One statistics step of a submission on the model.

    Args:
        subject: the model.
        config: the submission's.

    Raises:
        UserError: the model runs neither on the meta device nor on a real batch.
    """
    return sight_optimizer(subject, lambda model: make_optimizer(model, config, subject.workload, seed=0))


def sight_optimizer(subject: library.Subject, make: Callable[[nn.Module], KFAC]) -> Sighting:
    """The same with an optimizer of the caller's."""
    try:
        return library.sight(subject, make)
    except ValueError as error:
        raise UserError(str(error)) from error
