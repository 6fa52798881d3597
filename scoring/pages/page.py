"""A page as data: built once, written as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scoring.show.panel import Panel
from scoring.show.text import Table


@dataclass
class Figure:
    """Panels under one caption. ``folded`` hides them until asked for."""

    caption: str
    panels: Sequence[Panel]
    folded: bool = False


@dataclass
class Section:
    """One part of a page: a heading, then paragraphs, figures and tables, in this order."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Page:
    """A whole page.

    Attributes:
      title: its heading.
      verdict: the one sentence at the top.
      lead: paragraphs below it; what had to be assumed comes first.
      sections: what follows.
      pictures: by file, what it shows; for Markdown, which has no figures of its own.
    """

    title: str
    verdict: str
    lead: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
