"""An argparse parser whose complaints are a user's error: one line, the exit code of all commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from commands.errors import UserError


class Parser(argparse.ArgumentParser):
    """For the programs that share no flags with AlgoPerf's runner; call it inside `commands.errors.run`.

    Args:
        program: how it is called, e.g. "python -m benchmarks.step_time".
        description: the program's docstring, printed as it is.
    """

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of a usage text and an exit."""
        raise UserError(f"{message}. See {self.prog} --help.")
