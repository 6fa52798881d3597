"""A table for a paper: LaTeX with booktabs rules."""

from __future__ import annotations

from scoring.show.text import Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "·": r"$\cdot$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "<": r"$<$",
    ">": r"$>$",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def render(table: Table) -> str:
    """The table as a ``table`` environment; needs ``\\usepackage{booktabs}``."""
    kinds = "".join("l" if k in table.left else "r" for k in range(len(table.headers)))
    rows = [" & ".join(map(escape, row)) + r" \\" for row in table.rows]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\begin{{tabular}}{{{kinds}}}",
    ]
    lines += [r"\toprule", " & ".join(map(escape, table.headers)) + r" \\", r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", r"\end{table}", ""])
