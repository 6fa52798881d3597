"""The preconditioned direction with the Kronecker product written out, power and damping included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from algoperf_kfac.pytorch import FactorPair


def blocks_of(factor: Tensor | tuple[Tensor, ...], groups: int) -> list[Tensor]:
    """A list of (groups, size, size) diagonal blocks; empty for the identity."""
    parts = factor if isinstance(factor, tuple) else (factor,)
    return [m.reshape(groups, m.shape[-1], m.shape[-1]) for m in parts]


def mean_eigenvalue(blocks: list[Tensor], group: int) -> float:
    if not blocks:
        return 1.0
    return float(sum(m[group].trace() for m in blocks)) / sum(m.shape[-1] for m in blocks)


def damped(blocks: list[Tensor], group: int, damping: float, dim: int) -> Tensor:
    """The whole factor plus its damping; the identity, undamped, where there are no blocks."""
    if not blocks:
        return torch.eye(dim)
    return torch.block_diag(*(m[group] for m in blocks)) + damping * torch.eye(dim)


def norm(blocks: list[Tensor], group: int) -> float:
    return math.sqrt(sum(float(m[group].square().sum()) for m in blocks))


def direction(pair: FactorPair, g: Tensor, damping: float, mode: str, power: float, least: float = 0.0) -> Tensor:
    """kron(B + l_B I, A + l_A I)^power vec(G) for G (groups, P_out, P_in), by a dense eigendecomposition.

    Dampings are at least `least` times the Frobenius norms.
    """
    groups, p_out, p_in = g.shape
    a, b = (blocks_of(factor, groups) for factor in pair)
    out = []
    for group in range(groups):
        mean_a, mean_b = mean_eigenvalue(a, group), mean_eigenvalue(b, group)
        if mode == "relative":
            lambda_a, lambda_b = damping * mean_a, damping * mean_b
        else:
            pi = math.sqrt(mean_a / mean_b)
            lambda_a, lambda_b = pi * math.sqrt(damping), math.sqrt(damping) / pi
        lambda_a, lambda_b = max(lambda_a, least * norm(a, group)), max(lambda_b, least * norm(b, group))
        product = torch.kron(damped(b, group, lambda_b, p_out), damped(a, group, lambda_a, p_in))
        vector = g[group].flatten()
        if power == -1:
            solved = torch.linalg.solve(product, vector)
        else:
            values, vectors = torch.linalg.eigh(product)
            solved = vectors @ (values**power * (vectors.T @ vector))
        out.append(solved.reshape(p_out, p_in))
    return torch.stack(out)
