"""AlgoPerf's ParameterType of each parameter, from the module that holds it."""

from __future__ import annotations

import torch
from torch import nn

from submissions.common.spec import ParameterType

_ATTENTION = {
    "query": ParameterType.ATTENTION_Q,
    "key": ParameterType.ATTENTION_K,
    "value": ParameterType.ATTENTION_V,
    "out": ParameterType.ATTENTION_OUT,
}


def parameter_types(model: nn.Module) -> dict[str, ParameterType]:
    """Parameter name -> type."""
    types = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            types[f"{module_name}.{name}" if module_name else name] = _type(module_name, module, name)
    return types


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Parameter name -> shape."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _type(module_name: str, module: nn.Module, name: str) -> ParameterType:
    is_bias = name.startswith("bias")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ParameterType.BATCH_NORM_BIAS if is_bias else ParameterType.BATCH_NORM_SCALE
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
        return ParameterType.LAYER_NORM_BIAS if is_bias else ParameterType.LAYER_NORM_SCALE
    parent, _, role = module_name.rpartition(".")
    if parent.endswith("attention") and role in _ATTENTION:
        return ParameterType.ATTENTION_BIAS if is_bias else _ATTENTION[role]
    if is_bias:
        return ParameterType.BIAS
    if isinstance(module, nn.Embedding):
        return ParameterType.EMBEDDING
    if isinstance(module, nn.modules.conv._ConvNd):
        return ParameterType.CONV_WEIGHT
    return ParameterType.WEIGHT
