"""What `from_torch` and `from_optax` give, in the order in which a `submission.py` unpacks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from submissions.common.api import DataSelection, InitOptimizerState, PrepareForEval, UpdateParams
from submissions.common.description import Description


class Functions(NamedTuple):
    """What a `submission.py` has: the description, and AlgoPerf's functions."""

    DESCRIPTION: Description[Any]
    init_optimizer_state: InitOptimizerState
    update_params: UpdateParams
    prepare_for_eval: PrepareForEval
    data_selection: DataSelection
    get_batch_size: Callable[[str], int]
