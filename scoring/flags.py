"""The flags of the command line, named as in AlgoPerf's scorer where it has one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from commands.errors import UserError

DESCRIPTION = "Scores of AlgoPerf runs: steps and time to target, leaderboards, what is odd in logs."
EPILOG = (
    "Inputs are run directories, submission directories (study_<j>/<workload>_<framework>/trial_<i>), directories "
    "of submissions, or archives of any of these. docs/scoring.md describes the rules and the columns written."
)


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, as every other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


def parser() -> argparse.ArgumentParser:
    """All commands and flags; those that the official scorer has bear its names."""
    whole = _Parser(prog="python -m scoring", description=DESCRIPTION, epilog=EPILOG)
    commands = whole.add_subparsers(
        dest="command", required=True, metavar="{report,leaderboard,lint,standing,columns,published}"
    )
    report = commands.add_parser("report", help="steps and time to target of a few runs", epilog=EPILOG)
    report.add_argument("logs", nargs="+", metavar="RUN_DIR")
    report.add_argument("--output_dir", default="report", help="where to write (default: %(default)s)")
    report.add_argument("--reference", help="algorithm the ratios are to (default: nadamw, if there)")
    report.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="WORKLOAD=VALUE",
        help="another validation target for a workload; may be repeated",
    )
    _common(report)
    board = commands.add_parser("leaderboard", help="scores, ranks and speedups of submissions", epilog=EPILOG)
    board.add_argument("logs", nargs="+", metavar="LOGS")
    board.add_argument("--ours", nargs="+", default=[], metavar="RUNS", help="our own runs, laid beside the logs")
    board.add_argument("--output_dir", help="write HTML, Markdown, CSV, JSON and LaTeX there (default: only print)")
    board.add_argument("--reference", metavar="NAME", help="submission the speedups are over (default: a baseline)")
    board.add_argument(
        "--relative_to",
        choices=("group", "reference"),
        default="group",
        help="unit of the score: the best of the group, or the fixed costs of --reference",
    )
    board.add_argument(
        "--against",
        choices=("published",),
        default="",
        help="put the published submissions that come with this package into the group",
    )
    board.add_argument(
        "--cost",
        default="time",
        metavar="time|steps|normalised|COLUMN",
        help="what a target costs; normalised: steps times the reference's time per step (default: %(default)s)",
    )
    board.add_argument(
        "--workloads",
        default="base",
        metavar="base|qualification|present|NAME,NAME",
        help="which workloads count (default: %(default)s)",
    )
    board.add_argument(
        "--parity",
        choices=("official", "compare"),
        help="official: its procedure as it is; compare: beside the exact rules, each difference by name",
    )
    board.add_argument("--sweep", action="store_true", help="score with all targets relaxed by 0 to 20 %%, too")
    board.add_argument(
        "--replicates", type=_count, default=2000, help="bootstrap replicates (default: %(default)s)"
    )
    _common(board)
    lint = commands.add_parser("lint", help="what is odd or misleading in logs", epilog=EPILOG)
    lint.add_argument("logs", nargs="+", metavar="LOGS")
    lint.add_argument("--output_dir", help="write oddities.csv there")
    lint.add_argument("--all", action="store_true", help="print each finding, not one line per kind")
    lint.add_argument("--strict", action="store_true", help="exit with 1 on warnings as well as on errors")
    _common(lint)
    standing = commands.add_parser("standing", help="where official submissions stand, as one page", epilog=EPILOG)
    standing.add_argument("logs", nargs="+", metavar="LOGS")
    standing.add_argument("--output", required=True, metavar="FILE.md", help="the Markdown file to write")
    _common(standing)
    commands.add_parser("columns", help="the columns of trials, cells and CSV files, and what they mean")
    published = commands.add_parser("published", help="make the data files of published numbers", epilog=EPILOG)
    published.add_argument("logs", nargs="+", metavar="LOGS")
    published.add_argument("--output_dir", required=True, help="where to write published_<version>_<ruleset>.json")
    published.add_argument("--source", required=True, help="where the logs come from, as the file will say")
    _common(published)
    return whole


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        "--workload_targets",
        default="auto",
        metavar="0.5|0.6|1.0|auto|FILE",
        help="whose targets and budgets: a version, or a file such as the official workload_targets.json "
        "(default: as workloads and meta_data say)",
    )
    parser.add_argument("--ruleset", choices=("auto", "external", "self"), default="auto", help="tuning ruleset")
    parser.add_argument(
        "--self_tuning_ruleset",
        dest="ruleset",
        action="store_const",
        const="self",
        help="the same as --ruleset=self",
    )
    parser.add_argument("--studies", type=_count, default=0, help="studies due (default: the version's)")
    parser.add_argument(
        "--target_relaxations",
        default="",
        metavar="all=0.05,NAME=0.10",
        help="make targets easier by a share of their value",
    )
    parser.add_argument("--include_submissions", metavar="PATTERN,PATTERN", help="only these, such as 'muon*'")
    parser.add_argument("--exclude_submissions", metavar="PATTERN,PATTERN", help="all but these")
    parser.add_argument("--framework", choices=("jax", "pytorch"), help="only trials of this framework")
    parser.add_argument("--no_cache", action="store_true", help="parse all logs again")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def goals(values: Sequence[str]) -> dict[str, float]:
    """``WORKLOAD=VALUE`` of each ``--target``.

    Raises:
      UserError: a value is not of this form.
    """
    found = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"--target={value}: write WORKLOAD=VALUE, such as mnist_vit=0.95") from None
    return found
