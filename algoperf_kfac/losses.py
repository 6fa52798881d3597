"""The losses whose Fisher the library knows, by AlgoPerf's names."""

from __future__ import annotations

import enum


class LossType(enum.Enum):
    """A loss as AlgoPerf's workloads declare it; the numbers are AlgoPerf's."""

    SOFTMAX_CROSS_ENTROPY = 0
    SIGMOID_CROSS_ENTROPY = 1
    MEAN_SQUARED_ERROR = 2
    CTC_LOSS = 3
    MEAN_ABSOLUTE_ERROR = 4


def loss_type_of(loss_type: enum.Enum | str) -> LossType:
    """Accept a name in any case, this enum, or another (AlgoPerf's own) with the same names.

    Raises:
        ValueError: for an unknown name.
    """
    name = loss_type if isinstance(loss_type, str) else loss_type.name
    try:
        return LossType[name.upper()]
    except KeyError:
        known = [member.name.lower() for member in LossType]
        raise ValueError(f"loss_type {name!r}: known are {known}") from None
