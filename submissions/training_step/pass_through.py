"""The functions of AlgoPerf's API that a submission without averaging or data selection leaves as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def prepare_for_eval(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: Any,
    eval_results: list[tuple[int, dict[str, float]]],
    global_step: int,
    rng: Any,
) -> tuple[Any, Any, Any]:
    """Nothing to prepare: the parameters trained are the ones evaluated."""
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Any,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: Any,
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """The next batch."""
    return next(input_queue)
