"""K-FAC-expand with B taken as the identity."""

from benchmarks.controls import OnlyA
from benchmarks.experiments.objects._kfac import with_scaling

DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    OnlyA
)
