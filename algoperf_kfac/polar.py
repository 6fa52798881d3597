"""The Newton-Schulz iteration to the polar factor as both frameworks run it: its numbers, and what it costs.

Of Z = U diag(s) V^T the polar factor is U V^T. An odd polynomial in Z, which takes products alone, acts on the
singular values and leaves their vectors:

    Z <- Z / |Z|_F,   then n times   Z <- a Z + (b Z Z^T + c (Z Z^T)^2) Z

with the coefficients of Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), chosen for their
slope at zero, which lifts small singular values by up to a^n, and not for convergence to 1. |Z|_F bounds the
largest singular value, so all of them start in [0, 1], and from there none leaves [0, 1.21]. After 5 steps those of
at least 0.0016 |Z|_F are in [0.68, 1.21], and none was lifted by more than 485.
"""

from __future__ import annotations

from algoperf_kfac.layers import LayerSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST = 0.0016  # relative to |Z|_F: singular values from here on end in `BAND`, after 5 steps
BAND = (0.68, 1.21)


def polar_flops(spec: LayerSpec, steps: int) -> float:
    """Flops of the iteration on a layer's matrices (P_out x P_in), n the smaller dimension and m the larger one.

    Z Z^T (of the shorter side) and the last product take 2 n^2 m each, the square 2 n^3.
    """
    n, m = sorted((spec.out_dim, spec.factor_in_dim))
    return float(steps * spec.groups * (4 * n**2 * m + 2 * n**3))
