"""Whatever the terminal, the locale and the names of folders: no run dies of what it prints."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from tests.workloads.helpers import CHECKOUT, arguments, environment
from workloads.runner.progress import Progress, is_terminal


class Terminal(io.TextIOWrapper):
    """A terminal of an encoding."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self):
        return True


class Gone(io.StringIO):
    """A terminal that was closed while its program runs."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")


def _show(stream):
    progress = Progress("Versuch_\u00fc", 10, 0, lambda: 1.0, stream)
    progress.metric = "\u2713"
    progress._last = -100.0
    progress.update(5)
    progress.close(10)


def test_progress_on_a_terminal_that_is_not_utf8():
    stream = Terminal("ascii")
    _show(stream)
    shown = stream.buffer.getvalue()
    assert b"\rVersuch_?: step 5/10  loss 1.0000" in shown
    assert shown.endswith(b"s left  ?\n")


def test_progress_without_a_terminal():
    _show(Gone())
    closed = io.StringIO()
    closed.close()
    _show(closed)
    assert not is_terminal(None)


@pytest.mark.parametrize(
    "locale",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["terminal", "locale"],
)
def test_a_run_in_a_folder_with_any_name(tmp_path, locale):
    """And with nobody there to read what it prints."""
    folder = tmp_path / "Versuch_\u00fc" / "\u5b9f\u9a13"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "workloads.run", *arguments(folder, max_global_steps=1)]
    options = {"cwd": CHECKOUT, "env": {**environment(), **locale}, "stderr": subprocess.PIPE, "check": False}
    done = subprocess.run(command, stdout=writing, **options)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "e/bible_lm_pytorch/trial_1/outcome.json").read_text())["global_step"] == 1
    again = subprocess.run([*command, "--resume_last_run"], stdout=subprocess.PIPE, **options)
    assert again.returncode == 0, again.stderr
    assert b"/Versuch_?" in again.stdout
