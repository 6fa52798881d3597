"""The command line: report, leaderboard, lint, standing, columns, published."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pandas as pd

from scoring.errors import InputError
from scoring.frames import records
from scoring.judge.rules import parse_relaxations
from scoring.read.logs import Logs, read

EPILOG = (
    "Inputs are run directories, submission directories (study_<j>/<workload>_<framework>/trial_<i>), directories "
    "of submissions, or archives of any of these. docs/scoring.md describes the rules and the columns written."
)


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, as every other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists what there is)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m scoring", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(
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
    return parser


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


def _goals(values: Sequence[str]) -> dict[str, float]:
    goals = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            goals[name] = float(number)
        except ValueError:
            raise InputError(f"--target={value}: write WORKLOAD=VALUE, such as mnist_vit=0.95") from None
    return goals


def _logs(flags: argparse.Namespace) -> Logs:
    runs = read([*flags.logs, *getattr(flags, "ours", [])], not flags.no_cache)
    patterns = (flags.include_submissions, flags.exclude_submissions, flags.framework)
    if any(pattern is not None for pattern in patterns):
        runs = runs.select(
            submission=flags.include_submissions, exclude=flags.exclude_submissions, framework=flags.framework
        )
    return runs


def _report(flags: argparse.Namespace) -> int:
    from scoring.judge import report
    from scoring.pages import output, report_page, write
    from scoring.show import report_tables, text

    goals, relaxations = _goals(flags.target), parse_relaxations(flags.target_relaxations)
    path = write.folder(flags.output_dir)
    runs = _logs(flags)
    result = report.build(runs, flags.benchmark, flags.ruleset, flags.reference, flags.studies, goals, relaxations)
    output.write_report(result, runs, path)
    _say_assumed(result.rules.assumed)
    print(report_page.verdict(result), end="\n\n")
    for table in report_tables.tables(result):
        print(text.terminal(table), end="\n\n")
    _say_oddities(result.oddities)
    print(f"Written to {path}: report.html, report.md, report.json, table.csv, studies.csv, trials.csv, ...")
    return 0


def _leaderboard(flags: argparse.Namespace) -> int:
    from scoring.judge import leaderboard, sweep
    from scoring.pages import output, write
    from scoring.show import leaderboard_tables, text

    if flags.replicates < 1:
        raise InputError("--replicates must be at least 1")
    relaxations = parse_relaxations(flags.target_relaxations)
    path = write.folder(flags.output_dir) if flags.output_dir else None
    if flags.parity == "compare":
        return _compare(flags)
    runs = _logs(flags)
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
        flags.studies,
        relaxations,
        flags.against,
        sweep.SHARES if flags.sweep else (),
    )
    _say_assumed(board.rules.assumed)
    print(leaderboard_tables.verdict(board), end="\n\n")
    tables = [
        leaderboard_tables.ranking_table(board),
        leaderboard_tables.cost_table(board),
        leaderboard_tables.misses_table(board),
        leaderboard_tables.sweep_table(board),
        leaderboard_tables.newly_reached_table(board),
    ]
    for table in tables:
        if table is not None:
            print(text.terminal(table), end="\n\n")
    _say_oddities(board.oddities)
    if path:
        output.write_leaderboard(board, runs, path)
        print(f"Written to {path}: leaderboard.html, leaderboard.md, .json, .tex, ranking.csv, cells.csv, ...")
    return 0


def _compare(flags: argparse.Namespace) -> int:
    from scoring.judge import leaderboard, parity
    from scoring.judge.versions import rules_for
    from scoring.pages import write
    from scoring.show import leaderboard_tables, text

    if flags.relative_to == "reference" or flags.against or flags.sweep:
        raise InputError("--parity=compare goes with none of --relative_to, --against, --sweep: leave those out")
    if flags.cost == "normalised":
        raise InputError("--parity=compare knows no --cost=normalised: compare by time, steps or a column")
    path = write.folder(flags.output_dir) if flags.output_dir else None
    runs = _logs(flags)
    rules = rules_for(runs.trials, flags.benchmark, flags.ruleset, None, flags.studies)
    rules = leaderboard.select(rules, flags.workloads, runs)
    rules = rules.relaxed(parse_relaxations(flags.target_relaxations))
    found = leaderboard_tables.comparison_tables(parity.compare(runs, rules, flags.cost))
    _say_assumed(rules.assumed)
    print(f"{rules.title}\n")
    for table in found:
        print(text.terminal(table), end="\n\n")
    if path:
        write.write(path / "comparison.md", "\n\n".join(map(text.markdown, found)) + "\n")
    return 0


def _lint(flags: argparse.Namespace) -> int:
    from scoring import oddities
    from scoring.judge import trials
    from scoring.judge.lint import lint
    from scoring.judge.versions import rules_for
    from scoring.pages import write
    from scoring.show import report_tables, text

    path = write.folder(flags.output_dir) if flags.output_dir else None
    runs = _logs(flags)
    odd = oddities.Oddities()
    rules = rules_for(runs.trials, flags.benchmark, flags.ruleset, odd, flags.studies)
    rules = rules.relaxed(parse_relaxations(flags.target_relaxations))
    found = oddities.merge(lint(runs, rules, trials.reach(runs, rules)), odd.table())
    _say_assumed(rules.assumed)
    print(f"Judged by {rules.title}")
    if flags.all:
        for row in records(found):
            detail = f" ({row.detail})" if row.detail else ""
            print(f"{row.level}: {row.where}: {row.what}{detail}; {row.action}")
    elif len(found):
        print(text.terminal(report_tables.oddity_table(found)))
    counts = {level: int((found["level"] == level).sum()) for level in reversed(oddities.LEVELS)}
    print(", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items()))
    if path:
        write.write(path / "oddities.csv", write.csv(found))
    return int(counts["error"] > 0 or (flags.strict and counts["warning"] > 0))


def _published(flags: argparse.Namespace) -> int:
    from scoring.judge import published, trials
    from scoring.judge.versions import rules_for
    from scoring.pages import write

    path = write.folder(flags.output_dir)
    runs = _logs(flags)
    rules = rules_for(runs.trials, flags.benchmark, flags.ruleset)
    _say_assumed(rules.assumed)
    file = path / f"published_{rules.version}_{rules.ruleset}.json"
    write.write(file, published.make(trials.reach(runs, rules), rules, flags.source))
    print(f"Written: {file}")
    return 0


def _standing(flags: argparse.Namespace) -> int:
    from scoring.pages import markdown, standing_page, write

    path = Path(flags.output)
    write.folder(str(path.parent))
    names = " ".join(Path(name).name for name in flags.logs)
    command = f"python -m scoring standing {names} --output={path}"
    page = standing_page.build(_logs(flags), flags.benchmark, flags.ruleset, command)
    write.write(path, markdown.render(page))
    print(f"Written: {path}")
    return 0


def _columns(flags: argparse.Namespace) -> int:
    from scoring.show import report_tables, text

    print(text.markdown(report_tables.columns_table()))
    return 0


def _say_assumed(assumed: Sequence[str]) -> None:
    for said in assumed:
        print(f"assumed: {said}")


def _say_oddities(found: pd.DataFrame) -> None:
    from scoring import oddities

    short = oddities.summary(found)
    for row in records(short[short["level"] != "note"]):
        print(f"{row.level}: {row.what} ({row.places}x), such as {row.example}")


COMMANDS = {
    "report": _report,
    "leaderboard": _leaderboard,
    "lint": _lint,
    "standing": _standing,
    "columns": _columns,
    "published": _published,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    # A name in the logs may hold characters that the terminal cannot show; that is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        flags = _parser().parse_args(argv)
        return COMMANDS[flags.command](flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the pipe, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
