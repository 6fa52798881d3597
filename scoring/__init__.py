"""Scores of AlgoPerf runs: logs -> one tidy table -> time and steps to target -> profiles, scores, reports.

>>> import scoring, scoring.example
>>> runs = scoring.read(scoring.example.write())       # paths; runs.evals, runs.trials, runs.oddities
>>> rules = scoring.rules_for(runs)                    # or scoring.load_version("1.0", "self")
>>> trials = scoring.reach(runs, rules)                # one row per trial
>>> trials[["submission", "workload", "steps", "time"]].to_dict("records")[0]
{'submission': 'fast', 'workload': 'ogbg', 'steps': 20000.0, 'time': 4000.0}
>>> board = scoring.leaderboard(runs.select(workload="ogbg,wmt"), workloads="present")
>>> board.ranking["score"].round(4).to_dict()
{'fast': 1.0, 'slow': 0.8333}
>>> scoring.report(runs, reference="slow").summary.query("workload == 'wmt'")["steps_ratio"].tolist()
[1.0, 0.5]

The rooms: ``read`` (files to tables), ``judge`` (tables to results), ``show`` (results to texts and figures) and
``pages`` (HTML, Markdown, files). ``python -m scoring --help`` lists the commands; docs/scoring.md has the rules.
"""

from __future__ import annotations

from commands.errors import UserError
from scoring.facts import versions
from scoring.judge.cells import cells, studies
from scoring.judge.leaderboard import Leaderboard
from scoring.judge.leaderboard import build as leaderboard
from scoring.judge.report import Report
from scoring.judge.report import build as report
from scoring.judge.rules import Rules, Target
from scoring.judge.score import scores
from scoring.judge.trials import reach
from scoring.judge.versions import load as load_version
from scoring.judge.versions import rules_for as _rules_for
from scoring.read.logs import Logs, read

__all__ = [
    "Leaderboard",
    "Logs",
    "Report",
    "Rules",
    "Target",
    "UserError",
    "cells",
    "leaderboard",
    "load_version",
    "reach",
    "read",
    "report",
    "rules_for",
    "scores",
    "studies",
    "versions",
]


def rules_for(logs: Logs, version: str = "auto", ruleset: str = "auto") -> Rules:
    """The rules logs are judged by, see ``scoring.judge.versions.rules_for``."""
    return _rules_for(logs.trials, version, ruleset)
