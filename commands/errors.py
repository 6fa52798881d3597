"""A user's mistake: the one exception for it, the one line it is shown as, the one exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

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
            with contextlib.suppress(OSError, ValueError):  # what is left in its buffer cannot be written
                stream.reconfigure(errors="replace")
    try:
        code = command() or 0
        _flush()
        return code
    except BrokenPipeError:
        _flush()
        return 0
    except UserError as error:
        tell(f"error: {one_line(error)}", sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        tell(f"\n{interrupted}", sys.stderr)
        return INTERRUPTED


def _flush() -> None:
    """Writes what is left; where the reader of a pipe, such as head, has seen enough, lets go of the rest."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            pass  # Python says so when it exits


def tell(text: str, stream: TextIO | None = None, *, end: str = "\n") -> bool:
    """Prints at once, for commands whose work must go on whatever becomes of the terminal; returns whether it did.

    Args:
        text: what to print; characters the stream cannot show are replaced.
        stream: standard output by default.
        end: what follows the text.
    """
    stream = sys.stdout if stream is None else stream
    try:
        try:
            print(text, end=end, file=stream, flush=True)
        except UnicodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except (OSError, ValueError):  # a closed terminal or pipe, a full disk; a closed file
        return False
    return True


def one_line(error: Exception) -> str:
    """The message of an error, its line breaks as blanks."""
    return " ".join(str(error).split())
