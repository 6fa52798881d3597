"""A submission from any `torch.optim` optimizer, in one call; see docs/references.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from submissions.common.api import Rng, Workload
from submissions.common.batch_sizes import get_batch_size
from submissions.common.description import Hyperparameter, describe
from submissions.common.functions import Functions
from submissions.common.packages import Package, require
from submissions.common.parameters import Parameters, parameters_of
from submissions.common.pass_through import data_selection
from submissions.common.pytorch_submission import Steps, Submission
from submissions.common.schedule import WARMUP_DECAY, Schedule

Make: TypeAlias = Callable[[Parameters, Any], Steps | Sequence[Steps]]
"""Makes the optimizer, or several for different parameters, of a model's parameters and a point by attributes."""


def from_torch(
    *,
    title: str,
    text: str,
    hyperparameters: Mapping[str, Hyperparameter],
    make: Make,
    training: Mapping[str, object] | None = None,
    schedule: Schedule = WARMUP_DECAY,
    packages: Sequence[Package] = (),
) -> Functions:
    """The functions of a submission, to be unpacked in its `submission.py`.

    Clipping, label smoothing, dropout and the schedule are those of all submissions (`TrainingConfig`). The
    schedule multiplies the learning rates that `make` gives its groups. An optimizer with `train()` and `eval()`
    is switched around evaluations.

    Args:
        title: its name to people.
        text: what it does, in one paragraph.
        hyperparameters: the optimizer's own: name -> (default, check), `learning_rate` among them.
        make: see `Make`.
        training: defaults of `TrainingConfig`'s fields where they differ from its own.
        schedule: of the learning rate.
        packages: what `make` imports beside torch.

    Raises:
        MissingPackage: a package is not installed.
        ValueError: of the hyperparameters, as `describe`.
    """
    require(packages, title)
    description = describe(title, text, hyperparameters, training, packages)

    def make_optimizer(model: nn.Module, point: Any, workload: Workload, rng: Rng) -> Steps:
        del rng
        made = make(parameters_of(model, workload), point)
        optimizer = Several(made) if isinstance(made, Sequence) else made
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    submission = Submission(description, make_optimizer, schedule=schedule)
    return Functions(
        description,
        submission.init_optimizer_state,
        submission.update_params,
        submission.prepare_for_eval,
        data_selection,
        get_batch_size,
    )


class Several:
    """Optimizers of disjoint parameters as one."""

    def __init__(self, optimizers: Sequence[Steps]) -> None:
        self._optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """A step of each."""
        for optimizer in self._optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states, by position."""
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restores what `state_dict` gave."""
        for index, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state_dict[str(index)])
