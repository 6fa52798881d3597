"""The way from the official procedure to the exact rules, in words."""

from __future__ import annotations

from scoring.frames import records
from scoring.judge.parity import Comparison
from scoring.show.text import Table


def comparison_tables(found: Comparison) -> list[Table]:
    """Official and exact scores with what each difference of procedure adds, and the medians that change."""
    table = Table("Official procedure against exact rules", ["submission", *found.scores.columns])
    for name, row in found.scores.iterrows():
        steps = [f"{value:+.4f}" if abs(value) >= 5e-5 else "·" for value in row.iloc[1:-1]]
        table.rows.append([str(name), f"{row['official']:.4f}", *steps, f"{row['exact']:.4f}"])
    changed = Table("Medians that differ", ["submission", "workload", "official", "exact", "why"], left=(0, 1, 4))
    for row in records(found.medians):
        changed.rows.append([row.submission, row.workload, f"{row.official:.1f}", f"{row.exact:.1f}", row.why])
    changed.note = "" if changed.rows else "No median differs."
    return [table, changed]
