"""Which damping and power suit models that nobody tuned for: the evidence behind the library's defaults.

    python -m benchmarks.defaults --models=GPT-2,ViT --settings=1e-4:0.75,1e-2:0.5 --steps=40 --seeds=2

A setting is damping:power, with nothing that would hide it: no noise floor, and a refresh at each of the first ten
steps. Each trains the models of `benchmarks.zoo`, and two on digits (one pass over 3,200 of
`workloads.data.mnist`, losses of images not seen before), with expand and with reduce; NadamW beside them. Every
optimizer has the best of the same learning rates, by the mean over seeds. Prints the losses; then per setting how
many models it trains to a lower loss than NadamW, and the geometric mean of its loss over NadamW's.
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.config import KFACConfig
from benchmarks.zoo.exhibit import Exhibit, classified
from benchmarks.zoo.measure import train
from benchmarks.zoo.models import ZOO
from commands import errors
from commands.arguments import Parser
from workloads.data import mnist

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
APPROXIMATIONS = ("expand", "reduce")
SETTINGS = "1e-4:0.75,1e-2:0.75,1e-3:0.5,1e-2:0.5,1e-1:0.5"
DIGITS = {"digits ResNet": "resnet", "digits transformer": "transformer"}
DIGIT_STEPS = 100
PLAIN = {"noise_floor": 0.0, "initial_refreshes": "every", "max_factor_dim": 4096}


class Residual(nn.Module):
    """A block of two convolutions with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), Residual(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), Residual(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, mnist.NUM_CLASSES),
    )  # fmt: skip


class Transformer(nn.Module):
    """Rows of pixels as positions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.places = nn.Linear(mnist.SIZE, 32), nn.Parameter(0.02 * torch.randn(mnist.SIZE, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.rows(x.squeeze(1)) + self.places).mean(1))


def digits(build: Any) -> Exhibit:
    """Digits with as much noise as signal, 32 at a time."""
    part, drawn = mnist.load()["train"], 0

    def batch() -> dict[str, Tensor]:
        nonlocal drawn
        drawn += 1
        given = mnist.train_batch(part, np.array([0, torch.initial_seed()]), drawn % DIGIT_STEPS, 32)
        images = torch.from_numpy(given["inputs"].transpose(0, 3, 1, 2))
        return {"x": images + torch.randn_like(images), "labels": torch.from_numpy(given["targets"])}

    return Exhibit(build, batch, classified, fresh=True)


def exhibit_of(name: str) -> Exhibit:
    return digits(resnet if "ResNet" in name else Transformer) if name in DIGITS else ZOO[name]()


def setting_of(text: str) -> dict[str, float]:
    """damping:power as fields of `KFACConfig`.

    Raises:
        UserError: it is not that.
    """
    try:
        damping, power = map(float, text.split(":"))
        KFACConfig(damping=damping, power=power)
    except ValueError as error:
        raise errors.UserError(f"--settings: {text!r} is not damping:power such as 1e-2:0.75 ({error})") from error
    return {"damping": damping, "power": power}


def best(exhibit: Exhibit, name: str, steps: int, seeds: int, options: Mapping[str, Any]) -> float:
    """The loss at the best rate."""
    losses = []
    for rate in RATES:
        runs = [train(exhibit, name, rate, seed, steps, options)[0] for seed in range(seeds)]
        losses.append(statistics.mean(runs))
    return min(losses)


def main(argv: list[str]) -> int:
    """Runs the command."""
    known = [*ZOO, *DIGITS]
    parser = Parser("python -m benchmarks.defaults", __doc__)
    parser.add_argument("--models", default=",".join(known), help="names, separated by commas (default: all)")
    parser.add_argument("--settings", default=SETTINGS, help="damping:power, separated by commas")
    parser.add_argument("--steps", type=int, default=40, help="of each run; on digits always 100")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--out", type=Path, help="where to write the table as Markdown")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.models.split(",")]
    settings = {text.strip(): setting_of(text.strip()) for text in args.settings.split(",")}
    for name in names:
        if name not in known:
            raise errors.UserError(f"--models: {name!r} is none of {', '.join(known)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    columns = [f"{a} {setting}" for a in APPROXIMATIONS for setting in settings]
    lines = ["| model | nadamw | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    print("\n".join(lines), flush=True)
    ratios: dict[str, list[float]] = {column: [] for column in columns}
    for name in names:
        try:
            exhibit = exhibit_of(name)
        except ImportError as error:
            print(f"{name}: skipped, no package {error.name}", flush=True)
            continue
        steps = DIGIT_STEPS if name in DIGITS else args.steps
        first = best(exhibit, "nadamw", steps, args.seeds, {})
        losses = {}
        for column in columns:
            approximation, setting = column.split()
            losses[column] = best(exhibit, approximation, steps, args.seeds, PLAIN | settings[setting])
            ratios[column].append(losses[column] / first)
        lines.append(f"| {name} | {first:.3g} | " + " | ".join(f"{loss:.3g}" for loss in losses.values()) + " |")
        print(lines[-1], flush=True)
    if not ratios[columns[0]]:
        raise errors.UserError("no model could be made: pip install -e '.[zoo]'")
    won = " | ".join(str(sum(r < 1 for r in of)) for of in ratios.values())
    means = " | ".join(f"{math.exp(statistics.mean(map(math.log, of))):.2f}" for of in ratios.values())
    lines += [f"| better than NadamW | | {won} |", f"| loss over NadamW's, geometric mean | | {means} |"]
    print("\n".join(lines[-2:]))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(lambda: main(sys.argv[1:])))
