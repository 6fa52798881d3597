"""mnist_vit in PyTorch: its vision transformer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workloads.data import mnist
from workloads.mnist_vit.task import MnistVitTask
from workloads.pytorch.transformer import Block, initialise_linear
from workloads.pytorch.workload import PyTorchWorkload


class ViT(nn.Module):
    """Patches -> transformer blocks -> mean over positions -> class logits.

    Args:
        image_size, patch_size: sides of the square images and patches, in pixels.
        num_classes, width, depth, heads, hidden: sizes of output, model, stack, attention and MLP.
        glu: whether MLPs are gated.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        glu: bool = False,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch_size, stride=patch_size)
        # Fixed, hence a buffer; not in the state_dict, because it follows from the sizes.
        self.register_buffer("positions", sincos_2d(image_size // patch_size, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, hidden, heads, causal=False, glu=glu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        initialise_linear(self.blocks)
        nn.init.zeros_(self.head.weight)  # as AlgoPerf's ViT: all classes start equally likely
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, 1, H, W)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions  # (N, R, width)
        x = F.dropout(x, dropout_rate, self.training)
        for block in self.blocks:
            x = block(x, dropout_rate)
        return self.head(self.norm(x).mean(dim=1))


def sincos_2d(side: int, width: int, temperature: float = 10_000.0) -> torch.Tensor:
    """Sine-cosine position codes of a side x side grid, row by row: (side^2, width); width divisible by 4."""
    frequencies = temperature ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies  # (side, width/4)
    rows = angles[:, None].expand(side, side, -1).flatten(0, 1)
    columns = angles[None, :].expand(side, side, -1).flatten(0, 1)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)


class MnistVitWorkload(PyTorchWorkload, MnistVitTask):
    """See `MnistVitTask`; inputs are (N, 1, 28, 28)."""

    def build_model(self) -> nn.Module:
        return ViT(
            image_size=mnist.SIZE,
            patch_size=self.patch,
            num_classes=mnist.NUM_CLASSES,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            hidden=self.mlp_width,
            glu=self.glu,
        )

    def prepare_inputs(self, inputs: np.ndarray) -> np.ndarray:
        return inputs.transpose(0, 3, 1, 2)
