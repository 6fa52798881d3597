"""Which layers of a PyTorch model K-FAC covers, and why it does not cover the other parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.errors import check_patterns
from algoperf_kfac.layers import (
    BIAS_OF_SHARED,
    EMBEDDING,
    EXCLUDED,
    NORMALISATION,
    RAW,
    SCRIPTED,
    SHARED_BIAS,
    WITHOUT_ELEMENTS,
    FallbackSpec,
    LayerSpec,
    Layout,
    make_spec,
    matches,
    one_parameter,
    parts_of,
    too_large,
)
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.kinds import Found, Kind, Site
from algoperf_kfac.pytorch.operations import Operation, matrix_sizes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and (Distributed)DataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def check_model(model: nn.Module) -> None:
    """Raises ValueError if parts of a model are flat parameters that layers are cut from (FSDP)."""
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            where = f"module {path}" if path else "the model"
            raise ValueError(f"{where} is sharded (FSDP): K-FAC needs whole layers, use DistributedDataParallel")


def check_parameter(param: Tensor, name: str | None) -> None:
    """Raises ValueError if K-FAC cannot train a parameter, None being the name of one that is not the model's."""
    if name is None:
        raise ValueError(f"a parameter of shape {tuple(param.shape)} in params does not belong to the model")
    if param.is_complex():
        raise ValueError(
            f"parameter {name} is complex: train its real and imaginary parts as two parameters "
            "(torch.view_as_complex in the model), or leave it to another optimizer"
        )
    if "DTensor" in (type(param).__name__, type(param.data).__name__):
        raise ValueError(
            f"parameter {name} is sharded (FSDP2): K-FAC needs whole layers, use DistributedDataParallel"
        )
    if not param.is_floating_point():
        raise ValueError(f"parameter {name} of dtype {param.dtype} cannot be trained")


def discover(
    model: nn.Module,
    config: KFACConfig,
    trainable: Iterable[Tensor],
    exclude: Iterable[str] = (),
    output_splits: Mapping[str, int] | None = None,
    kinds: Sequence[Kind] = (),
) -> tuple[list[CoveredLayer], list[FallbackSpec]]:
    """Go through the model's modules once.

    Args:
        model: the model, unwrapped.
        config: decides the approximation and the block sizes.
        trainable: the parameters the optimizer updates; others are neither covered nor listed.
        exclude: patterns (fnmatch) of module paths to leave to the fallback.
        output_splits: pattern of module paths -> into how many equal parts the layer's outputs are cut.
        kinds: asked for modules that are neither linear layers nor convolutions.

    Raises:
        ValueError: if a lazy module has not been materialised, a pattern matches no module, or outputs cannot be
            cut into equal parts.
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
    patterns, splits = list(exclude), dict(output_splits or {})
    paths = [path for path, _ in model.named_modules()]
    for argument, given in (("exclude", patterns), ("output_splits", list(splits))):
        check_patterns(argument, given, [p for p in given if not matches(paths, [p])], "module")
    layers: list[CoveredLayer] = []
    fallbacks: list[FallbackSpec] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        params = {k: p for k, p in module._parameters.items() if p is not None and id(p) in wanted}
        site = Site(path, module, params, owners, config)
        found = Found([], EXCLUDED) if matches([path], patterns) else _cover(site, splits, kinds)
        layers += found.layers
        covered = {id(p) for layer in found.layers for p in layer.params}
        for p in params.values():
            if id(p) not in covered and id(p) not in seen:
                names = owners[id(p)]
                why = _shared(names) if len(names) > 1 else _reason(module, names[0].rpartition(".")[2], found)
                fallbacks.append(FallbackSpec(names[0], tuple(p.shape), why))
            seen.add(id(p))
    return layers, fallbacks


def _reason(module: nn.Module, key: str, found: Found) -> str:
    """Why a parameter of a module is not covered: a class derived from torch's own may have further ones."""
    plain = getattr(nn, type(module).__name__, None) is type(module)
    own = plain or re.match(r"(.*_)?(weight|bias)(_|$)", key)
    return found.reason if own or found.reason in (EXCLUDED, SCRIPTED) else RAW


def _shared(names: list[str]) -> str:
    is_bias = all(name.rpartition(".")[2] == "bias" for name in names)
    return SHARED_BIAS if is_bias else one_parameter(names)


def _cover(site: Site, splits: Mapping[str, int], kinds: Sequence[Kind]) -> Found:
    """The covered layers of a module."""
    module, name = site.module, type(site.module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return Found([], SCRIPTED)
    if isinstance(module, nn.Linear):
        return _cover_weight(site, "linear", 1, splits)
    if isinstance(module, CONVOLUTIONS):
        return _cover_weight(site, "conv", module.groups, splits)
    if isinstance(module, TRANSPOSED):
        return _cover_weight(site, "conv_transpose", module.groups, splits)
    for kind in kinds:
        found = kind.cover(site)
        if found is not None:
            return found
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Found([], EMBEDDING)
    if isinstance(module, NORMALISATIONS):
        return Found([], f"{NORMALISATION} ({name})")
    return Found([], RAW)


def _cover_weight(site: Site, kind: str, groups: int, splits: Mapping[str, int]) -> Found:
    """The layer of a module with a weight and perhaps a bias."""
    weight = site.params.get("weight")
    if weight is None:
        return Found([], f"its {type(site.module).__name__} has a frozen or parametrised weight")
    if not weight.numel():
        return Found([], WITHOUT_ELEMENTS)
    if site.is_shared(weight):
        return Found([], BIAS_OF_SHARED)  # the weight itself has a reason of its own
    bias = site.params.get("bias")
    if bias is not None and site.is_shared(bias):
        bias = None
    spec = spec_from_shape(
        name=site.path,
        kind=kind,
        weight=site.name_of(weight),
        bias=None if bias is None else site.name_of(bias),
        shape=tuple(weight.shape),
        groups=groups,
        config=site.config,
        splits=splits,
    )
    return Found([CoveredLayer(spec, weight, bias)]) if spec.has_factors else Found([], too_large(site.config))


def spec_from_shape(
    *,
    name: str,
    kind: str,
    weight: str,
    bias: str | None,
    shape: tuple[int, ...],
    groups: int,
    config: KFACConfig,
    splits: Mapping[str, int],
    stored: tuple[int, ...] | None = None,
    layout: Layout = (),
    bias_start: int | None = None,
) -> LayerSpec:
    """The spec of a linear layer or convolution from its weight's shape, as the operation has it.

    Where the model stores it in another shape or order, `stored` and `layout` say so; see `LayerSpec`.
    """
    out_dim, in_dim = matrix_sizes(kind, shape, groups)
    return make_spec(
        name=name,
        kind=kind,
        weight=weight,
        bias=bias,
        weight_shape=stored or shape,
        groups=groups,
        in_dim=in_dim,
        out_dim=out_dim,
        config=config,
        kernel=1 if kind == "linear" else math.prod(shape[2:]),
        parts=parts_of(name, kind, shape, splits),
        layout=layout,
        bias_start=bias_start,
    )


def spec_of_operation(
    operation: Operation, names: Mapping[int, str], config: KFACConfig, output_splits: Mapping[str, int]
) -> LayerSpec | None:
    """The spec of a raw parameter from the operation that reads it; None if it cannot be covered.

    Args:
        operation: the operation.
        names: parameter names by identity, of those that may be promoted.
        config: decides the approximation and the block sizes.
        output_splits: as for `discover`; patterns match the layer's name.
    """
    weight = names.get(id(operation.weight))
    if weight is None or (operation.kind == "linear" and len(operation.shape) != 2):
        return None
    shape = operation.shape
    if 0 in shape:
        return None
    bias = names.get(id(operation.bias)) if isinstance(operation.bias, nn.Parameter) else None
    if operation.bias_start is None and isinstance(operation.bias, Tensor) and operation.bias.dim() != 1:
        bias = None
    spec = spec_from_shape(
        name=weight.rpartition(".")[0] or weight,
        kind=operation.kind,
        weight=weight,
        bias=bias,
        shape=shape,
        groups=operation.groups,
        config=config,
        splits=output_splits,
        stored=tuple(operation.weight.shape),
        layout=operation.layout,
        bias_start=None if bias is None else operation.bias_start,
    )
    if spec.is_part:
        spec = dataclasses.replace(spec, name=part_name(spec))
    return spec if spec.has_factors else None


def part_name(spec: LayerSpec, *, numbered: bool = True) -> str:
    """The name of a layer that is a part of a weight: its number among parts of equal size in one piece.

    Where it has none, or should have none, the name says where it begins.
    """
    sizes, strides, (offset,) = spec.layout
    number, rest = divmod(offset, math.prod(sizes))
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    numbered = numbered and extent == math.prod(sizes) and not rest
    return f"{spec.weight}.{number}" if numbered else f"{spec.weight}.from{offset}"
