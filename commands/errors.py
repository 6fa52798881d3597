"""A user's mistake: the one exception for it, the one line it is shown as, the one exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

MISTAKE = 2  # the exit code of a command that was given something it cannot do
INTERRUPTED = 130  # as a shell reports Ctrl-C


class UserError(Exception):
    """Something the user can put right: the message names the thing and the remedy, in one line."""


def run(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Runs a command; a user's mistake becomes one line on standard error instead of a traceback.

    Args:
        command: does the work; None stands for the exit code 0.
        interrupted: what to say after Ctrl-C.

    Returns:
        The exit code.
    """
    # A name may hold characters that the terminal cannot show; that is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return command() or 0
    except BrokenPipeError:
        # The reader of the pipe, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def one_line(error: Exception) -> str:
    """The message of an error, its line breaks as blanks."""
    return " ".join(str(error).split())
