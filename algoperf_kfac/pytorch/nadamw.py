"""NadamW: Adam with Nesterov momentum and decoupled weight decay, the reference optimizer of AlgoPerf.

The K-FAC optimizer takes `nesterov` and `nadamw_directions` for its fallback parameters and for grafting, so
that both optimizers differ in the direction alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def nadamw_directions(
    grads: list[Tensor],
    momenta: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    beta2: float,
    eps: float,
) -> list[Tensor]:
    """Update the second moments in place and return m_hat / (sqrt(v_hat) + eps) per tensor.

    v <- beta2 v + (1 - beta2) g^2,  v_hat = v / (1 - beta2^step)  (Kingma and Ba 2015).

    Args:
        grads: gradients g, any shapes.
        momenta: m_hat, shapes of `grads`, as `nesterov` returns them.
        exp_avg_sqs: second moments v, shapes of `grads`; updated in place.
        step: number of this update, from 1.
        beta2: decay of the second moment.
        eps: added to the root of the second moment; at least the least normal number of its type, as what float16
            rounds to zero would be divided by.
    """
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, [max(eps, torch.finfo(d.dtype).tiny) for d in denominators])
    return list(torch._foreach_div(momenta, denominators))


def nesterov(grads: list[Tensor], exp_avgs: list[Tensor], *, step: int, beta1: float) -> list[Tensor]:
    """Update the first moments in place and return the bias-corrected look-ahead momentum m_hat.

    m <- beta1 m + (1 - beta1) g,  m_hat = (beta1 m + (1 - beta1) g) / (1 - beta1^step)  (Dozat 2016).
    """
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    momenta = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(momenta, grads, alpha=1 - beta1)
    torch._foreach_div_(momenta, 1 - beta1**step)
    return list(momenta)


class NadamW(torch.optim.Optimizer):
    """NadamW over all parameters, with decoupled weight decay scaled by the learning rate.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, > 0 (0 allowed, as schedules end there).
        betas: decays of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: p <- (1 - lr * weight_decay) p before the update.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {beta}")
        if eps < 0 or weight_decay < 0:
            raise ValueError(f"eps and weight_decay must not be negative, got {eps} and {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; a closure is evaluated first, with gradients enabled, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.to_dense()  # moments and decay move every row anyway
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=0)
                self.state[p]["step"] += 1
            # Parameters that missed a gradient once lag behind in their bias correction.
            for step in sorted({self.state[p]["step"] for p in params}):
                now = [p for p in params if self.state[p]["step"] == step]
                grads = [p.grad for p in now]
                exp_avgs = [self.state[p]["exp_avg"] for p in now]
                directions = nadamw_directions(
                    grads,
                    nesterov(grads, exp_avgs, step=step, beta1=group["betas"][0]),
                    [self.state[p]["exp_avg_sq"] for p in now],
                    step=step,
                    beta2=group["betas"][1],
                    eps=group["eps"],
                )
                torch._foreach_mul_(now, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(now, directions, alpha=-group["lr"])
        return loss
