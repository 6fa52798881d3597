"""Batches as trees: arrays, and dictionaries, lists, tuples and named tuples of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from submissions.common.api import Tree


def map_arrays(function: Callable[[np.ndarray], Tree], tree: Tree) -> Tree:
    """The tree with `function` of each array in the array's place; None stays."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: map_arrays(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [map_arrays(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)
