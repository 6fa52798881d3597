"""Colours and line styles: colour is the algorithm, line style the framework, the same in every figure.

The palettes were searched for so that every two colours, the ink included, stay apart under full deuteranopia as
well (tests/scoring/test_figures.py measures it), and stand out from the paper at 3:1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scoring.judge.frameworks import LABELLED, algorithm

LIGHT = ("#2121d9", "#d97d21", "#19a68e", "#c357d9", "#211173", "#733211")
DARK = ("#5b7cff", "#ffc72e", "#1f9f80", "#c060e0", "#8fdcff", "#8c5a2b")
INK = {"light": "#1b1c1e", "dark": "#e8e9eb"}
PAPER = {"light": "#ffffff", "dark": "#16181c"}
DASHES = {"jax": "7 4", "pytorch": ""}


@dataclass(frozen=True)
class Style:
    """How one row looks in every figure: ``colour`` names a variable of the page, ``dash`` is an SVG dash array."""

    colour: str
    dash: str = ""


def styles(
    names: Sequence[str], reference: str = "", frameworks: Mapping[str, str] | None = None
) -> dict[str, Style]:
    """A style for each row; the reference in ink.

    Args:
      names: rows, those of one submission in two frameworks as ``name (jax)`` and ``name (pytorch)``.
      reference: the row, or the submission, that is drawn in ink.
      frameworks: the framework of each row. The line tells frameworks apart only if there are two.
    """
    known = {name: _framework(name, frameworks or {}) for name in names}
    several = len({framework for framework in known.values() if framework in DASHES}) > 1
    others = sorted({algorithm(name) for name in names} - {algorithm(reference)})
    colours = {name: f"c{k % len(LIGHT)}" for k, name in enumerate(others)}
    return {
        name: Style(colours.get(algorithm(name), "ink"), DASHES.get(known[name], "") if several else "")
        for name in names
    }


def _framework(name: str, frameworks: Mapping[str, str]) -> str:
    match = LABELLED.fullmatch(name)
    return match["framework"] if match else frameworks.get(name, "")


def variables(theme: str) -> str:
    """The colours of a theme as custom properties of CSS."""
    colours = LIGHT if theme == "light" else DARK
    return " ".join([*(f"--c{k}: {colour};" for k, colour in enumerate(colours)), f"--ink: {INK[theme]};"])


def colour(name: str, theme: str = "light") -> str:
    """The colour a name such as ``c2`` or ``ink`` stands for."""
    if name == "ink":
        return INK[theme]
    return (LIGHT if theme == "light" else DARK)[int(name[1:])]
