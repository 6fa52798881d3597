"""A model with data, and the data and losses that several of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A model with data.

    Attributes:
        build: makes the model.
        batch: makes one batch.
        loss: of the model on a batch.
        capture: of a batch: arguments of `KFAC.capture`.
        fresh: whether each step has a batch of its own, so that losses are of examples not seen before; else few
            batches come again and again.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Any]]
    loss: Loss
    capture: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda batch: {}
    fresh: bool = False


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of models that compute it themselves."""
    return model(**batch).loss


def classified(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def tokens(vocabulary: int = 64, examples: int = 8, length: int = 16) -> Tensor:
    return torch.randint(3, vocabulary, (examples, length))


def language() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def pictures(size: int = 32, classes: int = 10) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(8, 3, size, size), "labels": torch.randint(classes, (8,))}


def raw_pictures(size: int = 32) -> dict[str, Tensor]:
    given = pictures(size)
    return {"x": given["pixel_values"], "labels": given["labels"]}
