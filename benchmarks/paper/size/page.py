"""The page: tiny models beside the exact curvature, published ones on paper, the ladder as far as it was run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kept import Book
from benchmarks.paper.size import exact_page, ladder_page, paper_page
from benchmarks.paper.size.costs import Sized
from benchmarks.paper.size.ladder import Training
from benchmarks.paper.size.tiny import Tiny

HEAD = """# How expand and reduce scale with the size of language models

Written by `python -m benchmarks.paper size`, in PyTorch: open question 1 of the paper, from three sides.
"""


def page(exact: Book[Tiny], sizes: Sequence[Sized], trained: Book[Training]) -> str:
    """The whole page; what was not run is a dash, and said.

    Args:
        exact: kept comparisons with the exact curvature.
        sizes: plans of published models.
        trained: kept runs of the ladder.
    """
    lines = [*exact_page.lines(exact), *paper_page.lines(sizes), *ladder_page.lines(trained)]
    return "\n".join([HEAD, *lines]).rstrip() + "\n"
