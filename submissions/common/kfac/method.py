"""What the descriptions of the K-FAC submissions have in common."""

from __future__ import annotations

from algoperf_kfac.config import KFACConfig
from submissions.common.description import Description

TEXT = (
    "The momentum of covered layers (linear and convolutional) is whitened by both Kronecker factors (Eschenhagen "
    "et al., 2023, https://arxiv.org/abs/2311.00636), replaced by its polar factor, as Muon does without factors, "
    "and given a fixed root mean square. All other parameters take the NadamW update. Linear warm-up, then cosine "
    "decay; in self-tuning once more where time is left."
)
# One point per approximation, the same for every workload; this much of it is the same for both. Found on four
# workloads of the suite (docs/experiments.md), with refreshes at each of the first steps and without a noise floor.
POINT = {
    "one_minus_beta1": 0.2,
    "beta2": 0.99,
    "weight_decay": 0.2,
    "grad_clip": 0.25,
    "scaling": "polar",
    "length": "rms",
    "length_factor": 0.5,
    "polar_steps": 3,
    "noise_floor": 0.0,
    "statistics_rows": 1024,
    "statistics_rows_by_side": True,  # no fewer than a factor has
    "initial_refreshes": "every",
    "max_factor_dim": 4096,
}
# Some official workloads have time for a fifth of their step hint: a schedule by steps would not end there. On
# others the time is long enough for a second one, where the first has not reached the target. And
# factors of the largest model, decomposed as often as those of the small ones the point was found on, would take
# several times what its steps do. A tenth is a choice, not a result of tuning.
SELF_TUNING = {"schedule_clock": "restart", "refresh_budget": 0.1}


def kfac(title: str, setting: str, **point: object) -> Description[KFACConfig]:
    """The description of a K-FAC submission.

    Args:
        title: its name to people.
        setting: what it makes of positions that share a weight, in one sentence.
        **point: its own point, where it differs from `POINT`.
    """
    text = f"{title}: {setting} {TEXT}"
    return Description(title, text, KFACConfig, POINT | point, self_tuning=SELF_TUNING)
