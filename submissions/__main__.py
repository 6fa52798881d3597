"""`python -m submissions plan` and `python -m submissions export`; each has --help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from commands import errors
from commands.errors import UserError
from submissions.cli import export, plan

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
        return errors.run(lambda: _run(name, arguments[1:]))
    except SystemExit:  # help was asked for
        return 0


def _run(name: str, arguments: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'; known: {', '.join(COMMANDS)}")
    COMMANDS[name][0](arguments)


if __name__ == "__main__":
    sys.exit(main())
