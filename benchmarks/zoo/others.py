"""Models of timm and of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac import Positions
from benchmarks.zoo.exhibit import Exhibit, classified, raw_pictures


def of_timm(name: str, size: int = 32, **options: Any) -> Callable[[], Exhibit]:
    def exhibit() -> Exhibit:
        import timm

        def build() -> nn.Module:
            return timm.create_model(name, num_classes=10, **options)

        return Exhibit(build, lambda: raw_pictures(size), classified)

    return exhibit


def gcn() -> Exhibit:
    from torch_geometric.nn import GCN

    def batch() -> dict[str, Tensor]:
        return {
            "x": torch.randn(64, 16), "edge_index": torch.randint(64, (2, 256)), "labels": torch.randint(5, (64,)),
        }  # fmt: skip

    def loss(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(given["x"], given["edge_index"]), given["labels"])

    return Exhibit(lambda: GCN(16, 32, 3, 5), batch, loss)


def gin() -> Exhibit:
    from torch_geometric.nn import GIN, global_mean_pool

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = GIN(16, 32, 3), nn.Linear(32, 5)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            return self.head(global_mean_pool(self.body(x, edge_index), batch, 16))

    def batch() -> dict[str, Tensor]:
        graph = torch.arange(16).repeat_interleave(8)
        edges = torch.randint(8, (2, 512)) + 8 * torch.randint(16, (512,))
        return {"x": torch.randn(128, 16), "edge_index": edges, "batch": graph, "labels": torch.randint(5, (16,))}

    def loss(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(given["x"], given["edge_index"], given["batch"]), given["labels"])

    return Exhibit(
        Graphs, batch, loss, lambda given: {"positions": Positions(segment_ids=given["batch"], num_segments=16)}
    )
