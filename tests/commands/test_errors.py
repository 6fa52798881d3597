"""A user's mistake is one line and one exit code, whichever command it was given to."""

from __future__ import annotations

import pytest

from commands import errors, frameworks
from commands.arguments import Parser
from commands.errors import UserError


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
