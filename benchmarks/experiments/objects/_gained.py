"""Directions as long as their scaling gives them, times `length_factor`, which length="none" leaves unread."""

from __future__ import annotations

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Operators, inverse, power


class Inverse(inverse.Scaling):
    """The paper's damped inverses."""

    def operators(self, state: LayerState) -> Operators:
        return times(self.config, super().operators(state))


class Power(power.Scaling):
    """The power 3/4."""

    def operators(self, state: LayerState) -> Operators:
        return times(self.config, super().operators(state))


def times(config: KFACConfig, operators: Operators) -> Operators:
    """The operators, whose product has the gain."""
    a, b = operators
    return [config.length_factor * m for m in a], b
