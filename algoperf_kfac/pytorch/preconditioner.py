"""What a layer keeps: moving averages of A and B, and what a refresh made of them; damping, and products.

`refresh` decomposes the averages, a scaling (`scalings`) makes of that what a gradient is multiplied by. Factors
are lists of diagonal blocks, usually one; an empty list stands for the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

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
        vanished: share of the output features for which the identity stands for B, as their gradients sum to zero
            over positions, at the last statistics step; a scalar tensor.
        rounding: the coarsest eps among the dtypes that inputs and output gradients came in so far.
        a_basis, b_basis: eigenbases ("eigen") or inverses ("inverse"); empty before the first refresh, and after it
            where the scaling does not keep them (`Scaling.keeps_bases`).
        a_values, b_values: damped eigenvalues, (groups, size) per block; "eigen" only.
        a_operator, b_operator: what the momentum is multiplied by, for scalings that use them; made of the bases
            and values (`Scaling.operators`).
        kept: what the scaling keeps beside them, by name.
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
    vanished: Tensor
    a_basis: list[Tensor] = dataclasses.field(default_factory=list)
    b_basis: list[Tensor] = dataclasses.field(default_factory=list)
    a_values: list[Tensor] = dataclasses.field(default_factory=list)
    b_values: list[Tensor] = dataclasses.field(default_factory=list)
    a_operator: list[Tensor] = dataclasses.field(default_factory=list)
    b_operator: list[Tensor] = dataclasses.field(default_factory=list)
    kept: dict[str, Tensor | int] = dataclasses.field(default_factory=dict)
    rounding: float = 0.0
    refreshes: int = 0
    failures: int = 0
    skipped: int = 0
    drift: float = 0.0

    @classmethod
    def zeros(cls, spec: LayerSpec, like: Tensor, kept: dict[str, Tensor | int]) -> LayerState:
        """Averages at zero: starting at the identity would bias the early steps.

        Args:
            spec: the layer.
            like: dtype and device of the factors.
            kept: what the scaling keeps.
        """

        def blocks(sizes: tuple[int, ...]) -> list[Tensor]:
            return [like.new_zeros(spec.groups, size, size) for size in sizes]

        return cls(
            blocks(spec.in_blocks),
            blocks(spec.out_blocks),
            like.new_zeros(()),
            like.new_zeros(()),
            like.new_zeros(()),
            like.new_zeros(()),
            kept=kept,
        )

    def move(self, dtype: torch.dtype, device: torch.device) -> None:
        """Bring the tensors to a dtype and a device, where the model was moved."""
        if self.weight.dtype == dtype and self.weight.device == device:
            return

        def moved(value: object) -> object:
            return value.to(device=device, dtype=dtype) if isinstance(value, Tensor) else value

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                setattr(self, field.name, {key: moved(v) for key, v in value.items()})
            else:
                setattr(self, field.name, [moved(v) for v in value] if isinstance(value, list) else moved(value))

    def corrected(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B per example, the bias of the averages corrected."""
        scale = 1 / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)
        return [m * scale for m in self.a], [m * scale for m in self.b]

    def noise_level(self, config: KFACConfig) -> float:
        """See `KFACConfig.noise_level`; rounding of the factors themselves is part of it."""
        return config.noise_level(max(self.rounding, torch.finfo(self.weight.dtype).eps))


def move_averages(
    states: Sequence[LayerState],
    averages: Sequence[tuple[list[Tensor], list[Tensor]]],
    examples: Sequence[Tensor | float],
    decay: float,
) -> None:
    """Move layers' averages towards the statistics of one step; of a layer with non-finite statistics they stay.

    So they do at a step without examples, where no position counted (`Positions.mask`).

    Args:
        states: of the layers.
        averages: their A and B per example, of this step.
        examples: how many there were.
        decay: of the averages.
    """
    alike: dict[Hashable, list[tuple[LayerState, list[Tensor], Tensor]]] = {}
    for state, (a, b), count in zip(states, averages, examples, strict=True):
        like = state.weight
        number = count.to(like) if isinstance(count, Tensor) else like.new_full((), count)
        alike.setdefault((like.dtype, like.device, len(a) + len(b)), []).append((state, [*a, *b], number))
    for group in alike.values():
        _move_alike([state for state, _, _ in group], [m for _, m, _ in group], [n for _, _, n in group], decay)


def _move_alike(
    states: list[LayerState], matrices: list[list[Tensor]], examples: list[Tensor], decay: float
) -> None:
    """Of layers of one dtype, device and number of blocks, so that a few calls serve all."""
    new = [m for blocks in matrices for m in blocks]
    old = [m for state in states for m in (*state.a, *state.b)]
    finite = torch.stack(torch._foreach_norm(new)).view(len(states), -1).sum(1).isfinite()
    rates = torch.where(finite, 1 - decay, 0.0).to(states[0].weight.dtype)
    each, per_block = rates.unbind(), len(matrices[0])
    ok = [flag for flag in finite.unbind() for _ in range(per_block)]
    kept = [torch.where(flag, m, average) for flag, m, average in zip(ok, new, old, strict=True)]
    torch._foreach_lerp_(old, kept, [rate for rate in each for _ in range(per_block)])
    numbers = torch.stack(examples)
    counted = torch.where(finite, numbers, torch.stack([state.examples for state in states])).unbind()
    torch._foreach_lerp_([state.examples for state in states], list(counted), list(each))
    ones = torch.ones_like(rates).unbind()
    torch._foreach_lerp_([state.weight for state in states], list(ones), list(each))
    dropped = (~finite & (numbers != 0)).to(rates.dtype)
    torch._foreach_add_([state.dropped for state in states], list(dropped.unbind()))


def mean_eigenvalue(blocks: list[Tensor]) -> Tensor:
    """(groups,): trace divided by dimension, over the blocks of a factor."""
    trace = torch.stack([m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in blocks]).sum(0)
    return trace / sum(m.shape[-1] for m in blocks)


def damping_terms(
    a: list[Tensor], b: list[Tensor], config: KFACConfig, noise_level: float, multiple: float = 1.0
) -> tuple[Tensor, Tensor]:
    """lambda_A and lambda_B, (groups,) each; see `KFACConfig.damping` and `KFACConfig.floor`.

    Args:
        a, b: corrected blocks of the factors.
        config: the configuration.
        noise_level: of the layer, see `KFACConfig.noise_level`.
        multiple: of the configured damping.
    """
    damping = config.damping * multiple
    one = (a or b)[0].new_ones((a or b)[0].shape[0])
    mean_a = mean_eigenvalue(a).clamp(min=MEAN_FLOOR) if a else one
    mean_b = mean_eigenvalue(b).clamp(min=MEAN_FLOOR) if b else one
    if config.damping_mode == "relative":
        damping_a, damping_b = damping * mean_a, damping * mean_b
    else:
        pi = (mean_a / mean_b).sqrt()
        damping_a, damping_b = pi * damping**0.5, damping**0.5 / pi
    floor = config.floor * noise_level
    if not floor:
        return damping_a, damping_b
    damping_a = damping_a.maximum(floor * frobenius_norm(a)) if a else damping_a
    return damping_a, damping_b.maximum(floor * frobenius_norm(b)) if b else damping_b


def frobenius_norm(blocks: list[Tensor]) -> Tensor:
    """(groups,): of a factor, over its blocks. At least its largest eigenvalue; hardly more if few are large."""
    return torch.stack([torch.linalg.matrix_norm(m) for m in blocks]).norm(dim=0)


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
