"""NadamW, the first-order reference of AlgoPerf: what it is, its hyperparameters, its own point."""

import dataclasses

from submissions.common.description import Description
from submissions.common.hyperparameters import FRACTION, NON_NEGATIVE, POSITIVE, UNIT, check


@dataclasses.dataclass(frozen=True)
class NadamWConfig:
    """Hyperparameters of NadamW, named as in AlgoPerf.

    Attributes:
        learning_rate: base learning rate; the schedule multiplies it.
        one_minus_beta1: 1 - decay of the momentum.
        beta2: decay of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.

    Raises:
        ValueError: naming the hyperparameter, its value and what is allowed.
    """

    learning_rate: float
    one_minus_beta1: float
    beta2: float
    weight_decay: float

    def __post_init__(self) -> None:
        check("learning_rate", self.learning_rate, POSITIVE)
        check("one_minus_beta1", self.one_minus_beta1, UNIT)
        check("beta2", self.beta2, FRACTION)
        check("weight_decay", self.weight_decay, NON_NEGATIVE)


EPSILON = 1e-8

DESCRIPTION = Description(
    title="NadamW",
    text="NadamW for all parameters. Linear warm-up, then cosine decay.",
    config=NadamWConfig,
    defaults={
        "learning_rate": 9.5e-3,
        "one_minus_beta1": 0.09,
        "beta2": 0.99,
        "weight_decay": 0.026,
        "warmup_factor": 0.1,
        "label_smoothing": 0.0,
        "dropout_rate": 0.0,
        "grad_clip": 0.5,
        "horizon_factor": 1.0,
    },
)
