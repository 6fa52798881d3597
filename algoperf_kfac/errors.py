"""The library's own errors, and the texts that both frameworks give."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Mapping

OURS = ("algoperf_kfac.", "torch.", "jax.", "optax.", "flax.", "contextlib")


_DIVISOR = "what the summed loss is divided by (examples, valid tokens)"


class MissingStatisticsError(RuntimeError):
    """A declared layer did not receive its inputs or its output gradients on a statistics step."""


def listed(names: Iterable[str], most: int = 5) -> str:
    """Some names, and how many more there are."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def warn(text: str) -> None:
    """A warning that points at the caller's line, not at one of the library's or the framework's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"K-FAC: {text}", stacklevel=level + 1)


def missing_statistics(missing: Mapping[str, str], total: int, remedy: str) -> MissingStatisticsError:
    """The error for layers that missed something.

    Args:
        missing: what each of them missed, by name.
        total: number of covered layers.
        remedy: what to do about it, a clause that begins with a capital.
    """
    parts = listed(f"{name} (missed {what})" for name, what in missing.items())
    return MissingStatisticsError(f"{len(missing)} of {total} layers missed their statistics: {parts}. {remedy}")


def no_statistics() -> RuntimeError:
    """The error for factors that are asked for before there are any."""
    return RuntimeError("no layer has statistics yet: make a statistics step first")


def check_reduction(reduction: str) -> None:
    """Raises ValueError unless `reduction` is "sum" or "mean"."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: allowed is 'sum' or 'mean'")


def check_loss_normalizer(value: object) -> None:
    """What a summed loss was divided by, of Python or numpy: it multiplies every B, squared.

    Args:
        value: to check.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not finite, or not above 0.
    """
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:  # an array of one number
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"loss_normalizer={value!r} is no number: give a number > 0, {_DIVISOR}")
    if not (math.isfinite(value) and float(value) > 0):
        raise ValueError(f"loss_normalizer={value!r}: allowed is a number > 0, {_DIVISOR}")


def check_loss_normalizer_array(shape: tuple[int, ...], *, real: bool, dtype: object) -> None:
    """Of an array on a device, where a look at the number would wait for it.

    Args:
        shape: of the array.
        real: whether its dtype is one of real numbers.
        dtype: for the text.

    Raises:
        TypeError: for another dtype.
        ValueError: if it has more than one number.
    """
    if not real:
        raise TypeError(f"loss_normalizer of dtype {dtype}: give one real number, {_DIVISOR}")
    if math.prod(shape) != 1:
        raise ValueError(f"loss_normalizer of shape {shape}: give one number for the whole step, {_DIVISOR}")


def check_patterns(argument: str, patterns: Iterable[str], unmatched: Iterable[str], what: str) -> None:
    """Raises ValueError for the first pattern that matched nothing.

    Args:
        argument: the argument that holds the patterns.
        patterns: all of them.
        unmatched: those without a match.
        what: what they could have matched.
    """
    without = set(unmatched)
    for pattern in patterns:
        if pattern in without:
            raise ValueError(f"{argument}: no {what} matches {pattern!r}")
