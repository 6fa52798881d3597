"""The exact Gauss-Newton matrix of a layer by automatic differentiation; shares no code with the library.

GGN = J^T H J with the Jacobian J of all outputs of the batch with respect to the layer's parameters, and the
Hessian H of the summed loss with respect to these outputs. Parameters are ordered as the rows of a matrix
(P_out x P_in), the bias as its last column, so that the K-FAC approximation is kron(B, A).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

# Summed losses as functions of the outputs alone: none of their Hessians depends on the labels. The absolute
# error has no curvature; by convention it takes the identity, the Fisher of a Laplace distribution.
LOSSES = {
    "mean_squared_error": lambda f: f.square().sum(),
    "softmax_cross_entropy": lambda f: -f.log_softmax(-1)[..., 0].sum(),
    "sigmoid_cross_entropy": lambda f: F.softplus(f).sum(),
    "mean_absolute_error": lambda f: 0.5 * f.square().sum(),
}


def rows(layer: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of a linear layer or convolution: weights and biases (...) to matrices (..., groups, P_out, P_in [+ 1])."""
    groups = getattr(layer, "groups", 1)
    lead = weight.shape[: weight.dim() - layer.weight.dim()]
    kernel = tuple(layer.weight.shape[2:])
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        c_in, c_out = layer.in_channels // groups, layer.out_channels // groups
        by_output = weight.reshape(*lead, groups, c_in, c_out, *kernel).movedim(len(lead) + 2, len(lead) + 1)
    else:
        c_out = layer.weight.shape[0] // groups
        by_output = weight.reshape(*lead, groups, c_out, *layer.weight.shape[1:])
    matrix = by_output.flatten(len(lead) + 2)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(*lead, groups, c_out, 1)], -1)


def ggn_blocks(model: nn.Module, x: Tensor, loss: str, layer_name: str) -> Tensor:
    """(groups, P, P): the layer's block of the GGN of the loss summed over the batch, one per channel group."""
    layer = model.get_submodule(layer_name)
    own = dict(layer.named_parameters(prefix=layer_name, recurse=False))
    others = {k: v.detach() for k, v in model.named_parameters() if k not in own}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, others | parameters, (x,))

    f = outputs({k: v.detach() for k, v in own.items()})
    jacobian = jacrev(outputs)({k: v.detach() for k, v in own.items()})
    flat = {k.rpartition(".")[2]: j.reshape(f.numel(), *j.shape[f.dim() :]) for k, j in jacobian.items()}
    j = rows(layer, flat["weight"], flat.get("bias")).flatten(2)  # (outputs, groups, P)
    h = hessian(LOSSES[loss])(f).reshape(f.numel(), f.numel())
    return torch.einsum("mgp,mn,ngq->gpq", j, h, j)


def kfac_blocks(a: Tensor, b: Tensor) -> Tensor:
    """(groups, P, P): the Kronecker products of a layer's factors."""
    a, b = (m if m.dim() == 3 else m.unsqueeze(0) for m in (a, b))
    return torch.stack([torch.kron(b_g, a_g) for a_g, b_g in zip(a, b, strict=True)])


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact matrix."""
    return float((approximate - exact).norm() / exact.norm().clamp(min=1e-300))
