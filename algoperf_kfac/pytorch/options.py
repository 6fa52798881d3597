"""What a capture is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch.nn.parallel import DistributedDataParallel

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.positions import Candidates
from algoperf_kfac.pytorch.pending import Pending
from algoperf_kfac.pytorch.taps import Taps


@dataclasses.dataclass(frozen=True)
class Options:
    """What a capture is to do.

    Attributes:
        config: the configuration.
        active: whether this is a statistics step; if not, nothing is watched and entering costs nothing.
        positions: which positions count and to which example they belong.
        generator: gives the one of the label draws of fisher="mc", asked for behind the forward pass.
        checks: whether to compare what was captured with the weights' gradients.
        before_backward: called ahead of the first backward pass for parameters, with whether it adds to the
            gradients that are there.
        after_backward: called after every backward pass that adds to the parameters' gradients.
        meet: told which DistributedDataParallel modules were at work so far.
        pending: the statistics that the capture adds to; knows of captures that are open.
        taps: what takes the statistics of layers within compiled graphs; None to run those uncompiled.
    """

    config: KFACConfig
    active: bool
    positions: Candidates
    generator: Callable[[], torch.Generator | None] = lambda: None
    checks: bool = False
    before_backward: Callable[[bool], None] = lambda adds: None
    after_backward: Callable[[], None] = lambda: None
    meet: Callable[[Iterable[DistributedDataParallel]], None] = lambda seen: None
    pending: Pending = dataclasses.field(default_factory=Pending)
    taps: Taps | None = None
