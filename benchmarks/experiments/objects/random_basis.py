"""K-FAC-expand with the eigenvalues in bases that have nothing to do with the factors."""

from benchmarks.controls import RandomBasis
from benchmarks.experiments.objects._kfac import with_scaling

DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    RandomBasis
)
