"""The sampled Fisher of CTC against the sum over every label sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from algoperf_kfac.pytorch.fisher import sampled_loss
from benchmarks.paper.ggn import relative_error


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    """Repetitions merged, then blanks (0) removed."""
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def fisher(logits: Tensor, frames: int) -> Tensor:
    """E_y[g g^T] with g the gradient of -log p(y) with respect to all logits, p(y) a sum over alignments."""
    classes = logits.shape[-1]
    logits = logits.detach().requires_grad_()
    log_probs = logits.log_softmax(-1)
    alignments: dict[tuple[int, ...], list[Tensor]] = {}
    for path in itertools.product(range(classes), repeat=frames):
        alignments.setdefault(collapse(path), []).append(sum(log_probs[t, c] for t, c in enumerate(path)))
    total = torch.zeros(logits.numel(), logits.numel())
    mass = 0.0
    for terms in alignments.values():
        log_p = torch.logsumexp(torch.stack(terms), 0)
        g = torch.autograd.grad(-log_p, logits, retain_graph=True)[0].flatten()
        total += log_p.detach().exp() * torch.outer(g, g)
        mass += float(log_p.detach().exp())
    assert abs(mass - 1) < 1e-12
    return total


def draws(logits: Tensor, paddings: Tensor, seed: int) -> Tensor:
    """(N, T C): gradients of the sampled loss, one draw per example."""
    logits = logits.clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    loss = sampled_loss((logits, paddings), "ctc_loss", generator=generator)
    return torch.autograd.grad(loss, logits)[0].flatten(1)


@pytest.mark.parametrize("valid", [4, 3], ids=["all frames", "a padded frame"])
def test_ctc_draws_have_the_exact_fisher_as_covariance(valid: int) -> None:
    """The error falls as 1/sqrt(samples), with nothing left over; padded frames get no gradient."""
    frames, classes, samples, chunk = 4, 3, 128_000, 1_000
    one = 1.5 * torch.randn(frames, classes)
    exact = fisher(one, valid)
    paddings = torch.zeros(samples, frames)
    paddings[:, valid:] = 1
    g = draws(one.expand(samples, frames, classes), paddings, seed=1)
    assert not g[:, valid * classes :].any()
    estimates = torch.stack([rows.T @ rows / chunk for rows in g.split(chunk)])
    few = sum(relative_error(m, exact) ** 2 for m in estimates) ** 0.5 / len(estimates) ** 0.5
    by_16 = estimates.reshape(-1, 16, *exact.shape).mean(1)
    many = sum(relative_error(m, exact) ** 2 for m in by_16) ** 0.5 / len(by_16) ** 0.5
    assert few < 0.1
    assert 2.5 < few / many < 6
    assert relative_error(estimates.mean(0), exact) < 0.01


def test_masked_examples_have_no_draws() -> None:
    logits = torch.randn(3, 4, 3).requires_grad_()
    mask = torch.tensor([1, 0, 1])
    loss = sampled_loss((logits, torch.zeros(3, 4)), "ctc_loss", mask)
    g = torch.autograd.grad(loss, logits)[0].abs().sum((1, 2))
    assert g[1] == 0
    assert (g[[0, 2]] > 0).all()
