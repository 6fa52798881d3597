"""Along which dimensions a function of parameters repeats itself.

Learned queries are such: a parameter that stands beside every example. A product with them has examples, and is a
layer like one of data, where a product of parameters alone is a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from algoperf_kfac.jax.derived import ELEMENTWISE
from algoperf_kfac.jax.equations import kept_dims
from algoperf_kfac.jax.operations import shape_of
from algoperf_kfac.jax.sources import repeated_dims

_OF_ONE = {
    *(
        "abs",
        "cos",
        "erf",
        "exp",
        "exp2",
        "expm1",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
        "neg",
        "rsqrt",
        "sin",
    ),
    *("sqrt", "square", "tanh"),
}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}


def repeated_after(eqn: JaxprEqn, tags: Sequence[object]) -> frozenset[int]:
    """Of the output of an equation on functions of parameters; none where what it does is not known."""
    name, after = eqn.primitive.name, shape_of(eqn.outvars[0])
    if name in ELEMENTWISE | _OF_ONE:
        found = set(range(len(after)))
        for v, tag in zip(eqn.invars, tags, strict=True):
            before = shape_of(v)
            stretched = {dim for dim, size in enumerate(before) if size == 1 < after[dim]}
            found &= repeated_dims(tag) | stretched if before else found
        return frozenset(found)
    before, own = shape_of(eqn.invars[0]), repeated_dims(tags[0])
    kept = kept_dims(eqn, after)
    if name == "broadcast_in_dim":
        return frozenset(range(len(after))) - {place for dim, place in kept.items() if dim not in own}
    if name in _REDUCTIONS:
        kept = {
            dim: place for place, dim in enumerate(d for d in range(len(before)) if d not in eqn.params["axes"])
        }
    return frozenset(kept[dim] for dim in own if dim in kept)
