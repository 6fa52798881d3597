"""K-FAC-expand with both factors taken as the identity: the polar factor of the momentum, which is Muon's."""

import dataclasses

from benchmarks.experiments.objects._kfac import seeing, with_scaling

DESCRIPTION, init_optimizer_state, update_params, prepare_for_eval, data_selection, get_batch_size = with_scaling(
    seeing(lambda state: dataclasses.replace(state, a_basis=[], a_values=[], b_basis=[], b_values=[]))
)
