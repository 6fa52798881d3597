"""What a factor that is wrong by a constant does to training, in float64 on a tiny model, to rounding.

With A' = c A and absolute damping, pi' = sqrt(c) pi (Martens and Grosse 2015, section 6.3), so that

    A' + pi' sqrt(d) I = c (A + pi sqrt(d/c) I)        B + sqrt(d) / pi' I = B + sqrt(d/c) / pi I

A wrong by c is damped by d/c in place of d, and its directions are c^-p as long (p the power; 1 for the inverse),
which a graft takes away. B wrong by c does the same. With relative damping all scales with the factor, and nothing
but the length is left. So summing inputs and gradients both in reduce (A too large by R^2), or taking means of both
(B too small by R^2), moves the best absolute damping by R^2 and does nothing to the best relative one.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.refresh import decompose
from algoperf_kfac.pytorch.scalings import Operators, Scaling, inverse, power

POSITIONS = 6  # R
EXAMPLES, WIDTH, CLASSES, STEPS = 32, 5, 3, 30
DAMPING = 1e-2
SCALINGS: dict[str, type[Scaling]] = {"inverse": inverse.Scaling, "power 3/4": power.Scaling}
# By what a factor is wrong: which, and the power of R.
MISTAKES = {"A, R": (1, 0), "A, R²": (2, 0), "A, 1/R": (-1, 0), "B, R²": (0, 2), "B, 1/R²": (0, -2)}


@dataclasses.dataclass(frozen=True)
class Seen:
    """Training with a wrong factor.

    Attributes:
        off: distance of its final weights to those of the right factors, relative to how far these moved.
        shifted: the same to the right factors with damping d/c.
    """

    off: float
    shifted: float


def wrong(base: type[Scaling], of_a: float, of_b: float) -> type[Scaling]:
    """A scaling that is shown A times one constant and B times another; the damping follows them."""

    class Wrong(base):  # type: ignore[misc, valid-type]  # any scaling that works by operators
        def operators(self, state: LayerState) -> Operators:
            a, b = [of_a * m for m in state.a], [of_b * m for m in state.b]
            shown = dataclasses.replace(state, a=a, b=b, a_basis=[], b_basis=[], a_values=[], b_values=[])
            (found,) = decompose([shown], base(self.config))
            shown.a_basis, shown.b_basis = found.a_basis, found.b_basis
            shown.a_values, shown.b_values = found.a_values, found.b_values
            operators: Operators = super().operators(shown)
            return operators

    return Wrong


def seen(scaling: str, mode: str, mistake: str, approximation: str) -> Seen:
    """Trains with right factors, with wrong ones, and with right ones at the damping that wrong ones amount to."""
    base, (of_a, of_b) = SCALINGS[scaling], MISTAKES[mistake]
    a, b = float(POSITIONS) ** of_a, float(POSITIONS) ** of_b
    start, right = _right(scaling, mode, DAMPING, approximation)
    _, off = trained(wrong(base, a, b), mode, DAMPING, approximation)
    _, shifted = _right(scaling, mode, DAMPING / (a * b), approximation)
    moved = (right - start).norm()
    return Seen(float((off - right).norm() / moved), float((off - shifted).norm() / moved))


@functools.cache
def _right(scaling: str, mode: str, damping: float, approximation: str) -> tuple[Tensor, Tensor]:
    return trained(SCALINGS[scaling], mode, damping, approximation)


def trained(scaling: type[Scaling], mode: str, damping: float, approximation: str) -> tuple[Tensor, Tensor]:
    """All weights before and after `STEPS` grafted steps on a tiny network over positions, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, CLASSES)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * draw(*parameter.shape))
    x, y = draw(EXAMPLES, POSITIONS, WIDTH), torch.arange(EXAMPLES) % CLASSES
    optimizer = KFAC(
        model,
        approximation=approximation,
        scaling=scaling,
        learning_rate=1e-2,
        damping=damping,
        damping_mode=mode,
        noise_floor=0.0,
        factor_interval=1,
        refresh_interval=1,
        length="graft",
    )
    start = _weights(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with optimizer.capture():
            F.cross_entropy(model(x).mean(1), y).backward()
        optimizer.step()
    return start, _weights(model)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
