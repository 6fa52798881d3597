"""Programs that forbid implicit promotion: what the library computes keeps rules of its own.

`jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` find mistakes in the user's code. They
hold for a whole process, and would stop the library at every product of a number and a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def with_promotion(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run with JAX's usual rules of promotion."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return run
