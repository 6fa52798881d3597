"""bible_lm in JAX."""

from __future__ import annotations

import flax.linen as nn

from workloads.bible_lm import workload as base
from workloads.bible_lm.jax.model import LanguageModel
from workloads.data import bible
from workloads.jax.workload import JaxWorkload


class BibleLmWorkload(JaxWorkload, base.BaseBibleLmWorkload):
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
