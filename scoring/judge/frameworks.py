"""A submission that ran one workload in two frameworks is two rows: ``name (jax)`` and ``name (pytorch)``."""

from __future__ import annotations

import re

import pandas as pd

from commands.errors import UserError

LABELLED = re.compile(r"(?P<submission>.+) \((?P<framework>jax|pytorch|unknown framework)\)")


def mixed(trials: pd.DataFrame) -> list[str]:
    """The submissions that ran at least one workload in more than one framework."""
    alike = trials.drop_duplicates(["submission", "workload", "framework"])
    return sorted(set(alike.loc[alike.duplicated(["submission", "workload"]), "submission"]))


def labelled(trials: pd.DataFrame) -> pd.DataFrame:
    """The table with the framework in the name of each submission that is mixed."""
    double = mixed(trials)
    if not double:
        return trials
    rows = zip(trials["submission"], trials["framework"], strict=True)
    names = [f"{name} ({framework or 'unknown framework'})" if name in double else name for name, framework in rows]
    return trials.assign(submission=names)


def algorithm(name: str) -> str:
    """The submission behind a row's name."""
    match = LABELLED.fullmatch(name)
    return match["submission"] if match else name


def named(wanted: str, names: list[str], flag: str) -> str:
    """The row a user means by a name.

    Raises:
      UserError: there is none of this name, or one for each framework.
    """
    if wanted in names:
        return wanted
    both = [name for name in names if algorithm(name) == wanted]
    if len(both) == 1:
        return both[0]
    if both:
        raise UserError(f"{flag}={wanted}: was run in two frameworks, name one of {', '.join(both)}")
    raise UserError(f"{flag}={wanted}: no such submission; there are {', '.join(names)}")
