"""Ways to scale the momentum by the curvature.

A new one is a file here with a class `Scaling`, and has the file's name.
"""

from __future__ import annotations

import importlib

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.pytorch.scalings._base import Operators, Scaling, by_group


def scaling_of(config: KFACConfig) -> Scaling:
    """The scaling that a configuration asks for."""
    room = config.scaling_room
    if isinstance(room, str):
        room = importlib.import_module(f"{__name__}.{room}").Scaling
    scaling: Scaling = room(config)
    return scaling


__all__ = ["Operators", "Scaling", "by_group", "scaling_of"]
