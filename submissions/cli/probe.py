"""What the plan needs to know of a model, whatever the framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from algoperf_kfac.plan import Load

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import Coverage


@dataclasses.dataclass(frozen=True)
class Probe:
    """A model seen through one training step of a submission.

    Attributes:
        coverage: what the submission's K-FAC covers.
        config: the submission's configuration.
        loads: by weight parameter name, on one device.
        activation_bytes: what the model keeps for its backward pass on one device.
        capture_bytes: what a statistics step keeps in addition.
        note: how it was seen, if not with the real shapes; empty otherwise.
    """

    coverage: Coverage
    config: KFACConfig
    loads: Mapping[str, Load]
    activation_bytes: float
    capture_bytes: float = 0.0
    note: str = ""
