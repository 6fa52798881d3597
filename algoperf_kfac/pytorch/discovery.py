"""Which layers of a PyTorch model K-FAC covers, and why it does not cover the other parameters."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import FallbackSpec, LayerSpec, split_blocks
from algoperf_kfac.pytorch.operations import Operation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)
RAW = "raw parameter: covered from the first statistics step on if an operation with a rule reads it"


@dataclasses.dataclass(frozen=True)
class CoveredLayer:
    """A layer with its parameters."""

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and (Distributed)DataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def discover(
    model: nn.Module, config: KFACConfig, trainable: Iterable[Tensor], exclude: Iterable[str] = ()
) -> tuple[list[CoveredLayer], list[FallbackSpec]]:
    """Go through the model's modules once.

    Args:
        model: the model, unwrapped.
        config: decides the approximation and the block sizes.
        trainable: the parameters the optimizer updates; others are neither covered nor listed.
        exclude: patterns (fnmatch) of module paths to leave to the fallback.

    Raises:
        ValueError: if a lazy module has not been materialised, or a pattern matches no module.
    """
    wanted = {id(p) for p in trainable}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is None:
                continue
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"{path} is a lazy module: run one forward pass before making the optimizer")
            owners.setdefault(id(p), []).append(f"{path}.{key}" if path else key)
    patterns = list(exclude)
    paths = [path for path, _ in model.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"exclude: no module matches {pattern!r}")
    layers: list[CoveredLayer] = []
    fallbacks: list[FallbackSpec] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        params = {k: p for k, p in module._parameters.items() if p is not None and id(p) in wanted}
        layer, reason = _cover(path, module, params, owners, config, patterns)
        covered: set[int] = set()
        if layer is not None:
            layers.append(layer)
            covered = {id(layer.weight), id(layer.bias)}
        for key, p in params.items():
            if id(p) not in covered and id(p) not in seen:
                name = owners[id(p)][0]
                why = _tied(owners[id(p)]) or (reason if key != "bias" or layer is None else "tied bias")
                fallbacks.append(FallbackSpec(name, tuple(p.shape), why))
            seen.add(id(p))
    return layers, fallbacks


def _tied(names: list[str]) -> str:
    return f"tied weight: {' and '.join(names)} are one parameter" if len(names) > 1 else ""


def _cover(
    path: str,
    module: nn.Module,
    params: dict[str, Tensor],
    owners: dict[int, list[str]],
    config: KFACConfig,
    exclude: list[str],
) -> tuple[CoveredLayer | None, str]:
    """The covered layer of a module, or the reason why its parameters are not covered."""
    name = type(module).__name__
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude):
        return None, "excluded by the user"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None, "read inside nn.MultiheadAttention's fused function"
    if isinstance(module, nn.Linear):
        kind, groups = "linear", 1
    elif isinstance(module, CONVOLUTIONS):
        kind, groups = "conv", module.groups
    elif isinstance(module, TRANSPOSED):
        kind, groups = "conv_transpose", module.groups
    else:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return None, "embedding: its inputs are one-hot, A would be a diagonal of counts"
        if isinstance(module, NORMALISATIONS):
            return None, f"normalisation ({name})"
        if isinstance(module, nn.RNNBase):
            return None, f"recurrent ({name}): its time steps run in one fused operation"
        if isinstance(module, nn.MultiheadAttention):
            return None, "read inside nn.MultiheadAttention's fused function"
        return None, RAW
    weight = params.get("weight")
    if weight is None:
        return None, f"its {name} has a frozen or parametrised weight"
    if len(owners[id(weight)]) > 1:
        return None, _tied(owners[id(weight)])
    bias = params.get("bias")
    if bias is not None and len(owners[id(bias)]) > 1:
        bias = None
    spec = make_spec(
        name=path,
        kind=kind,
        weight_name=owners[id(weight)][0],
        bias_name=None if bias is None else owners[id(bias)][0],
        shape=tuple(weight.shape),
        groups=groups,
        config=config,
    )
    if not spec.in_blocks and not spec.out_blocks:
        return None, f"both factors above max_factor_dim={config.max_factor_dim}"
    return CoveredLayer(spec, weight, bias), ""


def make_spec(
    *,
    name: str,
    kind: str,
    weight_name: str,
    bias_name: str | None,
    shape: tuple[int, ...],
    groups: int,
    config: KFACConfig,
) -> LayerSpec:
    """The spec of a layer from its weight's shape."""
    if kind == "conv_transpose":
        out_dim, in_dim = shape[1], shape[0] // groups * math.prod(shape[2:])
    else:
        out_dim, in_dim = shape[0] // groups, math.prod(shape[1:])
    blocks = [
        split_blocks(dim, config.max_factor_dim, config.large_factor)
        for dim in (in_dim + (bias_name is not None), out_dim)
    ]
    return LayerSpec(
        name=name,
        kind=kind,
        weight=weight_name,
        bias=bias_name,
        weight_shape=shape,
        groups=groups,
        in_dim=in_dim,
        out_dim=out_dim,
        approximation=config.approximation_for(kind),
        in_blocks=blocks[0],
        out_blocks=blocks[1],
    )


def spec_of_operation(operation: Operation, names: dict[int, str], config: KFACConfig) -> LayerSpec | None:
    """The spec of a raw parameter from the operation that reads it; None if it cannot be covered.

    Args:
        operation: the operation.
        names: parameter names by identity, of those that may be promoted.
        config: decides the approximation and the block sizes.
    """
    weight_name = names.get(id(operation.weight))
    if weight_name is None or (operation.kind == "linear" and operation.weight.dim() != 2):
        return None
    spec = make_spec(
        name=weight_name.rpartition(".")[0] or weight_name,
        kind=operation.kind,
        weight_name=weight_name,
        bias_name=names.get(id(operation.bias)) if isinstance(operation.bias, torch.nn.Parameter) else None,
        shape=tuple(operation.weight.shape),
        groups=operation.groups,
        config=config,
    )
    return spec if spec.in_blocks or spec.out_blocks else None
