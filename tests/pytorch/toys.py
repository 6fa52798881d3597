"""Small models, and what the tests do with them: one statistics step, a few training steps, comparisons."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, FactorPair

Batch = tuple[Tensor, Tensor]

# A factor of which every statistic shows: no grafting hides a wrong scale of B, no relative damping either.
SCALE_SENSITIVE = {"grafting": False, "damping_mode": "absolute", "scaling": "inverse", "damping": 1e-2}


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers 0, 2, 4, ... with activations in between."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def dense_factors(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, FactorPair]:
    """Of two linear layers that are called once for each example, with a tanh in between."""
    hidden = torch.tanh(model[0](x)).detach()
    inner = model[0](x).detach().requires_grad_()
    outer = model[2](torch.tanh(inner))
    gradients = torch.autograd.grad(F.cross_entropy(outer, y, reduction="sum"), (inner, outer))
    found = {}
    for name, inputs, g in zip(("0", "2"), (x, hidden), gradients, strict=True):
        a = torch.cat([inputs, torch.ones(len(x), 1)], dim=1)
        found[name] = FactorPair(a.T @ a / len(x), g.T @ g / len(x))
    return found


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Patches(nn.Module):
    """A token mixer in small: patch convolution, position embedding, a residual block, pooling, head."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(4, width))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.position
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h.mean(1))


class Functional(nn.Module):
    """A convolution and a linear layer on raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.3 * torch.randn(4, 1, 3, 3))
        self.kernel_bias = nn.Parameter(torch.zeros(4))
        self.matrix = nn.Parameter(0.3 * torch.randn(3, 4))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.kernel, self.kernel_bias, stride=2).relu().mean((2, 3))
        return F.linear(h, weight=self.matrix) * self.scale


def images(count: int = 8, size: int = 8) -> Batch:
    return torch.randn(count, 1, size, size), torch.randint(3, (count,))


def vectors(count: int = 16, features: int = 5, classes: int = 3) -> Batch:
    return torch.randn(count, features), torch.randint(classes, (count,))


def capture_once(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, capture: dict[str, Any] | None = None, **options: Any
) -> KFAC:
    """An optimizer after one statistics step on `loss(model)`."""
    optimizer = KFAC(model, **options)
    with optimizer.capture(**(capture or {})):
        loss(model).backward()
    optimizer.step()
    return optimizer


def factors_of(model: nn.Module, loss: Callable[[nn.Module], Tensor], **options: Any) -> dict[str, FactorPair]:
    """Factors of one batch, for the loss averaged over examples; the model is left as it was."""
    return capture_once(copy.deepcopy(model), loss, **options).factors(reduction="mean")


def train(
    model: nn.Module, optimizer: KFAC, batches: Iterable[Batch], *, fisher_loss: str | None = None
) -> list[Tensor]:
    """One step per batch of cross-entropy; returns the losses."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        with optimizer.capture() as capture:
            outputs = model(x)
            if fisher_loss is not None:
                capture.backward_fisher(outputs, fisher_loss)
            loss = F.cross_entropy(outputs.flatten(0, -2), y.flatten())
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same_factors(
    got: dict[str, FactorPair], want: dict[str, FactorPair], names: dict[str, str] | None = None, **tolerance: float
) -> None:
    """The same layers with the same factors; `names` maps names in `got` to names in `want`."""
    names = names or {name: name for name in want}
    assert set(names) == set(got)
    assert set(names.values()) == set(want)
    assert got, "nothing was captured"
    for name, other in names.items():
        for factor, mine, theirs in zip("AB", got[name], want[other], strict=True):
            torch.testing.assert_close(
                mine, theirs, msg=lambda text, n=name, f=factor: f"factor {f} of {n}: {text}", **tolerance
            )


def assert_same_parameters(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    for (name, p), (_, q) in pairs:
        torch.testing.assert_close(p, q, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def assert_finite(model: nn.Module, optimizer: KFAC) -> None:
    for name, p in model.named_parameters():
        assert p.isfinite().all(), f"{name} is not finite"
    for name, pair in optimizer.factors().items():
        for m in pair:
            for block in m if isinstance(m, tuple) else (m,):
                assert block.isfinite().all(), f"a factor of {name} is not finite"


def reasons(optimizer: KFAC) -> dict[str, str]:
    """Why each parameter outside of K-FAC is there."""
    return {f.name: f.reason for f in optimizer.coverage().fallbacks}


def covered(optimizer: KFAC) -> set[str]:
    return {layer.name for layer in optimizer.coverage().layers}
