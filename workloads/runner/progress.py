"""One line that says how a trial is doing: rewritten in place on a terminal, now and then as a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from commands.errors import tell

_PERIOD = {True: 0.5, False: 15.0}  # seconds between lines: on a terminal, elsewhere


class Progress:
    """Shows step, loss, steps per second, time left and the last metric.

    Args:
        label: what is running.
        total: the step limit.
        first: the step the process starts from.
        read_loss: called only when a line is due, because it may wait for the device.
        stream: where to write; standard error by default.
    """

    def __init__(
        self, label: str, total: int, first: int, read_loss: Callable[[], float], stream: TextIO | None = None
    ) -> None:
        self._label, self._total, self._first = label, total, first
        self._read_loss = read_loss
        self._stream = sys.stderr if stream is None else stream
        self._terminal = is_terminal(self._stream)
        self._start = self._last = time.monotonic()
        self._width = 0
        self.metric = ""

    def update(self, step: int) -> None:
        """Shows a line if one is due."""
        now = time.monotonic()
        if now - self._last >= _PERIOD[self._terminal]:
            self._last = now
            self._show(step, now)

    def close(self, step: int) -> None:
        """Shows the last line, on a terminal, and ends it."""
        if self._terminal:
            self._show(step, time.monotonic())
            tell("", self._stream)

    def _show(self, step: int, now: float) -> None:
        # Evaluations count as well: the user waits for them too.
        rate = (step - self._first) / max(now - self._start, 1e-9)
        left = (self._total - step) / rate if rate > 0 else float("nan")
        parts = [f"step {step}/{self._total}", f"loss {self._read_loss():.4f}", f"{rate:.1f} steps/s"]
        parts += [f"{left:.0f} s left"] + ([self.metric] if self.metric else [])
        line = f"{self._label}: " + "  ".join(parts)
        if self._terminal:
            tell("\r" + line.ljust(self._width), self._stream, end="")
            self._width = len(line)
        else:
            tell(line, self._stream)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a line on it can be rewritten; no for a stream that is closed, or not there."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False
