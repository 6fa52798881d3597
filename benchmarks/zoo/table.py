"""The table of all models, as Markdown."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping

from benchmarks.zoo.measure import OPTIMIZERS, Row

PACKAGES = ("torch", "transformers", "timm", "torch_geometric", "scipy")
HEAD = ("model", "parameters", "covered", "core", "error", "warnings", "nadamw", "expand", "reduce", "cost")


def cells(name: str, row: Row) -> list[str]:
    trained = [f"{row.losses[optimizer]:.3g}" if row.losses else "" for optimizer in OPTIMIZERS]
    cost = " / ".join(f"{ratio:.1f}" for ratio in row.ratios.values())
    error = "" if math.isnan(row.error) else f"{row.error:.0e}" if row.error else "0"
    return [
        name, f"{row.parameters:,}", f"{row.covered:.2f}", f"{row.core:.2f}", error, str(len(row.warned)), *trained,
        cost,
    ]  # fmt: skip


def document(rows: Mapping[str, Row], skipped: Mapping[str, str], command: str, note: str) -> str:
    """The table as Markdown, with versions and what is not covered."""
    lines = [
        "# Models of other people",
        "",
        f"Made by `{command}`. Versions: {', '.join(versions())}.",
        "",
        "Tiny models from random configurations, on synthetic batches that they learn by heart. covered: share of",
        "the parameters with a K-FAC direction after three steps; core: the same without embeddings and",
        "normalisations; error: the largest difference between G^T A of the captured pairs and the weight's",
        f"gradient, relative to it. {note} cost: mean CPU seconds of a step of expand / reduce beside NadamW's.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells(name, row)) + " |" for name, row in rows.items()),
    ]
    if skipped:
        lines += ["", "Skipped: " + ", ".join(f"{name} ({why})" for name, why in skipped.items()) + "."]
    lines += ["", "What of the core is not covered:", ""]
    for name, row in rows.items():
        reasons: dict[str, list[str]] = {}
        for param, reason in row.rest.items():
            reasons.setdefault(reason, []).append(param)
        lines += [f"- {name}: {params[0]}{more(params)}: {reason}" for reason, params in reasons.items()]
    lines += ["", "Warnings:", ""]
    for name, row in rows.items():
        lines += [f"- {name}: {text}" for text in row.warned]
    return "\n".join(lines) + "\n"


def more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
