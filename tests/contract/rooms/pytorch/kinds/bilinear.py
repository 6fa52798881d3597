"""A toy: `torch.nn.Bilinear`, s_k = x^T W_k y + b_k, is linear in the outer product of its two inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from algoperf_kfac.layers import make_spec, too_large
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.kinds._base import Found, Kind, Site, Watch
from algoperf_kfac.pytorch.operations import Called, Operation

if TYPE_CHECKING:
    from algoperf_kfac.pytorch.observer import Observer


class Bilinear(Kind):
    """One layer, whose inputs are the products of all pairs of features."""

    names = ("bilinear",)

    def cover(self, site: Site) -> Found | None:
        if not isinstance(site.module, nn.Bilinear):
            return None
        weight, bias = site.params.get("weight"), site.params.get("bias")
        if weight is None or site.is_shared(weight):
            return Found([], "its Bilinear has a frozen or shared weight")
        spec = make_spec(
            name=site.path,
            kind="bilinear",
            weight=site.name_of(weight),
            bias=None if bias is None else site.name_of(bias),
            weight_shape=tuple(weight.shape),
            groups=1,
            in_dim=weight.shape[1] * weight.shape[2],
            out_dim=weight.shape[0],
            config=site.config,
        )
        return Found([CoveredLayer(spec, weight, bias)] if spec.has_factors else [], too_large(site.config))

    def watch(self, capture: Observer) -> Watch:
        return _BilinearWatch(capture)


class _BilinearWatch(Watch):
    def __init__(self, capture: Observer) -> None:
        self._capture = capture

    def called(self, called: Called) -> Any:
        if called.func is not torch.bilinear or not torch.is_grad_enabled():
            return NotImplemented
        return self._bilinear(called.run(), *called.args, **called.kwargs)

    def _bilinear(
        self, output: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        spec = self._capture.spec_of(weight)
        if spec is None:
            return output
        products = (input1.detach().unsqueeze(-1) * input2.detach().unsqueeze(-2)).flatten(-2)
        operation = Operation("bilinear", products, weight, bias)
        return self._capture.record(spec, operation, output, self._capture.choose(spec, operation, output))
