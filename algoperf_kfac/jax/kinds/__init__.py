"""What differs between kinds of layers: how a weight is covered, what a layer collects, and what it makes of it.

A new kind is a file beside this one, with a class derived from `Kind`, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from algoperf_kfac.jax import operations
from algoperf_kfac.jax.kinds._base import Kind, Sums, Uses
from algoperf_kfac.jax.kinds.experts import Experts
from algoperf_kfac.jax.kinds.shared_weight import SharedWeight
from algoperf_kfac.jax.kinds.tied_table import TiedTable
from algoperf_kfac.jax.operations import Rule
from algoperf_kfac.layers import LayerSpec

__all__ = ["KINDS", "Kind", "Sums", "Uses", "kind_for", "kind_of", "rules"]

# The first that claims a weight has it.
KINDS: tuple[Kind[Any], ...] = (
    TiedTable(),
    Experts(),
    SharedWeight(),
)


def rules() -> Mapping[str, Rule]:
    """By primitive, how it is read as a weighted operation: the usual rules, and those that kinds bring."""
    found = dict(operations.RULES)
    for kind in KINDS:
        found |= kind.rules
    return found


def kind_for(uses: Uses) -> Kind[Any]:
    """The kind of a weight with these uses, at least one call among them."""
    return next(kind for kind in KINDS if kind.claims(uses))


def kind_of(spec: LayerSpec) -> Kind[Any]:
    """The kind of a covered layer."""
    return next(kind for kind in KINDS if spec.kind in kind.names)
