"""Claims of the paper (arXiv 2311.00636), each checked by one command.

python -m benchmarks.paper exactness      where expand and reduce are exact
python -m benchmarks.paper complexity     time and memory of A and B against R, N, P and k
python -m benchmarks.paper update         an update of a wide residual network by batch size
python -m benchmarks.paper peers          the same factors by curvlinops and einconv
python -m benchmarks.paper architectures  recurrent networks, attention that shares nothing, a hybrid
python -m benchmarks.paper size           language models: exact at the small end, GPT-2 to GPT-3 on paper, a ladder
python -m benchmarks.paper worth          what factors are worth as a preconditioner, where reduce fails and why
python -m benchmarks.paper evidence       weight decay by marginal likelihood, against a grid
python -m benchmarks.paper damping        how much damping, how exactly, and what a factor wrong by R does
python -m benchmarks.paper frequency      how often statistics and refreshes: steps, time, the cost model's time
python -m benchmarks.paper glance         one figure of it all, from what is kept

Each writes docs/generated/PART.md, glance docs/figures/paper.png. All but exactness, peers, frequency and glance
measure what docs/results does not have yet, say beforehand how long that takes, and go on after an interruption.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import errors
from commands.arguments import Parser
from commands.errors import tell
from workloads.runner.jobs import CHECKOUT

# Modules with `run(given, output)`; each brings what it needs.
PARTS = {
    "exactness": "benchmarks.paper.exactness",
    "complexity": "benchmarks.paper.complexity.command",
    "update": "benchmarks.paper.update.command",
    "peers": "benchmarks.paper.peers",
    "architectures": "benchmarks.paper.architectures.command",
    "size": "benchmarks.paper.size.command",
    "worth": "benchmarks.paper.worth.command",
    "evidence": "benchmarks.paper.evidence.command",
    "damping": "benchmarks.paper.damping.command",
    "frequency": "benchmarks.paper.frequency.command",
    "glance": "benchmarks.paper.glance.command",
}
OUTPUTS = {"glance": "figures/paper.png"}  # of what is no page


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""
    parser = Parser("python -m benchmarks.paper", __doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument(
        "--output", help="where to; default: docs/generated/PART.md, of glance docs/figures/paper.png"
    )
    measured = parser.add_argument_group("what is measured (all but exactness, peers, frequency, glance)")
    measured.add_argument(
        "--results",
        help="file of kept results; of evidence, size, damping, frequency and glance a folder; "
        "default: in docs/results",
    )
    measured.add_argument("--again", action="store_true", help="measure also what there are results of")
    measured.add_argument("--kept", action="store_true", help="size: nothing, the page is of what is kept")
    measured.add_argument("--quick", action="store_true", help="a few sizes only")
    measured.add_argument("--whole", action="store_true", help="damping: the whole grid")
    measured.add_argument("--framework", default="pytorch,jax", help="complexity: either or both")
    measured.add_argument("--layers", help="complexity: kinds of layers, separated by commas; default: all")
    measured.add_argument("--memory_gb", type=float, default=0.9, help="update: what a process is given for it")

    def command() -> None:
        given = parser.parse_args(argv)
        path = Path(given.output or CHECKOUT / "docs" / OUTPUTS.get(given.part, f"generated/{given.part}.md"))
        path.parent.mkdir(parents=True, exist_ok=True)
        _run(given, path)
        tell(f"Written: {path}")

    return errors.run(command, interrupted="interrupted; the same command goes on")


def _run(given: argparse.Namespace, path: Path) -> None:
    importlib.import_module(PARTS[given.part]).run(given, path)


if __name__ == "__main__":
    sys.exit(main())
