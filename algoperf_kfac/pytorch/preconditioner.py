"""From the factors A and B to a preconditioned gradient: averages, damping, application; `refresh` decomposes.

For a layer's gradient G as a matrix (P_out x P_in), per channel group,

    inverse:              (B + l_B I)^-1 G (A + l_A I)^-1
    eigen, power p:       U_B [ (U_B^T G U_A) / ((b + l_B)(a + l_A)^T)^p ] U_A^T
    eigen, second_moment: U_B [ (U_B^T M U_A) / sqrt(v) ] U_A^T,  v the second moment of U_B^T G U_A

with B = U_B diag(b) U_B^T and A = U_A diag(a) U_A^T. Factors are lists of diagonal blocks, usually one; an empty
list stands for the identity.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec

# Least mean eigenvalue assumed for damping: a channel group whose factor is zero still decomposes with the others.
MEAN_FLOOR = 1e-15


@dataclasses.dataclass
class LayerState:
    """Statistics and preconditioner of one layer.

    Attributes:
        a, b: moving averages of A and of B per example (block lists of (groups, size, size)), not corrected.
        weight: what the averages are divided by to correct their bias, a scalar tensor.
        examples: moving average of the number of examples, not corrected.
        dropped: how many statistics were left out because they were not finite, a scalar tensor.
        a_basis, b_basis: eigenbases ("eigen") or inverses ("inverse"); empty before the first refresh.
        a_values, b_values: damped eigenvalues, (groups, size) per block; "eigen" only.
        a_operator, b_operator: what the momentum is multiplied by, unless a second moment is needed; they follow
            from the fields above (`set_operators`).
        second_moment: (groups, P_out, P_in) for scaling="second_moment".
        second_moment_steps: updates of `second_moment`.
        refreshes: successful refreshes so far.
        failures: failed decompositions so far, retries included.
        skipped: refreshes that kept the basis because it had not drifted.
        drift: off-diagonal share of the factors in the old basis at the last refresh.
    """

    a: list[Tensor]
    b: list[Tensor]
    weight: Tensor
    examples: Tensor
    dropped: Tensor
    a_basis: list[Tensor] = dataclasses.field(default_factory=list)
    b_basis: list[Tensor] = dataclasses.field(default_factory=list)
    a_values: list[Tensor] = dataclasses.field(default_factory=list)
    b_values: list[Tensor] = dataclasses.field(default_factory=list)
    a_operator: list[Tensor] = dataclasses.field(default_factory=list)
    b_operator: list[Tensor] = dataclasses.field(default_factory=list)
    second_moment: Tensor | None = None
    second_moment_steps: int = 0
    refreshes: int = 0
    failures: int = 0
    skipped: int = 0
    drift: float = 0.0

    @classmethod
    def zeros(cls, spec: LayerSpec, like: Tensor) -> LayerState:
        """Averages at zero: starting at the identity would bias the early steps."""

        def blocks(sizes: tuple[int, ...]) -> list[Tensor]:
            return [like.new_zeros(spec.groups, size, size) for size in sizes]

        return cls(
            blocks(spec.in_blocks),
            blocks(spec.out_blocks),
            like.new_zeros(()),
            like.new_zeros(()),
            like.new_zeros(()),
        )

    def update(self, a: list[Tensor], b: list[Tensor], examples: Tensor | float, decay: float) -> None:
        """Move the averages towards the statistics of one step; non-finite statistics are left out.

        So is a step without examples, where no position counted (`Positions.mask`).
        """
        examples = torch.as_tensor(examples).to(self.examples)
        finite = torch.stack(torch._foreach_norm([*a, *b])).sum().isfinite()
        rate = torch.where(finite, 1 - decay, 0.0).to(self.weight.dtype)
        for average, new in zip([*self.a, *self.b], [*a, *b], strict=True):
            average.lerp_(torch.where(finite, new, average), rate)
        self.examples.lerp_(examples, rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)
        self.dropped += (~finite & (examples > 0)).to(self.dropped.dtype)

    def corrected(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B per example, the bias of the averages corrected."""
        scale = 1 / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)
        return [m * scale for m in self.a], [m * scale for m in self.b]


def mean_eigenvalue(blocks: list[Tensor]) -> Tensor:
    """(groups,): trace divided by dimension, over the blocks of a factor."""
    trace = torch.stack([m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in blocks]).sum(0)
    return trace / sum(m.shape[-1] for m in blocks)


def damping_terms(
    a: list[Tensor], b: list[Tensor], config: KFACConfig, multiple: float = 1.0
) -> tuple[Tensor, Tensor]:
    """lambda_A and lambda_B, (groups,) each; see `KFACConfig.damping`."""
    damping = config.damping * multiple
    one = (a or b)[0].new_ones((a or b)[0].shape[0])
    mean_a = mean_eigenvalue(a).clamp(min=MEAN_FLOOR) if a else one
    mean_b = mean_eigenvalue(b).clamp(min=MEAN_FLOOR) if b else one
    if config.damping_mode == "relative":
        return damping * mean_a, damping * mean_b
    pi = (mean_a / mean_b).sqrt()
    return pi * damping**0.5, damping**0.5 / pi


def set_operators(state: LayerState, config: KFACConfig) -> None:
    """Derive the operators: scaling by eigenvalues is separable, so that U f(b) U^T is formed once per refresh
    and a step costs two products per layer instead of four."""
    if config.preconditioner == "inverse":
        state.a_operator, state.b_operator = state.a_basis, state.b_basis
    elif config.scaling != "second_moment":
        state.a_operator, state.b_operator = (
            [
                (u * v.pow(-config.exponent).unsqueeze(1)) @ u.transpose(1, 2)
                for u, v in zip(bases, values, strict=True)
            ]
            for bases, values in ((state.a_basis, state.a_values), (state.b_basis, state.b_values))
        )


def multiply(
    left: list[Tensor],
    m: Tensor,
    right: list[Tensor],
    *,
    transpose_left: bool = False,
    transpose_right: bool = False,
) -> Tensor:
    """diag(left) m diag(right) with block-diagonal matrices; an empty list is the identity.

    Args:
        left: blocks (groups, b, b) whose sizes sum to P_out.
        m: (groups, P_out, P_in).
        right: blocks whose sizes sum to P_in.
        transpose_left: transpose the left blocks.
        transpose_right: transpose the right blocks.
    """
    if transpose_left:
        left = [block.transpose(1, 2) for block in left]
    if transpose_right:
        right = [block.transpose(1, 2) for block in right]
    if len(left) == 1:
        m = left[0] @ m
    elif left:
        parts = m.split([block.shape[-1] for block in left], 1)
        m = torch.cat([block @ part for block, part in zip(left, parts, strict=True)], 1)
    if len(right) == 1:
        m = m @ right[0]
    elif right:
        parts = m.split([block.shape[-1] for block in right], 2)
        m = torch.cat([part @ block for block, part in zip(right, parts, strict=True)], 2)
    return m


def precondition(state: LayerState, momentum: Tensor, grad: Tensor, config: KFACConfig, beta2: float) -> Tensor:
    """The preconditioned direction of one layer.

    Args:
        state: the layer's state; its second moment is updated where the scaling uses one.
        momentum: (groups, P_out, P_in), what is preconditioned.
        grad: (groups, P_out, P_in), the step's gradient, for the second moment.
        config: the configuration.
        beta2: decay of the second moment.

    Returns:
        (groups, P_out, P_in); `momentum` itself before the first successful refresh.
    """
    if not state.refreshes:
        return momentum
    if config.preconditioner == "inverse" or config.scaling != "second_moment":
        return multiply(state.b_operator, momentum, state.a_operator)

    def rotate(m: Tensor) -> Tensor:
        return multiply(state.b_basis, m, state.a_basis, transpose_left=True)

    if state.second_moment is None:
        state.second_moment = torch.zeros_like(grad)
    state.second_moment.lerp_(rotate(grad).square(), 1 - beta2)
    state.second_moment_steps += 1
    v = state.second_moment / (1 - beta2**state.second_moment_steps)
    # The floor keeps the noise of null-space directions from being scaled up to full steps.
    floor = config.damping * v.mean((1, 2), keepdim=True)
    scaled = rotate(momentum) / (v + floor).sqrt().clamp(min=torch.finfo(v.dtype).tiny)
    return multiply(state.b_basis, scaled, state.a_basis, transpose_right=True)
