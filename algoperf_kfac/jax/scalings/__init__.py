"""What is applied to the momentum, given the factors: each file one way, its name that of `KFACConfig.scaling`.

A new scaling is a file beside this one, with a class `Scaling` derived from that of `_base.py`.
"""

from __future__ import annotations

import importlib

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.scalings._base import Kept, Operators, Scaling

__all__ = ["Kept", "Operators", "Scaling", "scaling_of"]


def scaling_of(config: KFACConfig) -> Scaling:
    """The scaling that a configuration asks for, by name or by class."""
    room = config.scaling_room
    if isinstance(room, str):
        room = importlib.import_module(f"{__name__}.{room}").Scaling
    scaling: Scaling = room(config)
    return scaling
