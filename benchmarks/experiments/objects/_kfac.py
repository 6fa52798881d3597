"""K-FAC-expand as the submission has it, with another scaling, or with the polar shown other factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling, polar
from submissions.common.batch_sizes import get_batch_size
from submissions.common.functions import Functions
from submissions.common.kfac.pytorch import submission
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.kfac_expand import DESCRIPTION


def with_scaling(scaling: type[Scaling]) -> Functions:
    """The functions of the submission, to be unpacked."""
    description = dataclasses.replace(DESCRIPTION, defaults={**DESCRIPTION.defaults, "scaling": scaling})
    made = submission(description)
    return Functions(
        description, made.init_optimizer_state, made.update_params, prepare_for_eval, data_selection, get_batch_size
    )


def seeing(view: Callable[[LayerState], LayerState]) -> type[polar.Scaling]:
    """The polar scaling with some of a layer's bases and eigenvalues replaced.

    Args:
        view: makes the state that the scaling sees; an empty list for bases and values makes a side the identity.
    """

    class Control(polar.Scaling):
        # Not marked as working by group: layers come one by one, with all that they keep.
        def precondition(self, state: LayerState, momentum: Tensor, grad: Tensor, beta2: float) -> Tensor:
            return super().precondition(view(state), momentum, grad, beta2)

    return Control
