"""Factors through the library's public interface, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from algoperf_kfac.pytorch import KFAC, FactorPair
from algoperf_kfac.pytorch.operations import RULES, Operation


def examples(count: int) -> settings:
    """Property tests that are the same on every run and bounded in time."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def fisher_factors(
    model: nn.Module,
    x: Tensor,
    loss: str,
    approximation: str,
    *,
    fisher: str = "exact",
    positions: Any = None,
    reduction: str = "sum",
    **config: Any,
) -> dict[str, FactorPair]:
    """A and B of one batch under the exact (or Monte Carlo) Fisher."""
    optimizer = KFAC(model, approximation=approximation, fisher=fisher, **config)
    with optimizer.capture(positions) as capture:
        capture.backward_fisher(model(x), loss)
    optimizer.step()
    return optimizer.factors(reduction=reduction)


def empirical_factors(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    approximation: str,
    *,
    positions: Any = None,
    loss_normalizer: float | None = 1.0,
    reduction: str = "sum",
    **config: Any,
) -> dict[str, FactorPair]:
    """A and B of one batch from the gradients of `loss`, a function of the model's outputs (summed by default)."""
    optimizer = KFAC(model, approximation=approximation, learning_rate=0.0, **config)
    optimizer.zero_grad()
    with optimizer.capture(positions, loss_normalizer):
        loss(model(x)).backward()
    optimizer.step()
    return optimizer.factors(reduction=reduction)


def batched(pair: FactorPair) -> tuple[Tensor, Tensor]:
    """A and B with a leading group dimension."""
    a, b = (m if m.dim() == 3 else m.unsqueeze(0) for m in pair)
    return a, b


def assert_equal(pair: FactorPair, expected: FactorPair | tuple[Tensor, Tensor]) -> None:
    """Equal factors, up to rounding of float64."""
    for got, want in zip(batched(pair), batched(FactorPair(*expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12 * float(want.abs().max()))


def assert_covariance(m: Tensor) -> None:
    """Symmetric and positive semi-definite, up to rounding."""
    scale = float(m.abs().max()) + 1e-300
    torch.testing.assert_close(m, m.mT, rtol=0, atol=1e-13 * scale)
    assert torch.linalg.eigvalsh(m).min() > -1e-12 * scale * m.shape[-1]


class Operations(TorchFunctionMode):
    """Records every operation that the library has a rule for, with its output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Operation, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in RULES:
            self.seen.append((RULES[func](*args, **(kwargs or {})), output))
        return output
