"""Packs the trials of a suite into small files for the repository, and unpacks them to where the suite goes on.

    python -m workloads.archive pack runs/suite docs/results/suite
    python -m workloads.archive unpack docs/results/suite runs/suite

Only finished trials are packed. `python -m scoring` and `python -m workloads.study --suite=...` read what was
unpacked as if it had been run there; trials that are there already stay.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from commands import errors
from commands.arguments import Parser
from commands.errors import UserError, tell
from workloads.studies import archives


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""
    parser = Parser("python -m workloads.archive", __doc__)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", help="the folder to read")
    parser.add_argument("destination", help="the folder to write to")

    def command() -> None:
        given = parser.parse_args(argv)
        source, destination = (Path(path).expanduser().resolve() for path in (given.source, given.destination))
        if not source.is_dir():
            raise UserError(f"There is no folder {source}.")
        if given.action == "pack":
            files = archives.pack(source, destination)
            size = sum(path.stat().st_size for path in files)
            tell(f"Written to {destination}: {len(files)} files, {size / 1e6:.2f} MB")
        else:
            tell(f"{archives.unpack(source, destination)} trials unpacked to {destination}")

    return errors.run(command)


if __name__ == "__main__":
    sys.exit(main())
