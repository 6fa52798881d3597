"""Where output gradients sum to zero over positions: found on the statistics; see `algoperf_kfac.vanishing`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from algoperf_kfac.pytorch.factors import MaskedLayout
from algoperf_kfac.vanishing import largest_share


def example_squares(rows: Tensor, blocks: Sequence[int], layout: MaskedLayout) -> Tensor:
    """(N, R, groups, P) -> (examples, groups, blocks): squared norms of the features of each block of B."""
    parts = rows.split(list(blocks), -1)
    if layout.mask is None and layout.segment_ids is None:
        # Over both dimensions at once: of a convolution the features alone lie far apart.
        return torch.stack([torch.linalg.vector_norm(part, dim=(1, 3)) for part in parts], -1).square_()
    return layout.sum_positions(torch.stack([part.square().sum(-1) for part in parts], -1))


def without_vanishing(b: Sequence[Tensor], squares: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """B with a multiple of the identity in place of the blocks that are rounding.

    Args:
        b: blocks (groups, size, size), of gradients summed over positions.
        squares: (groups, blocks), the squared gradients themselves, summed.
        eps: of the dtype that they came in.

    Returns:
        The blocks, and the share of output features of those that were replaced, ().
    """
    found, replaced = [], []
    for block, total in zip(b, squares.unbind(-1), strict=True):
        size = block.shape[-1]
        vanishes = block.diagonal(dim1=-2, dim2=-1).sum(-1) <= largest_share(eps) * total
        vanishes &= total > 0  # without any gradient there is nothing to go by
        identity = torch.eye(size, dtype=block.dtype, device=block.device) * (total / size)[:, None, None]
        found.append(torch.where(vanishes[:, None, None], identity, block))
        replaced.append(size * vanishes.to(block.dtype).mean())
    return found, torch.stack(replaced).sum() / sum(block.shape[-1] for block in b)
