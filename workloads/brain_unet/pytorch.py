"""brain_unet in PyTorch: its U-Net."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from submissions.common.api import Batch, Tree
from workloads.brain_unet.task import BrainUnetTask
from workloads.pytorch.workload import PyTorchWorkload

Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, Activation] = {"leaky_relu": lambda x: F.leaky_relu(x, 0.2), "tanh": torch.tanh}
_TRUNCATED = 0.87962566103423978  # standard deviation of a normal distribution cut at two standard deviations


class ConvBlock(nn.Module):
    """Twice a 3 x 3 convolution, a norm, the activation and a dropout of channels, over (N, C, H, W)."""

    def __init__(self, channels_in: int, channels: int, activation: Activation, *, layer_norm: bool) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = _norm(channels, layer_norm=layer_norm)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(channels, layer_norm=layer_norm)

    def forward(self, x: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = F.dropout2d(self.activation(norm(conv(x))), dropout_rate, self.training)
        return x


class UpBlock(nn.Module):
    """A 2 x 2 transposed convolution of stride 2, instance norm and the activation: twice the resolution.

    It has instance norm in every variant, as AlgoPerf's.
    """

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2, bias=False)
        self.norm = nn.InstanceNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x)))


class UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) as AlgoPerf's fastmri has it.

    Args:
        pools: how often the resolution is halved, and doubled again.
        channels: of the highest resolution; twice as many after every pooling.
        activation: between the layers.
        layer_norm: whether convolutions are followed by layer norm with a scale and a bias for each channel, in
            place of instance norm without parameters.
    """

    def __init__(self, pools: int, channels: int, activation: Activation, *, layer_norm: bool) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(pools)]

        def block(channels_in: int, channels: int) -> ConvBlock:
            return ConvBlock(channels_in, channels, activation, layer_norm=layer_norm)

        self.down = nn.ModuleList(block(*pair) for pair in zip([1, *widths], widths, strict=False))
        self.bottom = block(widths[-1], 2 * widths[-1])
        self.up = nn.ModuleList(UpBlock(width, activation) for width in reversed(widths))
        self.merge = nn.ModuleList(block(2 * width, width) for width in reversed(widths))
        self.output = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                _initialise(module)

    def forward(self, images: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """Images (N, H, W) of images (N, H, W); both sides are divisible by 2**pools."""
        x = images[:, None]
        skipped = []
        for block in self.down:
            x = block(x, dropout_rate)
            skipped.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.bottom(x, dropout_rate)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skipped.pop()], dim=1), dropout_rate)
        return self.output(x)[:, 0]


def _norm(channels: int, *, layer_norm: bool) -> nn.Module:
    return nn.GroupNorm(1, channels, eps=1e-6) if layer_norm else nn.InstanceNorm2d(channels)


def _initialise(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Weights of variance 1 / fan_in, normal and cut at two standard deviations, as flax's default."""
    fan_in = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    std = fan_in**-0.5 / _TRUNCATED
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)


class BrainUnetWorkload(PyTorchWorkload, BrainUnetTask):
    """See `BrainUnetTask`; inputs, targets and outputs are (N, 64, 64)."""

    def build_model(self) -> nn.Module:
        return UNet(self.pools, self.channels, ACTIVATIONS[self.activation], layer_norm=self.layer_norm)

    def evaluation_of(self, logits: Tree, batch: Batch) -> dict[str, torch.Tensor]:
        return {"outputs": logits, **{key: value for key, value in batch.items() if key != "inputs"}}
