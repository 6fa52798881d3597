"""K-FAC-expand's submission with damped inverses, its directions, not grafted, times `length_factor`."""

from benchmarks.experiments.objects._gained import Inverse
from benchmarks.experiments.objects._kfac import with_scaling

DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    Inverse
)
