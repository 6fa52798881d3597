"""K-FAC-expand with B taken as the identity."""

import dataclasses

from benchmarks.experiments.objects._kfac import seeing, with_scaling

DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    seeing(lambda state: dataclasses.replace(state, b_basis=[], b_values=[]))
)
