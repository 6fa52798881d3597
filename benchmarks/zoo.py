"""Models of other people at tiny sizes: what K-FAC covers of them, whether it is right, and how it trains.

    python -m benchmarks.zoo --steps=30 --out=docs/generated/zoo.md

Each model is built from a configuration, with random weights and synthetic data that it learns by heart, and its
own loss; nothing is downloaded. The packages are those of the extra `zoo`; a model whose package is not there is
skipped, by name. Per model: the share of its parameters that is covered after the first steps, the same of the
parameters that are neither embeddings nor normalisations, the largest difference between captured pairs and weight
gradient, relative to that gradient (it should be rounding), and the warnings; then the loss at the end, the best of
the same rates for every optimizer, and what a step costs beside NadamW's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac import Positions
from algoperf_kfac.pytorch import KFAC, NadamW
from commands import errors
from commands.arguments import Parser

RATES = (1e-3, 3e-3, 1e-2)
OPTIMIZERS = ("nadamw", "expand", "reduce")
PACKAGES = ("torch", "transformers", "timm", "torch_geometric", "scipy")
BATCHES = 4  # which come again and again
NAMES = ("embed", "token", "position", "relative_position_bias_table")  # of raw parameters that are embeddings

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A model with data.

    Attributes:
        build: makes the model.
        batch: makes one batch.
        loss: of the model on a batch.
        capture: of a batch: arguments of `KFAC.capture`.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Any]]
    loss: Loss
    capture: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda batch: {}


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


# Hugging Face transformers ---------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def gpt2() -> Exhibit:
    import transformers as t

    config = t.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return Exhibit(lambda: t.GPT2LMHeadModel(config), language, own_loss)


def llama() -> Exhibit:
    import transformers as t

    config = t.LlamaConfig(vocab_size=64, max_position_embeddings=16, num_key_value_heads=2, **SMALL)
    return Exhibit(lambda: t.LlamaForCausalLM(config), language, own_loss)


def bert() -> Exhibit:
    import transformers as t

    config = t.BertConfig(vocab_size=64, max_position_embeddings=16, **SMALL)
    return Exhibit(lambda: t.BertForMaskedLM(config), language, own_loss)


def xlnet() -> Exhibit:
    import transformers as t

    config = t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)
    return Exhibit(lambda: t.XLNetLMHeadModel(config), language, own_loss)


def t5() -> Exhibit:
    import transformers as t

    config = t.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return Exhibit(lambda: t.T5ForConditionalGeneration(config), language, own_loss)


def vit() -> Exhibit:
    import transformers as t

    config = t.ViTConfig(image_size=32, patch_size=8, num_labels=10, **SMALL)
    return Exhibit(lambda: t.ViTForImageClassification(config), pictures, own_loss)


def swin() -> Exhibit:
    import transformers as t

    config = t.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )
    return Exhibit(lambda: t.SwinForImageClassification(config), pictures, own_loss)


def convnext() -> Exhibit:
    import transformers as t

    config = t.ConvNextConfig(patch_size=2, hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=10)
    return Exhibit(lambda: t.ConvNextForImageClassification(config), pictures, own_loss)


def resnet() -> Exhibit:
    import transformers as t

    config = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    return Exhibit(lambda: t.ResNetForImageClassification(config), pictures, own_loss)


def mixtral() -> Exhibit:
    import transformers as t

    config = t.MixtralConfig(
        vocab_size=64, max_position_embeddings=16, num_key_value_heads=2, num_local_experts=4, **SMALL
    )
    return Exhibit(lambda: t.MixtralForCausalLM(config), language, own_loss)


def deepseek() -> Exhibit:
    import transformers as t

    config = t.DeepseekV3Config(
        vocab_size=64, max_position_embeddings=16, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=32,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, **SMALL,
    )  # fmt: skip
    return Exhibit(lambda: t.DeepseekV3ForCausalLM(config), language, own_loss)


def llama4() -> Exhibit:
    import transformers as t

    config = t.Llama4TextConfig(
        vocab_size=64, max_position_embeddings=16, num_key_value_heads=2, num_local_experts=4, head_dim=8,
        intermediate_size_mlp=64, **SMALL,
    )  # fmt: skip
    return Exhibit(lambda: t.Llama4ForCausalLM(config), language, own_loss)


def mamba() -> Exhibit:
    import transformers as t

    config = t.MambaConfig(vocab_size=64, hidden_size=64, state_size=8, num_hidden_layers=2)
    return Exhibit(lambda: t.MambaForCausalLM(config), language, own_loss)


def whisper() -> Exhibit:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip

    def batch() -> dict[str, Tensor]:
        return {"input_features": torch.randn(8, 16, 32), "labels": tokens(length=8)}

    return Exhibit(lambda: t.WhisperForConditionalGeneration(config), batch, own_loss)


def wav2vec2() -> Exhibit:
    import transformers as t

    config = t.Wav2Vec2Config(
        vocab_size=32, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), mask_time_length=2,
        num_feat_extract_layers=3, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=8, **SMALL,
    )  # fmt: skip

    def batch() -> dict[str, Tensor]:
        return {"input_values": torch.randn(8, 800), "labels": tokens(32, length=6)}

    return Exhibit(lambda: t.Wav2Vec2ForCTC(config), batch, own_loss)


def detr() -> Exhibit:
    import scipy  # noqa: F401 (its matching of boxes)
    import transformers as t

    backbone = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = t.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        num_queries=5, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_labels=5,
    )  # fmt: skip

    def batch() -> dict[str, Any]:
        labels = [{"class_labels": torch.randint(5, (2,)), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(8)]
        return {"pixel_values": torch.randn(8, 3, 64, 64), "labels": labels}

    return Exhibit(lambda: t.DetrForObjectDetection(config), batch, own_loss)


# timm ------------------------------------------------------------------------------------------------------------


def of_timm(name: str, size: int = 32, **options: Any) -> Callable[[], Exhibit]:
    def exhibit() -> Exhibit:
        import timm

        def build() -> nn.Module:
            return timm.create_model(name, num_classes=10, **options)

        return Exhibit(build, lambda: raw_pictures(size), classified)

    return exhibit


# PyTorch Geometric -----------------------------------------------------------------------------------------------


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


# torch alone -----------------------------------------------------------------------------------------------------


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


# What is measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A model's line of the table.

    Attributes:
        parameters: how many it has.
        covered: share of them.
        core: share of those that are neither embeddings nor normalisations.
        error: largest relative error of a weight's gradient.
        warned: warnings of K-FAC.
        losses: by optimizer, at its best rate.
        ratios: by optimizer, mean cost of a step beside NadamW's.
        rest: parameters of the core that are not covered, and why.
    """

    parameters: int = 0
    covered: float = math.nan
    core: float = math.nan
    error: float = math.nan
    warned: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    rest: dict[str, str] = dataclasses.field(default_factory=dict)


def embeddings_and_norms(model: nn.Module) -> set[str]:
    """Names of the parameters that are embeddings or belong to normalisations."""
    names = set()
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for key, param in module.named_parameters(path, recurse=False):
            if plain or (param.dim() != 2 and any(name in key.rpartition(".")[2] for name in NAMES)):
                names.add(key)
    return names


def measure_coverage(exhibit: Exhibit, row: Row, seed: int) -> None:
    """Coverage after three steps, and how right it is; of expand, whose pairs are those of reduce."""
    torch.manual_seed(seed)
    model = exhibit.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = KFAC(model, approximation="expand", learning_rate=1e-4)
        for _ in range(3):
            step(model, optimizer, exhibit, exhibit.batch())
    aside, coverage = embeddings_and_norms(model), optimizer.coverage()
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    left = {f.name: math.prod(f.shape) for f in coverage.fallbacks}
    core = sum(size for name, size in sizes.items() if name not in aside)
    row.parameters, row.covered = sum(sizes.values()), coverage.fraction
    row.core = 1 - sum(size for name, size in left.items() if name not in aside) / core
    row.error = max((v for k, v in optimizer.metrics().items() if k.endswith("/gradient_error")), default=math.nan)
    row.warned = [str(w.message).removeprefix("K-FAC: ") for w in caught if "K-FAC" in str(w.message)]
    row.rest = {f.name: f.reason for f in coverage.fallbacks if f.name not in aside}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, exhibit: Exhibit, batch: Mapping[str, Any]) -> float:
    """One training step; its loss."""
    optimizer.zero_grad()
    if isinstance(optimizer, KFAC):
        with optimizer.capture(**exhibit.capture(batch)):
            loss = exhibit.loss(model, batch)
            loss.backward()
    else:
        loss = exhibit.loss(model, batch)
        loss.backward()
    optimizer.step()
    return float(loss.detach())


def make(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    if name == "nadamw":
        return NadamW(model.parameters(), lr=rate)
    return KFAC(model, approximation=name, learning_rate=rate, allow_partial_coverage=True)


def train(exhibit: Exhibit, name: str, rate: float, seed: int, steps: int) -> tuple[float, list[float]]:
    """The mean loss over the last round of batches, and the seconds of each step."""
    torch.manual_seed(seed)
    model = exhibit.build()
    batches = [exhibit.batch() for _ in range(BATCHES)]
    optimizer = make(name, model, rate)
    losses, seconds = [], []
    for number in range(steps):
        begin = time.perf_counter()
        losses.append(step(model, optimizer, exhibit, batches[number % BATCHES]))
        seconds.append(time.perf_counter() - begin)
    end = statistics.mean(losses[-BATCHES:])
    return end if math.isfinite(end) else math.inf, seconds


def measure_training(exhibit: Exhibit, row: Row, steps: int, seeds: Iterable[int]) -> None:
    """Losses at the best rate, and the cost of steps."""
    seeds, times = list(seeds), {}
    for name in OPTIMIZERS:
        by_rate, taken = {}, []
        for rate in RATES:
            runs = [train(exhibit, name, rate, seed, steps) for seed in seeds]
            by_rate[rate] = statistics.mean(loss for loss, _ in runs)
            taken += [s for _, seconds in runs for s in seconds]
        row.losses[name], times[name] = min(by_rate.values()), taken
    base = times["nadamw"]
    row.ratios = {name: statistics.mean(times[name]) / statistics.mean(base) for name in OPTIMIZERS[1:]}


# What is printed -------------------------------------------------------------------------------------------------

HEAD = ("model", "parameters", "covered", "core", "error", "warnings", "nadamw", "expand", "reduce", "cost")


def cells(name: str, row: Row) -> list[str]:
    trained = [f"{row.losses[optimizer]:.3g}" if row.losses else "" for optimizer in OPTIMIZERS]
    cost = " / ".join(f"{ratio:.1f}" for ratio in row.ratios.values())
    error = "" if math.isnan(row.error) else f"{row.error:.0e}" if row.error else "0"
    return [
        name, f"{row.parameters:,}", f"{row.covered:.2f}", f"{row.core:.2f}", error, str(len(row.warned)), *trained,
        cost,
    ]  # fmt: skip


def document(rows: Mapping[str, Row], skipped: Mapping[str, str], command: str, note: str) -> str:
    """The table as Markdown, with versions and what is not covered."""
    lines = [
        "# Models of other people",
        "",
        f"Made by `{command}`. Versions: {', '.join(versions())}.",
        "",
        "Tiny models from random configurations, on synthetic batches that they learn by heart. covered: share of",
        "the parameters with a K-FAC direction after three steps; core: the same without embeddings and",
        "normalisations; error: the largest difference between G^T A of the captured pairs and the weight's",
        f"gradient, relative to it. {note} cost: mean seconds of a step of expand / reduce beside NadamW's.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells(name, row)) + " |" for name, row in rows.items()),
    ]
    if skipped:
        lines += ["", "Skipped: " + ", ".join(f"{name} ({why})" for name, why in skipped.items()) + "."]
    lines += ["", "What of the core is not covered:", ""]
    for name, row in rows.items():
        reasons: dict[str, list[str]] = {}
        for param, reason in row.rest.items():
            reasons.setdefault(reason, []).append(param)
        lines += [f"- {name}: {params[0]}{more(params)}: {reason}" for reason, params in reasons.items()]
    lines += ["", "Warnings:", ""]
    for name, row in rows.items():
        lines += [f"- {name}: {text}" for text in row.warned]
    return "\n".join(lines) + "\n"


def more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser("python -m benchmarks.zoo", __doc__)
    parser.add_argument("--models", default=",".join(ZOO), help="names, separated by commas (default: all)")
    parser.add_argument("--steps", type=int, default=30, help="of each training run; 0 leaves training out")
    parser.add_argument("--seeds", type=int, default=1, help="how many, for each rate")
    parser.add_argument("--out", type=Path, help="where to write the table as Markdown")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",")]
    unknown = [name for name in names if name not in ZOO]
    if unknown:
        raise errors.UserError(f"--models: {unknown[0]!r} is none of {', '.join(ZOO)}")
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            exhibit = ZOO[name]()
        except ImportError as error:
            skipped[name] = f"no package {error.name}"
            print(f"{name}: skipped, {skipped[name]}", flush=True)
            continue
        rows[name] = row = Row()
        measure_coverage(exhibit, row, seed=0)
        if args.steps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                measure_training(exhibit, row, args.steps, range(args.seeds))
        print("  ".join(cells(name, row)), flush=True)
    note = ""
    if args.steps:
        rates = ", ".join(f"{rate:g}" for rate in RATES)
        note = (
            f"Losses after {args.steps} steps at the best of the rates {rates} for each optimizer, "
            f"mean over seeds: {args.seeds}."
        )
    text = document(rows, skipped, "python -m benchmarks.zoo " + " ".join(argv), note)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(lambda: main(sys.argv[1:])))
