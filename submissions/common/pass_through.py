"""The functions of AlgoPerf's API that a submission without averaging or data selection leaves as they are."""

from __future__ import annotations

from collections.abc import Iterator

from submissions.common.api import Batch, EvalResults, Hyperparameters, Rng, Tree, Update, Workload
from submissions.common.spec import LossType


def prepare_for_eval(
    workload: Workload,
    current_param_container: Tree,
    current_params_types: Tree,
    model_state: Tree,
    hyperparameters: Hyperparameters,
    loss_type: LossType,
    optimizer_state: Tree,
    eval_results: EvalResults,
    global_step: int,
    rng: Rng,
) -> Update:
    """Nothing to prepare: the parameters trained are the ones evaluated."""
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Workload,
    input_queue: Iterator[Batch],
    optimizer_state: Tree,
    current_param_container: Tree,
    model_state: Tree,
    hyperparameters: Hyperparameters,
    global_step: int,
    rng: Rng,
) -> Batch:
    """The next batch."""
    return next(input_queue)
