"""bible_lm in PyTorch."""

from __future__ import annotations

import numpy as np
from torch import nn

from workloads.bible_lm import workload as base
from workloads.bible_lm.pytorch.model import LanguageModel
from workloads.data import bible
from workloads.pytorch.workload import PyTorchWorkload


class BibleLmWorkload(PyTorchWorkload, base.BaseBibleLmWorkload):
    """See `BaseBibleLmWorkload`; inputs, targets and weights are (N, 64), logits (N, 64, 71)."""

    def build_model(self) -> nn.Module:
        return LanguageModel(
            num_symbols=bible.NUM_SYMBOLS,
            length=bible.LENGTH,
            width=base.WIDTH,
            depth=base.DEPTH,
            heads=base.HEADS,
            hidden=base.MLP_WIDTH,
        )

    def prepare_inputs(self, inputs: np.ndarray) -> np.ndarray:
        return inputs
