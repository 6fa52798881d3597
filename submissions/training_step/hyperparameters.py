"""Reads a point of the search space: fills in defaults and checks every value before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

Check = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


POSITIVE: Check = (lambda value: _is_number(value) and value > 0, "a number > 0")
NON_NEGATIVE: Check = (lambda value: _is_number(value) and value >= 0, "a number >= 0")
FRACTION: Check = (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
UNIT: Check = (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]")


def optional(check: Check) -> Check:
    """`check`, or None."""
    test, text = check
    return (lambda value: value is None or test(value), f"{text}, or null")


# AlgoPerf's own hyperparameters, which most submissions share.
COMMON_CHECKS: Mapping[str, Check] = {
    "learning_rate": POSITIVE,
    "one_minus_beta1": UNIT,
    "beta2": FRACTION,
    "weight_decay": NON_NEGATIVE,
    "warmup_factor": FRACTION,
    "label_smoothing": FRACTION,
    "dropout_rate": FRACTION,
    "grad_clip": optional(POSITIVE),
    "horizon_factor": POSITIVE,
}


def resolve(
    hyperparameters: Any, defaults: Mapping[str, Any], checks: Mapping[str, Check] = COMMON_CHECKS
) -> SimpleNamespace:
    """The point to train with.

    Args:
      hyperparameters: a namedtuple of the external ruleset; None in self-tuning; a mapping is accepted too.
      defaults: the submission's own point, with every hyperparameter it knows.
      checks: name -> (test, the allowed values in words).

    Raises:
      ValueError: an unknown hyperparameter, or a value out of range; the message names it.
    """
    given: Mapping[str, Any] = {}
    if hyperparameters is not None:
        given = hyperparameters._asdict() if hasattr(hyperparameters, "_asdict") else hyperparameters
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(f"unknown hyperparameter '{unknown[0]}'; known: {', '.join(defaults)}")
    values = {**defaults, **given}
    for name, (test, allowed) in checks.items():
        if name in values and not test(values[name]):
            raise ValueError(f"hyperparameter '{name}' must be {allowed}, got {values[name]!r}")
    return SimpleNamespace(**values)
