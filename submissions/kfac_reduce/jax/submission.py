"""K-FAC-reduce (arXiv 2311.00636) in JAX."""

from __future__ import annotations

from submissions.kfac.jax import KFACSubmission
from submissions.training_step.batch_sizes import get_batch_size
from submissions.training_step.pass_through import data_selection, prepare_for_eval

_submission = KFACSubmission("reduce")
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]
