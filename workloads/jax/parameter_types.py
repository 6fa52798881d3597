"""AlgoPerf's ParameterType of each parameter, from its path in the parameter tree."""

from __future__ import annotations

import jax

from submissions.common.api import Tree
from submissions.common.spec import ParameterType, ShapeTuple

_ATTENTION = {
    "query": ParameterType.ATTENTION_Q,
    "key": ParameterType.ATTENTION_K,
    "value": ParameterType.ATTENTION_V,
    "out": ParameterType.ATTENTION_OUT,
}


def parameter_types(params: Tree) -> Tree:
    """The tree of `params` with types for arrays.

    Norms are told by their modules' names: `batch_norm...`, and `norm...` for the others.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _type([entry.key for entry in path], leaf), params)


def parameter_shapes(params: Tree) -> Tree:
    """The tree of `params` with shapes for arrays, wrapped, because a tuple would be a subtree."""
    return jax.tree.map(lambda leaf: ShapeTuple(leaf.shape), params)


def _type(path: list[str], leaf: jax.Array) -> ParameterType:
    *modules, name = path
    is_bias = name == "bias"
    if modules[-1].startswith("batch_norm"):
        return ParameterType.BATCH_NORM_BIAS if is_bias else ParameterType.BATCH_NORM_SCALE
    if modules[-1].startswith("norm"):
        return ParameterType.LAYER_NORM_BIAS if is_bias else ParameterType.LAYER_NORM_SCALE
    if ".".join(modules[:-1]).endswith("attention") and modules[-1] in _ATTENTION:
        return ParameterType.ATTENTION_BIAS if is_bias else _ATTENTION[modules[-1]]
    if is_bias:
        return ParameterType.BIAS
    if name == "embedding":
        return ParameterType.EMBEDDING
    if leaf.ndim >= 3:  # extents of the kernel, channels in, channels out
        return ParameterType.CONV_WEIGHT
    return ParameterType.WEIGHT
