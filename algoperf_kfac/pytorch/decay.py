"""Weight decay by parameter for PyTorch's optimizers, decoupled or as a prior's gradient; `online` derives both."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from algoperf_kfac.online import by_parameter
from algoperf_kfac.pytorch.discovery import unwrap


def set_weight_decay(
    optimizer: torch.optim.Optimizer, model: nn.Module, decays: Mapping[tuple[str, ...], float]
) -> None:
    """Give sets of parameters weight decays of their own.

    Groups whose parameters are in several sets are split, once: later calls with the same sets change numbers
    alone. Let the first call come before schedulers are made and states are loaded, which count groups.

    Args:
        optimizer: `KFAC`, or any other whose groups have a "weight_decay"; coupled where the optimizer's is.
        model: its model.
        decays: by names of parameters, from `OnlineEvidence.weight_decays`. Others keep what they have.

    Raises:
        ValueError: for a name that is no parameter of the model.
    """
    ids = _identities(model, by_parameter(decays))
    sets = {ids[name]: number for number, names in enumerate(decays) for name in names}
    values = list(decays.values())
    groups = []
    for group in optimizer.param_groups:
        parts: dict[int | None, set[int]] = {}
        for p in group["params"]:
            parts.setdefault(sets.get(id(p)), set()).add(id(p))
        for number, params in parts.items():
            # A group that stays whole stays itself: schedulers may hold it.
            own = group if len(parts) == 1 else {**group, **narrowed(group, params)}
            if number is not None:
                own["weight_decay"] = values[number]
            groups.append(own)
        if not parts:
            groups.append(group)
    optimizer.param_groups[:] = groups


def narrowed(group: Mapping[str, Any], kept: Set[int]) -> dict[str, list[Any]]:
    """The entries of a parameter group that go with its parameters, those of some of them.

    Args:
        group: a group of an optimizer, with or without "param_names".
        kept: identities of parameters.
    """
    places = [place for place, p in enumerate(group["params"]) if id(p) in kept]
    return {key: [group[key][place] for place in places] for key in ("params", "param_names") if key in group}


@torch.no_grad()
def add_prior_gradient(model: nn.Module, decays: Mapping[tuple[str, ...], float]) -> None:
    """Add w theta to the gradients that are there, between `backward` and `step`; the optimizer's own decay is 0.

    Args:
        model: the model.
        decays: by names of parameters, from `OnlineEvidence.weight_decays`.

    Raises:
        ValueError: for a name that is no parameter of the model.
    """
    single = by_parameter(decays)
    _identities(model, single)
    params = dict(unwrap(model).named_parameters())
    for name, decay in single.items():
        gradient = params[name].grad
        if gradient is not None:
            gradient.add_(params[name].to(gradient.dtype), alpha=decay)


def _identities(model: nn.Module, names: Mapping[str, float]) -> dict[str, int]:
    """Identities of parameters by name."""
    known = {name: id(p) for name, p in unwrap(model).named_parameters()}
    for name in names:
        if name not in known:
            raise ValueError(f"decays: {name!r} is no parameter of the model")
    return known
