"""The directions of one step: NadamW's for every parameter, K-FAC's in place of it for covered layers.

Nothing here waits for the device: whether a K-FAC direction is usable is selected on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.covered_layer import CoveredLayer
from algoperf_kfac.pytorch.factors import bias_part, from_matrix, part_of, to_matrix
from algoperf_kfac.pytorch.nadamw import nadamw_directions, nesterov
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import Scaling


@dataclasses.dataclass
class Direction:
    """Of one parameter.

    Attributes:
        step: what is subtracted, times the learning rate; shape of the parameter.
        momentum: the bias-corrected Nesterov momentum, which K-FAC preconditions; shape of the parameter.
    """

    step: Tensor
    momentum: Tensor


@dataclasses.dataclass
class Outcome:
    """What `second_order` did, as scalar tensors.

    Attributes:
        stand_ins: K-FAC directions that vanished or overflowed, so that the first-order ones stand.
        ratios: by layer, what its K-FAC direction was multiplied by.
        cosines: by layer, between K-FAC direction and momentum; empty unless monitored.
    """

    stand_ins: Tensor | int = 0
    ratios: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    cosines: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def first_order(
    groups: Iterable[Mapping[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    plain: Set[int],
    length: float | None = None,
) -> dict[int, Direction]:
    """NadamW's direction of every parameter with a gradient, by the parameter's identity.

    Args:
        groups: parameter groups with "params", "betas" and "eps".
        states: by parameter: step, exp_avg and exp_avg_sq, made where they are missing and updated.
        plain: identities of parameters whose direction is the momentum, without a second moment.
        length: root mean square that the entries of those directions get; None for the momentum itself.
    """
    directions: dict[int, Direction] = {}
    for group in groups:
        buckets: dict[tuple[int, bool], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                # Moments and decay move every row anyway.
                p.grad = p.grad.to_dense()
            state = states[p]
            if state.get("exp_avg") is None:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
            for key in ("exp_avg", "exp_avg_sq"):
                if state.get(key) is not None and (state[key].dtype, state[key].device) != (p.dtype, p.device):
                    state[key] = state[key].to(p)  # the model was moved or cast
            if state.get("exp_avg_sq") is None and id(p) not in plain:
                state["exp_avg_sq"] = _late_second_moment(state, *group["betas"])
            state["step"] += 1
            buckets.setdefault((state["step"], id(p) in plain), []).append(p)
        beta1, beta2 = group["betas"]
        for (step, is_plain), params in buckets.items():
            grads = [p.grad for p in params if p.grad is not None]
            momenta = nesterov(grads, [states[p]["exp_avg"] for p in params], step=step, beta1=beta1)
            steps = momenta
            if not is_plain:
                second_moments = [states[p]["exp_avg_sq"] for p in params]
                steps = nadamw_directions(grads, momenta, second_moments, step=step, beta2=beta2, eps=group["eps"])
            elif length is not None:
                ratios = _ratios_to(length, momenta).nan_to_num(0.0, 0.0)  # of what has no direction to keep
                steps = list(torch._foreach_mul(momenta, list(ratios.unbind())))
            directions |= {id(p): Direction(*pair) for p, *pair in zip(params, steps, momenta, strict=True)}
    return directions


def _late_second_moment(state: Mapping[str, Any], beta1: float, beta2: float) -> Tensor:
    """The second moment of a parameter that did without one so far: zero at its first step.

    Later on as if all gradients had been the momentum: from zero, corrected for the steps that went by, the
    first directions would be up to 1 / sqrt(1 - beta2) times too long, and without bounds where gradients vanish.
    """
    steps, momentum = state["step"], state["exp_avg"]
    if not steps:
        return torch.zeros_like(momentum)
    return momentum.square() * ((1 - beta2**steps) / (1 - beta1**steps) ** 2)


def second_order(
    directions: Mapping[int, Direction],
    layers: Mapping[str, CoveredLayer],
    states: Mapping[str, LayerState],
    beta2s: Mapping[int, float],
    scaling: Scaling,
    *,
    monitor: bool,
) -> Outcome:
    """Replace the steps of covered layers whose parameters all have gradients by their K-FAC directions.

    Args:
        directions: of `first_order`; the steps of covered layers are replaced.
        layers: by name.
        states: by name; what the scaling keeps in them is updated.
        beta2s: by identity of the weight.
        scaling: the optimizer's.
        monitor: whether to compute cosines.
    """
    names: list[str] = []
    momenta: list[Tensor] = []
    kfac: list[Tensor] = []
    for name, layer in layers.items():
        gradients = [p.grad for p in layer.params if p.grad is not None]
        if len(gradients) < len(layer.params):
            continue
        momentum = _matrix(layer, [directions[id(p)].momentum for p in layer.params])
        state = states[name]
        names.append(name)
        momenta.append(momentum)
        if state.refreshes:
            gradient = _matrix(layer, gradients) if scaling.uses_gradient else momentum
            kfac.append(scaling.precondition(state, momentum, gradient, beta2s[id(layer.weight)]))
        else:
            kfac.append(momentum.clone())
    if not names:
        return Outcome()
    norms = _long_norms(kfac)
    rule = scaling.config.length_rule
    ratios = torch.ones_like(norms)
    # A layer without gradient (all zero) has no direction of either kind, and is not in need of a stand-in.
    if rule == "graft":
        lengths = _first_order_norms([layers[name] for name in names], directions)
        ratios = torch.where(lengths == 0, lengths, lengths / norms)
    elif rule == "rms":
        ratios = torch.where(_long_norms(momenta) == 0, 0.0, _ratios_to(scaling.config.length_factor, kfac, norms))
    # Where factors are all but singular a direction may vanish or overflow: the first-order one then stands.
    usable = ratios.isfinite() & norms.isfinite()
    ratios = torch.where(usable, ratios, 1.0)
    torch._foreach_mul_(kfac, list(ratios.unbind()))
    outcome = Outcome((~usable).sum(), dict(zip(names, ratios.unbind(), strict=True)))
    if monitor:
        dots = [torch.dot(m.flatten(), d.flatten()) for m, d in zip(momenta, kfac, strict=True)]
        cosines = _stack(dots) / (_norms(momenta) * norms * ratios)
        outcome.cosines = dict(zip(names, cosines.unbind(), strict=True))
    for name, direction, ok in zip(names, kfac, usable.unbind(), strict=True):
        layer = layers[name]
        weight, bias = from_matrix(direction, layer.spec)
        _replace(directions[id(layer.weight)], weight, ok, layer.spec, part_of if layer.spec.is_part else None)
        if layer.bias is not None and bias is not None:
            of_part = layer.spec.bias_start is not None
            _replace(directions[id(layer.bias)], bias, ok, layer.spec, bias_part if of_part else None)
    return outcome


def _replace(
    first: Direction, step: Tensor, ok: Tensor, spec: LayerSpec, part: Callable[[Tensor, LayerSpec], Tensor] | None
) -> None:
    """Put a usable K-FAC direction in the place of a parameter's first-order one, or of a part of it."""
    if part is None:
        first.step = torch.where(ok, step.reshape(first.step.shape), first.step)
        return
    # In place, so that the many parts of a parameter are not copied for each; all momenta have been read.
    first.step = first.step.contiguous()
    old = part(first.step, spec)
    old.copy_(torch.where(ok, step, old))


def _matrix(layer: CoveredLayer, tensors: list[Tensor]) -> Tensor:
    """What a layer has of a weight's and a bias' tensor as one matrix, in the factors' dtype."""
    matrix = to_matrix(tensors[0], tensors[1] if len(tensors) > 1 else None, layer.spec)
    return matrix.to(layer.factor_dtype)


def _first_order_norms(layers: Sequence[CoveredLayer], directions: Mapping[int, Direction]) -> Tensor:
    """(layers,): the norms of the layers' NadamW directions, weight and bias together."""
    weights = _norms([part_of(directions[id(la.weight)].step, la.spec) for la in layers])
    with_bias = [bias_part(directions[id(la.bias)].step, la.spec) for la in layers if la.bias is not None]
    if not with_bias:
        return weights
    biases = _norms(with_bias).to(weights.dtype)
    if len(with_bias) < len(layers):
        # Spread without an index tensor, which would have to be copied to the device at every step.
        parts = iter(biases.unbind())
        biases = torch.stack([weights.new_zeros(()) if la.bias is None else next(parts) for la in layers])
    return (weights.square() + biases.square()).sqrt()


def _ratios_to(length: float, tensors: list[Tensor], norms: Tensor | None = None) -> Tensor:
    """(tensors,): what gives their entries the root mean square `length`; infinite or NaN of those without length.

    Args:
        length: k; the norm is k sqrt(P_out P_in), then.
        tensors: of any shape.
        norms: theirs, if known.
    """
    norms = _long_norms(tensors) if norms is None else norms
    # Numbers of the host go into the call: an array of them would have to be copied to the device at every step.
    return length / torch.stack(torch._foreach_div(list(norms.unbind()), [math.sqrt(t.numel()) for t in tensors]))


def _norms(tensors: list[Tensor]) -> Tensor:
    """(tensors,): Frobenius norms in at least float32, whatever the dtype of the tensors."""
    return _stack(torch._foreach_norm([t if t.dtype.itemsize >= 4 else t.float() for t in tensors]))


def _long_norms(tensors: list[Tensor]) -> Tensor:
    """(tensors,): as `_norms`, of tensors so long that the squares of their entries may overflow in float32.

    They are: reduce's B of a layer before an instance norm, whose output gradients sum to zero, is rounding alone.
    """
    norms = _stack(torch._foreach_norm(tensors, dtype=torch.float64))
    return norms if any(t.dtype == torch.float64 for t in tensors) else norms.float()


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of layers that may differ in dtype and device, as one vector."""
    wide = any(s.dtype == torch.float64 for s in scalars)
    dtype = torch.float64 if wide else torch.float32
    return torch.stack([s.to(device=scalars[0].device, dtype=dtype) for s in scalars])
