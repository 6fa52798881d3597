"""A user's mistake is one line and one exit code, whichever command it was given to."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from commands import errors, frameworks
from commands.arguments import Parser
from commands.errors import UserError, tell


def raising(error):
    def command():
        raise error

    return command


def test_a_mistake_is_one_line(capsys):
    assert errors.run(raising(UserError("no file\n  here; give another"))) == 2
    assert capsys.readouterr() == ("", "error: no file here; give another\n")


def test_an_interruption_says_how_to_go_on(capsys):
    assert errors.run(raising(KeyboardInterrupt), interrupted="the same command goes on") == 130
    assert capsys.readouterr().err == "\nthe same command goes on\n"


def test_other_errors_are_not_the_users():
    with pytest.raises(ZeroDivisionError):
        errors.run(raising(ZeroDivisionError))


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_exit_codes(result, code):
    assert errors.run(lambda: result) == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --steps. See python -m x --help."),
        (("--steps=many",), "argument --steps: invalid int value: 'many'. See python -m x --help."),
    ],
)
def test_a_parser_complains_like_all_others(capsys, arguments, message):
    parser = Parser("python -m x", "What it does.")
    parser.add_argument("--steps", type=int, required=True)
    assert errors.run(lambda: print(parser.parse_args(arguments))) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_missing_module_is_named_with_its_remedy():
    error = frameworks.missing(ModuleNotFoundError(name="torch"), "pytorch")
    assert "'torch' is not installed" in str(error)
    assert "pip install -e '.[torch,bench]'" in str(error)
    with pytest.raises(UserError, match=r"'theano'\. Known: pytorch, jax"):
        frameworks.check("theano")


class Broken(io.StringIO):
    """A stream of a terminal that is gone."""

    def write(self, text):
        raise OSError(5, "Input/output error")


def test_telling_never_fails():
    assert not tell("text", Broken())
    closed = io.StringIO()
    closed.close()
    assert not tell("text", closed)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert tell("Versuch \u00fc \udcff", stream)
    assert stream.buffer.getvalue() == b"Versuch ? ?\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_is_closed_is_no_mistake(stream):
    """As by `| head`: what is told goes nowhere, and the work is done."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from commands.errors import run, tell\n"
    code += f"sys.exit(run(lambda: [tell('line', sys.{stream}) for _ in range(9)] and 7))"
    other = "stderr" if stream == "stdout" else "stdout"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, **{stream: writing, other: subprocess.PIPE}, check=False)
    os.close(writing)
    assert done.returncode == 7
    assert not getattr(done, other)
