"""K-FAC-expand (arXiv 2311.00636) in PyTorch."""

from __future__ import annotations

from submissions.kfac.pytorch import KFACSubmission
from submissions.training_step.batch_sizes import get_batch_size

_submission = KFACSubmission("expand")
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params
prepare_for_eval = _submission.prepare_for_eval
data_selection = _submission.data_selection

__all__ = ["data_selection", "get_batch_size", "init_optimizer_state", "prepare_for_eval", "update_params"]
