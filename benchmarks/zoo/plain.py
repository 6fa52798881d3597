"""Models that need torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.exhibit import Exhibit, classified


class UNet(nn.Module):
    """Two levels, group norm, transposed convolutions on the way up."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.first, self.second = self.block(3, width), self.block(width, 2 * width)
        self.bottom = self.block(2 * width, 4 * width)
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.back_second, self.back_first = self.block(4 * width, 2 * width), self.block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(fan_in: int, fan_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.GroupNorm(4, fan_out), nn.ReLU(),
            nn.Conv2d(fan_out, fan_out, 3, padding=1), nn.GroupNorm(4, fan_out), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        second = self.back_second(torch.cat([second, self.up_second(bottom)], 1))
        return self.head(self.back_first(torch.cat([first, self.up_first(second)], 1)))


def unet() -> Exhibit:
    def batch() -> dict[str, Tensor]:
        return {"x": torch.randn(4, 3, 16, 16), "labels": torch.randint(4, (4, 16, 16))}

    return Exhibit(UNet, batch, classified)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


def encoder() -> Exhibit:
    return Exhibit(Encoder, lambda: {"x": torch.randn(8, 16, 32), "labels": torch.randint(10, (8,))}, classified)


class Recurrent(nn.Module):
    """Two layers of a GRU with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(32, 32, num_layers=2, dropout=0.1, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0].mean(1))


def gru() -> Exhibit:
    return Exhibit(Recurrent, encoder().batch, classified)
