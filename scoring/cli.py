"""The command line: report, leaderboard, lint, standing, columns, published."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from commands.errors import UserError, run
from scoring.flags import goals, parser
from scoring.frames import records
from scoring.judge.rules import parse_relaxations
from scoring.read.logs import Logs, read


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

    other, relaxations = goals(flags.target), parse_relaxations(flags.target_relaxations)
    path = write.folder(flags.output_dir)
    runs = _logs(flags)
    result = report.build(runs, flags.benchmark, flags.ruleset, flags.reference, flags.studies, other, relaxations)
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
    from scoring.show import leaderboard_tables, sweep_tables, text

    if flags.replicates < 1:
        raise UserError("--replicates must be at least 1")
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
        sweep_tables.sweep_table(board),
        sweep_tables.newly_reached_table(board),
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
    from scoring.judge import parity
    from scoring.judge.selection import select
    from scoring.judge.versions import rules_for
    from scoring.pages import write
    from scoring.show import comparison_tables, text

    if flags.relative_to == "reference" or flags.against or flags.sweep:
        raise UserError("--parity=compare goes with none of --relative_to, --against, --sweep: leave those out")
    if flags.cost == "normalised":
        raise UserError("--parity=compare knows no --cost=normalised: compare by time, steps or a column")
    path = write.folder(flags.output_dir) if flags.output_dir else None
    runs = _logs(flags)
    rules = rules_for(runs.trials, flags.benchmark, flags.ruleset, None, flags.studies)
    rules = select(rules, flags.workloads, runs)
    rules = rules.relaxed(parse_relaxations(flags.target_relaxations))
    found = comparison_tables.comparison_tables(parity.compare(runs, rules, flags.cost))
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

    def command() -> int:
        flags = parser().parse_args(argv)
        return COMMANDS[flags.command](flags)

    return run(command)
