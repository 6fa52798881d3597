"""G^T A = dL/dW: whether what was recorded of a layer is the whole of its weight's gradient.

Recorders make G^T A of the very inputs and output gradients that the factors are made of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from algoperf_kfac.layers import MAX_ERROR, ROUNDING, not_its_gradient
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.factors import to_matrix
from algoperf_kfac.pytorch.statistics import Product


def compare(
    layers: Mapping[str, CoveredLayer],
    products: Mapping[str, Product | None],
    gradients: Mapping[str, Tensor],
    penalties: Mapping[int, Tensor],
    hidden: Collection[int],
) -> tuple[dict[str, float], dict[str, str]]:
    """Each layer's product beside its weight's gradient; waits for the device once, and only if there are any.

    Args:
        layers: the covered layers.
        products: by layer; None is not compared.
        gradients: of the weights, by layer; those without are not compared.
        penalties: by identity of a weight, the part of its gradient that penalties added.
        hidden: identities of weights to which penalties added what was not seen: not compared either.

    Returns:
        By layer, the relative error; and of the layers where it is more than rounding, the reason to give them up.
    """
    shares, excesses = {}, {}
    for name, product in products.items():
        layer, gradient = layers[name], gradients.get(name)
        if product is None or gradient is None or product.matrix.is_meta or id(layer.weight) in hidden:
            continue
        wanted, bound = to_matrix(gradient.to(product.matrix), None, layer.spec), product.bound
        penalty = penalties.get(id(layer.weight))
        if penalty is not None:
            added = to_matrix(penalty.to(product.matrix), None, layer.spec)
            wanted, bound = wanted - added, bound + added.norm()
        difference, norm = product.matrix - wanted, wanted.norm()
        shares[name] = difference.norm() / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        allowed = MAX_ERROR * norm + ROUNDING * product.eps * bound
        excesses[name] = difference.norm() - allowed
    if not shares:
        return {}, {}
    device = next(iter(shares.values())).device
    table = torch.stack([torch.stack([shares[n].to(device), excesses[n].to(device)]) for n in shares]).tolist()
    errors = {name: share for name, (share, _) in zip(shares, table, strict=True)}
    far = {name: share for name, (share, excess) in zip(shares, table, strict=True) if excess > 0}
    return errors, {name: not_its_gradient(share) for name, share in far.items()}
