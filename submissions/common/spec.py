"""The vocabulary of AlgoPerf's API: the official enums where `algoperf` is installed, equal ones otherwise.

Submissions and the embedded workloads import it from here, so that one file serves the official harness (whose
workloads hand over the official enums) and a machine without it.
"""

from __future__ import annotations

import enum

try:
    from algoperf.spec import ForwardPassMode, LossType, ParameterType, ShapeTuple, TrainingCompleteError

    OFFICIAL = True
except ImportError:
    OFFICIAL = False

    class LossType(enum.Enum):  # type: ignore[no-redef]
        """The loss a workload declares."""

        SOFTMAX_CROSS_ENTROPY = 0
        SIGMOID_CROSS_ENTROPY = 1
        MEAN_SQUARED_ERROR = 2
        CTC_LOSS = 3
        MEAN_ABSOLUTE_ERROR = 4

    class ForwardPassMode(enum.Enum):  # type: ignore[no-redef]
        """Whether a forward pass trains (dropout, batch statistics) or evaluates."""

        TRAIN = 0
        EVAL = 1

    class ParameterType(enum.Enum):  # type: ignore[no-redef]
        """The role of a parameter in the model."""

        WEIGHT = 0
        BIAS = 1
        CONV_WEIGHT = 2
        BATCH_NORM_SCALE = 3
        BATCH_NORM_BIAS = 4
        LAYER_NORM_SCALE = 5
        LAYER_NORM_BIAS = 6
        EMBEDDING = 7
        ATTENTION_Q = 8
        ATTENTION_K = 9
        ATTENTION_V = 10
        ATTENTION_OUT = 11
        ATTENTION_QKV = 12
        ATTENTION_KV = 13
        ATTENTION_BIAS = 14

    class ShapeTuple:  # type: ignore[no-redef]
        """A shape as a leaf of a JAX pytree, where a bare tuple would be a subtree."""

        def __init__(self, shape_tuple: tuple[int, ...]) -> None:
            self.shape_tuple = shape_tuple

        def __repr__(self) -> str:
            return f"ShapeTuple({self.shape_tuple})"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, ShapeTuple) and self.shape_tuple == other.shape_tuple

    class TrainingCompleteError(Exception):  # type: ignore[no-redef]
        """Raised by `update_params` to end training; the runner then evaluates once more."""


__all__ = [
    "OFFICIAL",
    "ForwardPassMode",
    "LossType",
    "ParameterType",
    "ShapeTuple",
    "TrainingCompleteError",
]
