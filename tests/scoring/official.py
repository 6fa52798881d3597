"""Where the official logs lie, which are no part of the repository, and what was published from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# variable of the environment -> the archive beside the repository
ARCHIVES = {
    "ALGOPERF_V05_LOGS": "algoperf_v05_external_tuning.tar.xz",
    "ALGOPERF_V10_LOGS": "algoperf_v10_self_tuning.tar.xz",
}

# Published on the AlgoPerf 0.5 leaderboard, external tuning.
PUBLISHED_05 = {
    "shampoo_submission": 0.7784,
    "schedule_free_adamw": 0.7077,
    "generalized_adam": 0.6383,
    "cyclic_lr": 0.6301,
    "nadamp": 0.5909,
    "baseline": 0.5707,
    "amos": 0.4918,
    "caspr_adaptive": 0.4722,
    "lawa_queue": 0.3699,
    "lawa_ema": 0.3384,
    "schedule_free_prodigy": 0.0,
}
# Published in 2026 for AlgoPerf 1.0, self-tuning.
PUBLISHED_10 = {
    "schedule_free_adamw_v2": 0.5679,
    "ademamix": 0.5191,
    "schedule_free_adamw": 0.4669,
    "nadamw_baselinev05": 0.4506,
    "schedule_free_adamw_jax_v2": 0.4405,
    "muon_torch": 0.4231,
    "schedule_free_adamw_jax": 0.4108,
    "nadamw": 0.3844,
    "muon_torch_replicated_torch_hps": 0.3827,
    "cautious_nadamw": 0.3143,
    "muon_torch_jax_hps_lr_fix": 0.3137,
    "muon_torch_replicated_jax_hps": 0.2969,
    "muon": 0.2845,
    "lion": 0.2783,
    "nadamw_resnet": 0.1857,
    "single_worker_diloco": 0.1369,
    "single_worker_dilocov2": 0.1302,
}


def logs_at(variable: str) -> Path:
    """What the variable names, or the archive beside the repository; without either the test is skipped."""
    beside = ROOT.parent / "shared" / "leaderboard" / ARCHIVES[variable]
    path = Path(os.environ.get(variable, beside))
    if not path.exists():
        pytest.skip(f"the official logs are not at {path}; name another place in {variable}")
    return path
