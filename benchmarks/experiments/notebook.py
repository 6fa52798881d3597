"""The experiments, in the order in which they were thought of. A verdict is written once all runs are in."""

from __future__ import annotations

from benchmarks.experiments.experiment import Experiment, Variant

EXPERIMENTS = (
    Experiment(
        name="controls",
        change="Is it the curvature of both sides that helps? One side alone, and the eigenvalues in random bases.",
        submission="kfac_expand",
        variants={name: Variant(submission=name) for name in ("only_a", "only_b", "random_basis")},
    ),
    Experiment(
        name="power",
        change="The power of the eigenvalues: 1 is K-FAC's own, 1/2 Adam's in the eigenbasis.",
        submission="kfac_expand",
        variants={f"p = {power:g}": Variant({"power": power}) for power in (0.5, 0.65, 1.0)},
    ),
    Experiment(
        name="fresh_statistics",
        change="Statistics at every step with a short memory, in place of every second one with a long memory.",
        submission="kfac_expand",
        variants={"fresh": Variant({"factor_interval": 1, "factor_decay": 0.9})},
    ),
)
