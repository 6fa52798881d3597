"""Distributed Shampoo: Shampoo's direction with the length of Adam's step, block by block.

Sources: Gupta et al. 2018 (arXiv 1802.09568), the preconditioner; Anil et al. 2020 (arXiv 2002.09018), grafting and
blocks; Shi et al. 2023 (arXiv 2309.06497), the form that won AlgoPerf 0.5: moving averages with bias correction,
Adam grafting, decoupled weight decay. Every process computes all of it; their code shares the roots out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Shampoo(torch.optim.Optimizer):
    """Shampoo with Adam grafting.

    For a block G of a gradient with k dimensions, after small dimensions were merged, step t and each dimension i,

        L_i <- beta2 L_i + (1 - beta2) G_(i) G_(i)^T,   v <- beta2 v + (1 - beta2) G^2,
        m <- beta1 m + (1 - beta1) G,                   all three bias-corrected below,
        S = m x_1 (L_1 + eps I)^(-1/2k) ... x_k (L_k + eps I)^(-1/2k),
        p <- (1 - lr wd) p - lr S |m / (sqrt(v) + eps_Adam)| / |S|,

    with G_(i) the block unfolded along dimension i. The roots are made at steps 1, 1 + precondition_frequency, ...

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decays of the first moment, and of factors and second moment; each in [0, 1).
        eps: added to eigenvalues of factors, after negative ones were lifted to zero.
        adam_eps: added to the root of Adam's second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        precondition_frequency: steps between roots.
        max_dim: longest side of a block, and largest size of merged dimensions.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        max_dim: int = 1024,
    ) -> None:
        if min(lr, eps, adam_eps, weight_decay) < 0:
            raise ValueError("lr, eps, adam_eps and weight_decay must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if min(precondition_frequency, max_dim) < 1:
            raise ValueError("precondition_frequency and max_dim must be at least 1")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "adam_eps": adam_eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_dim": max_dim,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; a closure is evaluated first, with gradients enabled, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = self._direction(parameter, parameter.grad, group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.view_as(parameter), alpha=-group["lr"])
        return loss

    def _direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """What the learning rate multiplies; moves the averages."""
        shape = merged(gradient.shape, group["max_dim"])
        gradient = gradient.reshape(shape)
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
            zeros = [
                [block.new_zeros(side, side) for side in block.shape]
                for block in blocks(gradient, group["max_dim"])
            ]
            state["factors"] = zeros
            state["roots"] = [[torch.zeros_like(factor) for factor in factors] for factors in zeros]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        corrections = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        momentum = state["exp_avg"] / corrections[0]
        direction = momentum / ((state["exp_avg_sq"] / corrections[1]).sqrt_() + group["adam_eps"])
        is_due = (state["step"] - 1) % group["precondition_frequency"] == 0
        parts = zip(
            blocks(gradient, group["max_dim"]),
            blocks(momentum, group["max_dim"]),
            blocks(direction, group["max_dim"]),
            state["factors"],
            state["roots"],
            strict=True,
        )
        for block, momentum_block, adam, factors, roots in parts:
            for dim, factor in enumerate(factors):
                unfolded = block.movedim(dim, 0).reshape(len(factor), -1)
                factor.lerp_(unfolded @ unfolded.T, 1 - beta2)
                if is_due:
                    root = inverse_root(factor / corrections[1], 2 * len(factors), group["eps"])
                    if root is not None:
                        roots[dim].copy_(root)
            shampoo = preconditioned(momentum_block, roots)
            length = shampoo.norm()
            adam.copy_(torch.where(length > 0, shampoo * (adam.norm() / length), shampoo))  # in `direction`
        return direction


def merged(shape: Sequence[int], max_dim: int) -> list[int]:
    """A shape with neighbouring dimensions multiplied as long as they stay within `max_dim`; sides of 1 vanish."""
    sides: list[int] = []
    for side in shape:
        if sides and sides[-1] * side <= max_dim:
            sides[-1] *= side
        else:
            sides.append(side)
    return [side for side in sides if side > 1] or [1]


def blocks(tensor: Tensor, max_dim: int) -> Iterator[Tensor]:
    """Views of a tensor cut along each dimension into pieces of at most `max_dim`."""
    pieces = [tensor]
    for dim in range(tensor.dim()):
        pieces = [part for piece in pieces for part in piece.split(max_dim, dim)]
    yield from pieces


def preconditioned(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A tensor multiplied by a symmetric matrix along each dimension."""
    for matrix in matrices:  # each product moves its dimension to the end, and the next one to the front
        tensor = torch.tensordot(tensor, matrix, dims=([0], [0]))
    return tensor


def inverse_root(matrix: Tensor, order: int, eps: float) -> Tensor | None:
    """(matrix + eps I)^(-1/order) of a positive semi-definite matrix, in double precision where single fails.

    None where double precision fails, too: the root of before then stands, as in the authors' own code.
    """
    for precise in (matrix, matrix.double()):
        try:
            values, vectors = torch.linalg.eigh(precise)
        except torch.linalg.LinAlgError:
            continue
        values = values - values.min().clamp(max=0.0) + eps
        root = ((vectors * values.pow(-1.0 / order)) @ vectors.T).to(matrix.dtype)
        # Where most rows are zero, as of a table with rare words, NaN may come back without an error.
        if root.isfinite().all():
            return root
    return None
