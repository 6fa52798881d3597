"""vowels_conformer in PyTorch: a conformer, and the bidirectional LSTMs of its variant."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from submissions.common.api import Batch
from workloads.pytorch.transformer import Attention, initialise_linear, sinusoids
from workloads.pytorch.workload import PyTorchWorkload
from workloads.vowels_conformer.task import RecognizerConfig, VowelsConformerTask

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swish": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class Recognizer(nn.Module):
    """Frames -> half as many positions -> blocks -> logits of CTC, at each position."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        block = {"conformer": ConformerBlock, "lstm": LstmBlock}[config.encoder]
        self.subsampling = Subsampling(config)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.output = nn.Linear(config.width, config.num_classes)
        initialise_linear(self)
        initialise_convolutions(self)

    def forward(
        self, features: torch.Tensor, paddings: torch.Tensor, dropout_rate: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, R, num_classes) and their paddings (N, R) of features (N, 2R, 12) and paddings (N, 2R)."""
        x, paddings = self.subsampling(features, paddings, dropout_rate)
        visible = paddings == 0
        for block in self.blocks:
            x = block(x, visible, dropout_rate)
        return self.output(self.norm(x)), paddings


class Subsampling(nn.Module):
    """Two convolutions over frames and features; the first halves both, the second the features alone."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(1, config.channels, kernel_size=3, stride=2)
        self.convolution2 = nn.Conv2d(config.channels, config.channels, kernel_size=3, stride=(1, 2))
        self.linear = nn.Linear(config.channels * -(-config.num_features // 4), config.width)

    def forward(
        self, features: torch.Tensor, paddings: torch.Tensor, dropout_rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (N, R, width) with position codes, and their paddings."""
        paddings = paddings[:, ::2]
        kept = (1 - paddings)[:, None, :, None]
        x = features[:, None]
        for convolution in (self.convolution1, self.convolution2):
            x = F.relu(convolution(same_padding(x, convolution.kernel_size, convolution.stride))) * kept
        x = self.linear(x.permute(0, 2, 3, 1).flatten(2))  # (N, R, features, channels) -> (N, R, width)
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x.device)
        return F.dropout(x, dropout_rate, self.training), paddings


class ConformerBlock(nn.Module):
    """Half a feed-forward part, self-attention, convolution, the other half, each added; then layer norm.

    Gulati et al. 2020, arXiv 2005.08100.
    """

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.feed_forward1 = FeedForward(config)
        self.norm_attention = nn.LayerNorm(config.width, eps=1e-6)
        self.attention = Attention(config.width, config.heads, causal=False)
        self.convolution = Convolution(config)
        self.feed_forward2 = FeedForward(config)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x: torch.Tensor, visible: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        x = x + 0.5 * self.feed_forward1(x, visible, dropout_rate)
        update = self.attention(self.norm_attention(x), dropout_rate, visible=visible)
        x = x + F.dropout(update, dropout_rate, self.training)
        x = x + self.convolution(x, visible, dropout_rate)
        x = x + 0.5 * self.feed_forward2(x, visible, dropout_rate)
        return self.norm(x)


class FeedForward(nn.Module):
    """Layer norm, then two linear layers with an activation between them."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.linear1 = nn.Linear(config.width, config.mlp_width)
        self.linear2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: torch.Tensor, visible: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        hidden = F.dropout(self.activation(self.linear1(self.norm(x))), dropout_rate, self.training)
        return F.dropout(self.linear2(hidden) * visible[..., None], dropout_rate, self.training)


class Convolution(nn.Module):
    """Layer norm, gated linear layer, depthwise convolution over positions, norm, activation, linear layer."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        width, size = config.width, config.kernel_size
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.depthwise = nn.Conv1d(width, width, size, padding=size // 2, groups=width, bias=False)
        if config.convolution_norm == "batch":
            self.batch_norm = MaskedBatchNorm(width)
        else:
            self.norm_convolution = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, visible: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        x = self.norm(x)
        x = self.linear(x) * self.gate(x).sigmoid() * visible[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        x = self.batch_norm(x, visible) if hasattr(self, "batch_norm") else self.norm_convolution(x)
        return F.dropout(self.out(self.activation(x)), dropout_rate, self.training)


class LstmBlock(nn.Module):
    """Batch norm, then an LSTM in both directions, added: as AlgoPerf's librispeech_deepspeech."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.batch_norm = MaskedBatchNorm(config.width)
        self.lstm = nn.LSTM(config.width, config.width // 2, batch_first=True, bidirectional=True)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                for gate in parameter.chunk(4):
                    nn.init.xavier_uniform_(gate)

    def forward(self, x: torch.Tensor, visible: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        # A sequence of padding alone is run, too, for one position.
        lengths = visible.sum(dim=1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.batch_norm(x, visible), lengths, batch_first=True, enforce_sorted=False)
        update, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return x + F.dropout(update, dropout_rate, self.training)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over (N, R, width) by the statistics of the positions that are visible (N, R)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-3)

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        kept = self.running_mean, self.running_var
        if self.training:
            counted = visible[..., None].to(x.dtype)
            mean = (x * counted).sum(dim=(0, 1)) / counted.sum()
            variance = ((x - mean).square() * counted).sum(dim=(0, 1)) / counted.sum()
            with torch.no_grad():
                for running, value in zip(kept, (mean, variance), strict=True):
                    if running is not None:  # see workloads.pytorch.batch_norm
                        running.lerp_(value, 0.1)
        else:
            mean, variance = (value for value in kept if value is not None)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def same_padding(x: torch.Tensor, kernel_size: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Zeros around (N, C, H, W), so that ceil(size / stride) outputs remain; an odd one goes behind."""
    pads = []
    for size, kernel, stride in zip(x.shape[2:], kernel_size, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    return F.pad(x, (*pads[1], *pads[0]))


def initialise_convolutions(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every convolution below `module`."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class VowelsConformerWorkload(PyTorchWorkload, VowelsConformerTask):
    """See `VowelsConformerTask`; features are (N, 128, 12), logits (N, 64, 10)."""

    def build_model(self) -> nn.Module:
        return Recognizer(self.config)

    def evaluation_of(self, logits: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """What `metrics` counts errors in."""
        (scores, paddings), (labels, label_paddings) = logits, batch["targets"]
        return {
            "best": scores.argmax(dim=-1),
            "paddings": paddings,
            "labels": labels,
            "label_paddings": label_paddings,
            "weights": batch["weights"],
        }
