"""The official scores, to the digit, from the official logs; and each step from there to the exact rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from scoring.judge import cells as cells_module
from scoring.judge import leaderboard, parity, score, trials, versions
from scoring.read import logs
from scoring.read.logs import Logs
from tests.scoring.official import PUBLISHED_05, logs_at
from tests.scoring.trees import official_meta, official_rows, write_official, write_trial


@pytest.fixture(scope="module")
def official() -> Logs:
    return logs.read([logs_at("ALGOPERF_V05_LOGS")], use_cache=False)


def test_the_published_scores(official: Logs) -> None:
    found = parity.scores(official, versions.rules_for(official.trials))
    assert found.round(4).to_dict() == PUBLISHED_05
    assert list(found.index) == list(PUBLISHED_05)


def test_each_difference_has_a_name(official: Logs) -> None:
    rules = versions.rules_for(official.trials)
    found = parity.compare(official, rules)
    table = found.scores
    exact = score.scores(
        cells_module.cells(cells_module.studies(trials.reach(official, rules), rules), rules), rules
    )
    assert table["exact"].to_dict() == pytest.approx(exact.to_dict(), abs=1e-12)
    steps = table[list(parity.STEPS)]
    assert (table["official"] + steps.sum(axis=1)).to_dict() == pytest.approx(exact.to_dict(), abs=1e-12)
    # The grid is off by up to half a cell per workload; the trial by index costs one submission half a point.
    assert steps["exact integral"].abs().max() < 0.005
    assert steps.loc["lawa_ema", "trial by cost, not index"] > 0.004
    assert found.medians["submission"].unique().tolist() == ["lawa_ema"]


def test_what_is_odd_in_the_official_logs(official: Logs) -> None:
    assert len(official.trials) == 3881
    assert int((official.trials["evaluations"] > 0).sum()) == 3700
    assert official.evals["believed"].all()
    kinds = official.oddities.groupby("what").size()
    assert kinds["no measurements"] == 181
    assert kinds["trial outside a workload"] == 18


def test_the_leaderboard_of_the_official_logs(official: Logs) -> None:
    board = leaderboard.build(official, replicates=200)
    assert board.reference == "baseline"
    assert set(board.ranking.index) == set(PUBLISHED_05)
    assert len(board.cells) == 11 * 8
    assert ((board.cells["reason"] == "") == board.cells["ratio"].between(1.0, 4.0)).all()
    reasons = board.cells.set_index(["submission", "workload"])["reason"]
    assert reasons["caspr_adaptive", "wmt"] == "held-out wmt_glu_tanh: no data"
    assert reasons["amos", "ogbg"] == "over 4 times the best"
    assert reasons["schedule_free_adamw", "imagenet_resnet"] == "never reached"


def test_steps_from_official_to_exact(tmp_path: Path) -> None:
    """One submission for each difference of procedure."""
    full: list[float | None] = [1000.0] * 5
    write_official(tmp_path, {name: {"imagenet_vit": full} for name in ("best", "late", "index")})
    write_official(tmp_path, {"few": {"imagenet_vit": [2000.0, 2000.0]}})
    for study in range(5):
        late = tmp_path / "late" / f"study_{study}" / "imagenet_vit_jax" / "trial_1"
        write_trial(late, "imagenet_vit", official_rows("imagenet_vit", 77521.0), official_meta("imagenet_vit"))
        index = tmp_path / "index" / f"study_{study}" / "imagenet_vit_jax"
        rows = official_rows("imagenet_vit", 2000.0)
        write_trial(index / "trial_1", "imagenet_vit", rows, official_meta("imagenet_vit"))
        rows = official_rows("imagenet_vit", 1500.0, misses=6)
        write_trial(index / "trial_2", "imagenet_vit", rows, official_meta("imagenet_vit"))
    runs = logs.read([tmp_path])
    changed = parity.compare(runs, versions.rules_for(runs.trials)).medians.set_index("submission")
    assert changed["why"].to_dict() == {
        "few": "missing studies",
        "index": "trial by cost, not index",
        "late": "runtime budget",
    }
    assert changed["official"].to_dict() == {"few": 2000.0, "index": 2000.0, "late": 77521.0}
    assert changed["exact"].to_dict() == {"few": float("inf"), "index": 1500.0, "late": float("inf")}
