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
from algoperf_kfac.pytorch.dealing import Dealer
from algoperf_kfac.pytorch.factors import bias_part, part_of
from algoperf_kfac.pytorch.nadamw import nadamw_directions, nesterov
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.stacks import Stack, Stacks


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
) -> dict[int, Direction]:
    """NadamW's direction of every parameter with a gradient, by the parameter's identity.

    Args:
        groups: parameter groups with "params", "betas" and "eps".
        states: by parameter: step, exp_avg and exp_avg_sq, made where they are missing and updated.
        plain: identities of parameters whose direction is the momentum, without a second moment.
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
    plain: Set[int],
    stacks: Stacks,
    dealer: Dealer,
    *,
    monitor: bool,
) -> Outcome:
    """Replace the steps of covered layers whose parameters all have gradients by their K-FAC directions.

    With length="rms" those of plain parameters get that length where their layer is not such a one.

    Args:
        directions: of `first_order`; the steps of covered layers are replaced.
        layers: by name.
        states: by name; what the scaling keeps in them is updated.
        beta2s: by identity of the weight.
        plain: identities of parameters whose direction is the momentum.
        stacks: the optimizer's.
        dealer: which processes compute which directions.
        monitor: whether to compute cosines.
    """
    taking_part = {name: la for name, la in layers.items() if all(p.grad is not None for p in la.params)}
    config = stacks.scaling.config
    if config.length_rule == "rms":
        replaced = {id(p) for layer in taking_part.values() for p in layer.params}
        _lengthen(
            [step for p, step in directions.items() if p in plain and p not in replaced], config.length_factor
        )
    parts = stacks.of(taking_part, states, beta2s) if taking_part else []
    moves = [_Move.of(stack, directions) for stack in parts]
    # Where directions are dealt, others may wait for those that are computed here.
    found = dealer.directions(parts, [move.momentum for move in moves], layers, states, monitor=monitor)
    if not moves:
        return Outcome()
    for move, direction in zip(moves, found, strict=True):
        move.direction = direction
    names = [name for move in moves for name in move.stack.names]
    counts = [len(move.stack.names) for move in moves]
    norms = _long_norms_of_layers([(move.direction, n) for move, n in zip(moves, counts, strict=True)])
    momenta = [(move.momentum, n) for move, n in zip(moves, counts, strict=True)]
    ratios = torch.ones_like(norms)
    # A layer without gradient (all zero) has no direction of either kind, and is not in need of a stand-in.
    if config.length_rule == "graft":
        lengths = _joined([move.first_order_norms() for move in moves])
        ratios = torch.where(lengths == 0, lengths, lengths / norms)
    elif config.length_rule == "rms":
        # Numbers of the host go into the call: an array of them would be copied to the device at every step.
        sizes = [move.momentum.numel() // n for move, n in zip(moves, counts, strict=True)]

        def to_length(lengths: Tensor) -> Tensor:
            roots = [part / math.sqrt(size) for part, size in zip(lengths.split(counts), sizes, strict=True)]
            return config.length_factor / torch.cat(roots)

        long = _long_norms_of_layers(momenta)
        ratios = torch.where(long == 0, 0.0, to_length(norms))
        stand_in_ratios = to_length(long).nan_to_num(0.0, 0.0)  # of what has no direction to keep
        for move, ratio in zip(moves, stand_in_ratios.split(counts), strict=True):
            move.stand_in_by_momentum(ratio)
    # Where factors are all but singular a direction may vanish or overflow: the first-order one then stands.
    usable = ratios.isfinite() & norms.isfinite()
    ratios = torch.where(usable, ratios, 1.0)
    outcome = Outcome((~usable).sum(), _by_name(taking_part, names, ratios))
    dots = []
    for move, ratio, ok in zip(moves, ratios.split(counts), usable.split(counts), strict=True):
        direction = move.lengthened(ratio)
        if monitor:
            dots.append(
                torch.linalg.vecdot(move.momentum.flatten(1), direction.flatten(1)).view(len(ok), -1).sum(1)
            )
        move.replace_steps(direction, ok)
    if monitor:
        lengths = _joined([_norms_of_layers(*momentum) for momentum in momenta])
        outcome.cosines = _by_name(taking_part, names, _joined(dots) / (lengths * norms * ratios))
    return outcome


@dataclasses.dataclass
class _Move:
    """The directions of a stack's layers, as matrices (layers groups, P_out, P_in), with a bias P_in + 1.

    Attributes:
        stack: the layers.
        weights, biases: the directions of their parameters.
        momentum: what is preconditioned.
        direction: K-FAC's, as soon as it is there; the momentum before.
        first_weights, first_biases: the first-order steps, biases as (layers groups, P_out, 1).
    """

    stack: Stack
    weights: list[Direction]
    biases: list[Direction]
    momentum: Tensor
    direction: Tensor
    first_weights: Tensor
    first_biases: Tensor | None

    @classmethod
    def of(cls, stack: Stack, directions: Mapping[int, Direction]) -> _Move:
        weights = [directions[id(layer.weight)] for layer in stack.layers]
        biases = [directions[id(layer.bias)] for layer in stack.layers if layer.bias is not None]
        momentum = stack.matrices([w.momentum for w in weights], [b.momentum for b in biases])
        first_biases = stack.biases([b.step for b in biases]) if biases else None
        first_weights = stack.weights([w.step for w in weights])
        return cls(stack, weights, biases, momentum, momentum, first_weights, first_biases)

    def first_order_norms(self) -> Tensor:
        """(layers,): the norms of the layers' first-order steps, weight and bias together."""
        count = len(self.weights)
        norms = _norms_of_layers(self.first_weights, count)
        if self.first_biases is None:
            return norms
        return (norms.square() + _norms_of_layers(self.first_biases, count).square()).sqrt()

    def stand_in_by_momentum(self, ratios: Tensor) -> None:
        """Take the momentum, multiplied by (layers,) numbers, for the first-order steps."""
        steps = self.momentum * self.stack.spread(ratios.to(self.momentum.dtype))
        has_bias = self.first_biases is not None
        self.first_weights = steps[..., :-1] if has_bias else steps
        self.first_biases = steps[..., -1:] if has_bias else None

    def lengthened(self, ratios: Tensor) -> Tensor:
        """The direction multiplied by (layers,) numbers."""
        return self.direction * self.stack.spread(ratios.to(self.direction.dtype))

    def replace_steps(self, direction: Tensor, usable: Tensor) -> None:
        """Put usable directions in the place of the parameters' first-order steps, or of parts of them."""
        ok = self.stack.spread(usable)
        spec = self.stack.layers[0].spec
        if self.first_biases is None:
            steps = torch.where(ok, direction, self.first_weights)
        else:
            steps = torch.where(ok, direction[..., :-1], self.first_weights)
            biases = torch.where(ok, direction[..., -1:], self.first_biases)
            of_layers = biases.reshape(len(usable), -1).unbind()
            _replace(self.biases, of_layers, self.stack, bias_part if spec.bias_start is not None else None)
        _replace(self.weights, self.stack.apart(steps), self.stack, part_of if spec.is_part else None)


def _replace(
    firsts: Sequence[Direction],
    steps: Sequence[Tensor],
    stack: Stack,
    part: Callable[[Tensor, LayerSpec], Tensor] | None,
) -> None:
    """Put steps in the place of parameters' first-order ones, or of a part of them."""
    for first, step, layer in zip(firsts, steps, stack.layers, strict=True):
        if part is None:
            first.step = step.reshape(first.step.shape)
        else:
            # In place, so that the many parts of a parameter are not copied for each; all momenta have been read.
            first.step = first.step.contiguous()
            part(first.step, layer.spec).copy_(step)


def _by_name(order: Iterable[str], names: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """(layers,) numbers by layer, in the layers' order."""
    found = dict(zip(names, values.unbind(), strict=True))
    return {name: found[name] for name in order}


def _norms_of_layers(matrices: Tensor, count: int) -> Tensor:
    """(count,): Frobenius norms of the layers in (count groups, P_out, P_in), in at least float32."""
    return torch.linalg.vector_norm(
        matrices.reshape(count, -1), dim=1, dtype=torch.promote_types(matrices.dtype, torch.float32)
    )


def _long_norms_of_layers(stacks: Sequence[tuple[Tensor, int]]) -> Tensor:
    """(layers,): as `_norms_of_layers`, of all stacks, as long as `_long_norms`."""
    norms = _joined([torch.linalg.vector_norm(m.reshape(n, -1), dim=1, dtype=torch.float64) for m, n in stacks])
    return norms if any(m.dtype == torch.float64 for m, _ in stacks) else norms.float()


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    """Numbers of stacks that may differ in dtype and device, as one vector."""
    wide = any(v.dtype == torch.float64 for v in vectors)
    dtype = torch.float64 if wide else torch.float32
    return torch.cat([v.to(device=vectors[0].device, dtype=dtype) for v in vectors])


def _lengthen(directions: Sequence[Direction], length: float) -> None:
    """Give steps entries of the root mean square `length`; zero stays zero."""
    if not directions:
        return
    norms = _long_norms([one.step for one in directions]).unbind()
    # Numbers of the host go into the call: an array of them would have to be copied to the device at every step.
    roots = torch._foreach_div(list(norms), [math.sqrt(one.step.numel()) for one in directions])
    for one, ratio in zip(directions, (length / torch.stack(roots)).nan_to_num(0.0, 0.0).unbind(), strict=True):
        one.step = one.step * ratio


def _long_norms(tensors: list[Tensor]) -> Tensor:
    """(tensors,): Frobenius norms of tensors so long that the squares of their entries may overflow in float32.

    They are: reduce's B of a layer before an instance norm, whose output gradients sum to zero, is rounding alone.
    """
    norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))
    return norms if any(t.dtype == torch.float64 for t in tensors) else norms.float()
