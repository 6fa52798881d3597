"""Which layers of a PyTorch model K-FAC covers, and why it does not cover the other parameters."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import FallbackSpec, LayerSpec, split_blocks
from algoperf_kfac.pytorch import recurrent
from algoperf_kfac.pytorch.operations import Operation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)
EMBEDDING = "embedding: its inputs are one-hot, A would be a diagonal of counts"
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
    model: nn.Module,
    config: KFACConfig,
    trainable: Iterable[Tensor],
    exclude: Iterable[str] = (),
    output_splits: Mapping[str, int] | None = None,
) -> tuple[list[CoveredLayer], list[FallbackSpec]]:
    """Go through the model's modules once.

    Args:
        model: the model, unwrapped.
        config: decides the approximation and the block sizes.
        trainable: the parameters the optimizer updates; others are neither covered nor listed.
        exclude: patterns (fnmatch) of module paths to leave to the fallback.
        output_splits: pattern of module paths -> into how many equal parts the layer's outputs are cut.

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
    patterns = list(exclude)
    paths = [path for path, _ in model.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"exclude: no module matches {pattern!r}")
    splits = dict(output_splits or {})
    for pattern in splits:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"output_splits: no module matches {pattern!r}")
    layers: list[CoveredLayer] = []
    fallbacks: list[FallbackSpec] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        params = {k: p for k, p in module._parameters.items() if p is not None and id(p) in wanted}
        found, reason = _cover(path, module, params, owners, config, patterns, splits)
        layers += found
        covered = {id(p) for layer in found for p in (layer.weight, layer.bias)}
        for p in params.values():
            if id(p) not in covered and id(p) not in seen:
                name = owners[id(p)][0]
                why = _tied(owners[id(p)]) or reason
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
    splits: Mapping[str, int],
) -> tuple[list[CoveredLayer], str]:
    """The covered layers of a module, or the reason why its parameters are not covered."""
    name = type(module).__name__
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude):
        return [], "excluded by the user"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return [], "read inside nn.MultiheadAttention's fused function"
    if isinstance(module, nn.Linear):
        kind, groups = "linear", 1
    elif isinstance(module, CONVOLUTIONS):
        kind, groups = "conv", module.groups
    elif isinstance(module, TRANSPOSED):
        kind, groups = "conv_transpose", module.groups
    else:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return [], EMBEDDING
        if isinstance(module, NORMALISATIONS):
            return [], f"normalisation ({name})"
        if isinstance(module, nn.LSTM):
            return _cover_lstm(path, module, params, owners, config)
        if isinstance(module, nn.RNNBase):
            return [], f"recurrent ({name}): its time steps run in one fused operation"
        if isinstance(module, nn.MultiheadAttention):
            return [], "read inside nn.MultiheadAttention's fused function"
        return [], RAW
    weight = params.get("weight")
    if weight is None:
        return [], f"its {name} has a frozen or parametrised weight"
    if len(owners[id(weight)]) > 1:
        return [], _tied(owners[id(weight)])
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
        parts=parts_of(path, kind, tuple(weight.shape), splits),
    )
    if not spec.in_blocks and not spec.out_blocks:
        return [], f"both factors above max_factor_dim={config.max_factor_dim}"
    return [CoveredLayer(spec, weight, bias)], ""


def _cover_lstm(
    path: str, module: nn.LSTM, params: dict[str, Tensor], owners: dict[int, list[str]], config: KFACConfig
) -> tuple[list[CoveredLayer], str]:
    """Two layers per direction: on the inputs, and on the previous hidden state (see `recurrent`)."""
    why = recurrent.uncovered(module)
    if why:
        return [], why
    layers = []
    for key, weight in params.items():
        if not key.startswith("weight") or len(owners[id(weight)]) > 1:
            continue
        bias = params.get(key.replace("weight", "bias"))
        if bias is not None and len(owners[id(bias)]) > 1:
            bias = None
        spec = make_spec(
            name=f"{path}.{key}" if path else key,
            kind="linear",
            weight_name=owners[id(weight)][0],
            bias_name=None if bias is None else owners[id(bias)][0],
            shape=tuple(weight.shape),
            groups=1,
            config=config,
            parts=1 if len(weight) <= config.max_factor_dim else 4,  # a block per gate where one is too large
        )
        if spec.in_blocks or spec.out_blocks:
            layers.append(CoveredLayer(spec, weight, bias))
    return layers, "recurrent (LSTM): its weight is frozen, or above max_factor_dim"


def parts_of(name: str, kind: str, shape: tuple[int, ...], splits: Mapping[str, int]) -> int:
    """Into how many parts a layer's outputs are cut.

    Raises:
        ValueError: if they cannot be cut into equal parts.
    """
    for pattern, parts in splits.items():
        if not fnmatch.fnmatchcase(name, pattern):
            continue
        if kind != "linear" or parts < 1 or shape[0] % parts:
            raise ValueError(
                f"output_splits[{pattern!r}]={parts} does not fit {name}, a {kind} layer of shape {shape}: allowed "
                "are linear layers and a divisor of their outputs"
            )
        return parts
    return 1


def tied_tables(
    model: nn.Module, config: KFACConfig, fallbacks: Iterable[FallbackSpec], exclude: Iterable[str] = ()
) -> dict[str, LayerSpec]:
    """The embedding tables that are covered if they prove to be the output layer, too (see `tied`).

    Args:
        model: the model, unwrapped.
        config: decides the approximation and the block sizes.
        fallbacks: the parameters that `discover` left to the fallback.
        exclude: as for `discover`.

    Returns:
        Parameter name -> the layer the table would be.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    open_to = {f.name for f in fallbacks}
    barred: set[int] = set()
    found: dict[str, LayerSpec] = {}
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Embedding) and not (
            module.sparse or module.scale_grad_by_freq or module.max_norm is not None
        )
        excluded = any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude)
        for p in module._parameters.values():
            if p is None:
                continue
            if excluded or not (plain or isinstance(module, nn.Linear)):
                barred.add(id(p))
            elif plain and names[id(p)] in open_to:
                spec = make_spec(
                    name=names[id(p)].rpartition(".")[0] or names[id(p)],
                    kind="embedding",
                    weight_name=names[id(p)],
                    bias_name=None,
                    shape=tuple(p.shape),
                    groups=1,
                    config=config,
                )
                if spec.in_blocks:
                    found[spec.weight] = spec
    barred_names = {names[i] for i in barred if i in names}
    return {name: spec for name, spec in found.items() if name not in barred_names}


def make_spec(
    *,
    name: str,
    kind: str,
    weight_name: str,
    bias_name: str | None,
    shape: tuple[int, ...],
    groups: int,
    config: KFACConfig,
    parts: int = 1,
) -> LayerSpec:
    """The spec of a layer from its weight's shape; `parts` cuts its outputs before large factors are cut."""
    if kind == "conv_transpose":
        out_dim, in_dim = shape[1], shape[0] // groups * math.prod(shape[2:])
    else:
        out_dim, in_dim = shape[0] // groups, math.prod(shape[1:])
    in_blocks, part = (
        split_blocks(dim, config.max_factor_dim, config.large_factor)
        for dim in (in_dim + (bias_name is not None), out_dim // parts)
    )
    # The vocabulary side of a tied table is taken as the identity, a lookup is as linear as the output layer.
    table = kind == "embedding"
    return LayerSpec(
        name=name,
        kind=kind,
        weight=weight_name,
        bias=bias_name,
        weight_shape=shape,
        groups=groups,
        in_dim=in_dim,
        out_dim=out_dim,
        approximation=config.approximation_for("linear" if table else kind),
        in_blocks=in_blocks,
        out_blocks=() if table else part * parts,
    )


def spec_of_operation(
    operation: Operation, names: dict[int, str], config: KFACConfig, output_splits: Mapping[str, int]
) -> LayerSpec | None:
    """The spec of a raw parameter from the operation that reads it; None if it cannot be covered.

    Args:
        operation: the operation.
        names: parameter names by identity, of those that may be promoted.
        config: decides the approximation and the block sizes.
        output_splits: as for `discover`; patterns match the layer's name.
    """
    weight_name = names.get(id(operation.weight))
    if weight_name is None or (operation.kind == "linear" and operation.weight.dim() != 2):
        return None
    name = weight_name.rpartition(".")[0] or weight_name
    shape = tuple(operation.weight.shape)
    spec = make_spec(
        name=name,
        kind=operation.kind,
        weight_name=weight_name,
        bias_name=names.get(id(operation.bias)) if isinstance(operation.bias, torch.nn.Parameter) else None,
        shape=shape,
        groups=operation.groups,
        config=config,
        parts=parts_of(name, operation.kind, shape, output_splits),
    )
    return spec if spec.in_blocks or spec.out_blocks else None
