"""A toy: features multiplied by weights of their own, s_k = w_k x_k + b_k, are as many groups of one feature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.extend.core import JaxprEqn

from algoperf_kfac.jax.kinds.shared_weight import SharedWeight
from algoperf_kfac.jax.operations import Call, Read, WeightView, shape_of
from algoperf_kfac.jax.sources import Source, sources_of


def read_mul(eqn: JaxprEqn, tags: Sequence[object]) -> Read | None:
    """Data times a vector along their last dimension."""
    for position in (0, 1):
        weight, shape = tags[position], shape_of(eqn.outvars[0])
        if isinstance(weight, Source) and len(weight.shape) == 1 and not sources_of(tags[1 - position]):
            stored = Source(weight.name, weight.shape)
            (features,) = weight.shape
            # The vector may have been spread over the data in one way only.
            spread = weight.apply(np.arange(features))
            if not (np.broadcast_to(spread, shape) == np.broadcast_to(np.arange(features), shape)).all():
                return None
            dims = tuple(range(len(shape)))
            return Read(
                Call("scale", WeightView(stored, (0,), features, 1, 1), shape[:-1], features, dims, dims),
                1 - position,
            )
    return None


class Scale(SharedWeight):
    """A group for each feature; collects what the usual layer does."""

    names = frozenset({"scale"})
    rules = {"mul": read_mul}  # noqa: RUF012  # as in the library
