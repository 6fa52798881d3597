"""`python -m submissions plan` and `python -m submissions export`; each has --help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from submissions.cli import export, plan
from workloads.errors import UserError

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "plan": (plan.main, "which parameters K-FAC covers, what it costs in memory and flops, whether it fits"),
    "export": (export.main, "a folder for a pull request to AlgoPerf's leaderboard"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command with the given arguments (default: the command line's); returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m submissions COMMAND --flag=value ...\n")
        for command, (_, what) in COMMANDS.items():
            print(f"  {command:8}{what}")
        print("\nEach command has --help.")
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'; known: {', '.join(COMMANDS)}")
        COMMANDS[name][0](arguments[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
