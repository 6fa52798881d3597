"""Claims of the paper (arXiv 2311.00636), each checked by one command.

python -m benchmarks.paper exactness      where expand and reduce are exact -> docs/generated/exactness.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import exactness
from commands import atomic, errors
from commands.arguments import Parser
from commands.errors import tell
from workloads.runner.jobs import CHECKOUT

PAGES = {"exactness": exactness.page}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""
    parser = Parser("python -m benchmarks.paper", __doc__)
    parser.add_argument("part", choices=tuple(PAGES))
    parser.add_argument("--output", help="where to; default: docs/generated/PART.md")

    def command() -> None:
        given = parser.parse_args(argv)
        path = Path(given.output or CHECKOUT / "docs" / "generated" / f"{given.part}.md")
        atomic.write_text(path, PAGES[given.part]())
        tell(f"Written: {path}")

    return errors.run(command)


if __name__ == "__main__":
    sys.exit(main())
