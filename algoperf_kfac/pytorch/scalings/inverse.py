"""The paper's own form, damped inverses:

D = (B + l_B I)^-1 M (A + l_A I)^-1
"""

from __future__ import annotations

from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import _base


class Scaling(_base.Scaling):
    """The inverses that a refresh gives are the operators."""

    uses_bases = False

    def operators(self, state: LayerState) -> _base.Operators:
        return state.a_basis, state.b_basis
