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

import sys
import warnings
from pathlib import Path

import torch

from benchmarks.zoo.measure import RATES, Row, measure_coverage, measure_training
from benchmarks.zoo.models import ZOO
from benchmarks.zoo.table import cells, document
from commands import errors
from commands.arguments import Parser


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
