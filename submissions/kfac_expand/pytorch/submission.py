"""K-FAC-expand (arXiv 2311.00636) in PyTorch."""

from submissions.common.batch_sizes import get_batch_size
from submissions.common.kfac.pytorch import submission
from submissions.common.pass_through import data_selection, prepare_for_eval
from submissions.kfac_expand import DESCRIPTION

_submission = submission(DESCRIPTION)
init_optimizer_state = _submission.init_optimizer_state
update_params = _submission.update_params

__all__ = [
    "DESCRIPTION",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]
