"""Descriptions of positions without their masks: what compiled graphs are made for, and what each step brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from algoperf_kfac.positions import Candidates, Positions

# Of one description: the number of its mask, or "gradient", or None; batch_dim; readout.
_Form = tuple[int | str | None, int | None, str]
Forms = tuple[tuple[str, tuple[_Form, ...]], ...]  # by pattern
_WHOLE = ""  # the pattern of descriptions for the whole model


def apart(candidates: Candidates) -> tuple[Forms, list[Tensor]] | None:
    """Descriptions of positions without their masks, and these; None where they have segments, or no tensors."""
    masks: list[Tensor] = []
    by_pattern = candidates if isinstance(candidates, Mapping) else {_WHOLE: candidates}
    forms = []
    for pattern, own in by_pattern.items():
        described: list[_Form] = []
        for one in own:
            mask: int | str | None = one.mask if isinstance(one.mask, str) else None
            if one.segment_ids is not None or (one.array_mask is not None and not isinstance(one.mask, Tensor)):
                return None
            if isinstance(one.mask, Tensor):
                mask = len(masks)
                masks.append(one.mask)
            described.append((mask, one.batch_dim, one.readout))
        forms.append((pattern, tuple(described)))
    return tuple(forms), masks


def together(forms: Forms, masks: Sequence[Tensor]) -> Candidates:
    """The inverse of `apart`."""
    by_pattern: dict[str, list[Positions]] = {}
    for pattern, described in forms:
        by_pattern[pattern] = [
            Positions(mask=masks[mask] if isinstance(mask, int) else mask, batch_dim=batch_dim, readout=readout)
            for mask, batch_dim, readout in described
        ]
    return by_pattern.get(_WHOLE, []) if set(by_pattern) <= {_WHOLE} else by_pattern
