"""Where K-FAC-expand and K-FAC-reduce are exact, and where they are not: both halves of the table.

The exact half is asserted to 1e-10. The inexact half is asserted too, because a test that only knows the zeros
passes with a wrong scale elsewhere; its bounds lie well below the measured errors, which `pytest -s` prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.exactness_cases import TABLE, ZERO, Whiten, errors
from benchmarks.paper.ggn import relative_error


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("row", TABLE)
def test_row(row: str, approximation: str) -> None:
    case = TABLE[row].make()
    bound = getattr(case, approximation)
    for layer, error in errors(case, approximation).items():
        print(f"{row} {approximation} {layer}: {error:.3g}")
        if isinstance(bound, tuple):
            assert bound[0] < error < bound[1], layer
        elif bound == ZERO:
            assert error < ZERO, layer
        else:
            assert error > bound, layer


def test_whitening_gives_a_general_covariance() -> None:
    """Guards row 1: its output Hessian is neither diagonal nor a multiple of the identity."""
    root = Whiten(3).root
    precision = root @ root.T
    assert relative_error(precision.diag().diag(), precision) > 0.1


def test_the_page_says_what_is_held_here(tmp_path: Path) -> None:
    """The command writes a line for each layer of each case; what is said to be exact is below the bound."""
    assert main(["exactness", "--output", str(tmp_path / "page.md")]) == 0
    lines = [
        line for line in (tmp_path / "page.md").read_text().splitlines() if line[:2] == "| " and line[2].isdigit()
    ]
    assert len(lines) == sum(len(line.make().layers) for line in TABLE.values())
    for line in lines:
        for cell in line.split("|")[5:7]:
            assert ("**0**" in cell) == (float(cell.replace("*", "")) < ZERO), line
