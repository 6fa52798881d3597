"""K-FAC-expand as the submission has it, with a scaling handed in."""

from __future__ import annotations

import dataclasses

from algoperf_kfac.pytorch.scalings import Scaling
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
