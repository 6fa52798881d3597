"""The command line: report, leaderboard, lint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from scoring.errors import InputError
from scoring.frames import records

EPILOG = (
    "Inputs are run directories, submission directories (study_<j>/<workload>_<framework>/trial_<i>), directories \
of submissions, or archives of any of these. The rules and the columns written are described in docs/scoring.md."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scoring", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{report,leaderboard,lint}")
    report = commands.add_parser("report", help="steps and time to target of a few runs", epilog=EPILOG)
    report.add_argument("runs", nargs="+", metavar="RUN_DIR")
    report.add_argument("--output_dir", default="report", help="where to write (default: %(default)s)")
    report.add_argument("--reference", help="algorithm the ratios are to (default: nadamw, if there)")
    report.add_argument("--studies", type=_count, default=0, help="studies expected; missing ones count as misses")
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
    board.add_argument("--output_dir", help="write HTML, Markdown, CSV and JSON there (default: only print)")
    board.add_argument("--reference", metavar="NAME", help="submission the speedups are over (default: a baseline)")
    board.add_argument(
        "--relative_to",
        choices=("group", "reference"),
        default="group",
        help="unit of the score: the best of the group, or the fixed costs of --reference",
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
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        default="auto",
        metavar="0.5|0.6|auto|FILE",
        help="whose targets and budgets (default: as the meta_data say)",
    )
    parser.add_argument("--ruleset", choices=("auto", "external", "self"), default="auto", help="tuning ruleset")
    parser.add_argument("--no_cache", action="store_true", help="parse all logs again")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _goals(values: Sequence[str]) -> dict[str, float]:
    goals = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            goals[name] = float(number)
        except ValueError:
            raise InputError(f"--target={value}: write WORKLOAD=VALUE, such as mnist_vit=0.95") from None
    return goals


def _report(flags: argparse.Namespace) -> int:
    from scoring.judge import report
    from scoring.pages import output
    from scoring.read import logs
    from scoring.show import text

    path = output.folder(flags.output_dir)
    runs = logs.read(flags.runs, not flags.no_cache)
    result = report.build(
        runs, flags.benchmark, flags.ruleset, flags.reference, flags.studies, _goals(flags.target)
    )
    output.write_report(result, runs, path)
    for table in report.tables(result):
        print(text.terminal(table), end="\n\n")
    _say_oddities(result.oddities)
    print(f"Written to {path}: report.html, report.md, curves.png, curves.svg, table.csv, trials.csv, ...")
    return 0


def _leaderboard(flags: argparse.Namespace) -> int:
    from scoring.judge import leaderboard, targets
    from scoring.pages import output
    from scoring.read import logs
    from scoring.show import text

    path = output.folder(flags.output_dir) if flags.output_dir else None
    if flags.replicates < 1:
        raise InputError("--replicates must be at least 1")
    runs = logs.read([*flags.logs, *flags.ours], not flags.no_cache)
    if flags.parity == "compare":
        rules = targets.rules_for(runs.trials, flags.benchmark, flags.ruleset)
        rules = leaderboard.select(rules, flags.workloads, runs)
        found = leaderboard.comparison_tables(runs, rules, flags.cost)
        for table in found:
            print(text.terminal(table), end="\n\n")
        if path:
            output.write(path / "comparison.md", "\n\n".join(map(text.markdown, found)) + "\n")
        return 0
    board = leaderboard.build(
        runs,
        flags.benchmark,
        flags.ruleset,
        flags.workloads,
        flags.cost,
        flags.reference,
        flags.relative_to == "reference",
        flags.parity == "official",
        flags.replicates,
    )
    print(text.terminal(leaderboard.ranking_table(board)), end="\n\n")
    print(text.terminal(leaderboard.cost_table(board)), end="\n\n")
    print(text.terminal(leaderboard.misses_table(board)), end="\n\n")
    _say_oddities(board.oddities)
    if path:
        output.write_leaderboard(board, runs, path)
        print(f"Written to {path}: leaderboard.html, leaderboard.md, leaderboard.json, ranking.csv, cells.csv, ...")
    return 0


def _lint(flags: argparse.Namespace) -> int:
    from scoring import oddities
    from scoring.judge import lint, report, targets, trials
    from scoring.pages import output
    from scoring.read import logs
    from scoring.show import text

    path = output.folder(flags.output_dir) if flags.output_dir else None
    runs = logs.read(flags.logs, not flags.no_cache)
    odd = oddities.Oddities()
    rules = targets.rules_for(runs.trials, flags.benchmark, flags.ruleset, odd)
    found = oddities.merge(lint.lint(runs, rules, trials.reach(runs, rules)), odd.table())
    if flags.all:
        for row in records(found):
            detail = f" ({row.detail})" if row.detail else ""
            print(f"{row.level}: {row.where}: {row.what}{detail}; {row.action}")
    elif len(found):
        print(text.terminal(report.oddity_table(found)))
    counts = {level: int((found["level"] == level).sum()) for level in reversed(oddities.LEVELS)}
    print(", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items()))
    if path:
        output.write(path / "oddities.csv", output.csv(found))
    return int(counts["error"] > 0 or (flags.strict and counts["warning"] > 0))


def _say_oddities(found: object) -> None:
    from scoring import oddities

    short = oddities.summary(found)  # type: ignore[arg-type]
    for row in records(short[short["level"] != "note"]):
        print(f"{row.level}: {row.what} ({row.places}x), such as {row.example}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 1."""
    flags = _parser().parse_args(argv)
    try:
        return {"report": _report, "leaderboard": _leaderboard, "lint": _lint}[flags.command](flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the pipe, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
