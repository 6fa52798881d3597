"""All models by name. Their packages are imported when they are built."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.zoo.exhibit import Exhibit
from benchmarks.zoo.hugging_face import (
    bert,
    convnext,
    deepseek,
    detr,
    gpt2,
    llama,
    llama4,
    mamba,
    mixtral,
    resnet,
    swin,
    t5,
    vit,
    wav2vec2,
    whisper,
    xlnet,
)
from benchmarks.zoo.others import gcn, gin, of_timm
from benchmarks.zoo.plain import encoder, gru, unet

ZOO: dict[str, Callable[[], Exhibit]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "BERT": bert,
    "XLNet": xlnet,
    "T5": t5,
    "ViT": vit,
    "Swin": swin,
    "ConvNeXt": convnext,
    "ResNet": resnet,
    "Mixtral": mixtral,
    "DeepSeek-V3": deepseek,
    "Llama 4": llama4,
    "Mamba": mamba,
    "Whisper": whisper,
    "Wav2Vec2": wav2vec2,
    "DETR": detr,
    "ViT (timm)": of_timm(
        "vit_tiny_patch16_224", 32, img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3
    ),
    "ResNet (timm)": of_timm("resnet10t", 64),
    "ConvNeXt (timm)": of_timm("convnext_atto", 64, dims=(16, 32, 48, 64), depths=(1, 1, 1, 1)),
    "GCN": gcn,
    "GIN": gin,
    "U-Net": unet,
    "TransformerEncoder": encoder,
    "GRU": gru,
}
