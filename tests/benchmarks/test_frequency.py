"""`python -m benchmarks.paper frequency`: what runs do is counted, what they cost is told beside the model."""

from __future__ import annotations

import json
import math

import pytest

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.seconds import TABLES, Speed
from benchmarks.experiments import records, runs
from benchmarks.paper.__main__ import main
from benchmarks.paper.frequency import costs, page
from benchmarks.paper.frequency.costs import Costs, Work


def test_statistics_and_refreshes_of_a_run_are_counted():
    config = KFACConfig(
        factor_interval=2, refresh_interval=6, initial_statistics=4, initial_refreshes="every", scaling="polar"
    )
    # Statistics at 0 to 3, then 4, 6, ... 18; all layers at 0 to 4, then each at every third of the rest.
    found = costs.work_of(config, 20, 3)
    assert found.statistics == 12
    assert found.refreshes == pytest.approx(5 + 7 / 3)
    rare = KFACConfig(factor_interval=1, refresh_interval=100, initial_refreshes="every")
    assert costs.work_of(rare, 50, 2).refreshes == 50  # as often as can be, until the first interval is over


def test_costs_add_up():
    assert Costs(0.1, 0.01).of(Work(10, 5.0), 100) == pytest.approx(10.5)


def test_steps_from_a_curve_whose_beginning_is_not_kept():
    assert page.reached([[90, 0.5], [100, 0.3]], 0.4) == pytest.approx(95)
    assert page.reached([[90, 0.5], [100, 0.3]], 0.6) == 90
    assert page.reached([[90, None], [100, 0.3]], 0.4) == 100
    assert page.reached([[90, 0.5]], 0.4) == math.inf


def test_a_speed_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "SIZES", (8, 16))
    monkeypatch.setattr(costs, "SUMMED", 2**12)
    found = costs.speed(tmp_path / "speed.json")
    assert set(found.products) == {8, 16}
    kept = json.loads((tmp_path / "speed.json").read_text())
    kept["bytes_per_second"] = 7.0
    (tmp_path / "speed.json").write_text(json.dumps(kept))
    assert costs.speed(tmp_path / "speed.json").bytes_per_second == 7.0


def test_the_page_from_what_is_kept(tmp_path, monkeypatch, capsys):
    """Two of the variants, with made-up losses; the model with a speed of the test's."""
    one, results = page.EXPERIMENT, []
    for (name, workload, _), run in runs.runs_of(one).items():
        if workload == "mnist_vit" and name in ("base", "statistics 1"):
            loss, pace = (0.2, 50.0) if name == "base" else (0.1, 80.0)
            curve = [[100, loss + 0.1], [run.steps, loss]]
            found = {"loss": loss, "metric": 0.9, "steps_to_target": None, "ms_per_step": pace, "curve": curve}
            results.append({**runs.identity(run), **found})
    records.add(results, tmp_path / "experiments.jsonl")
    times = {name: {64: 1e-5, 512: 1e-3} for name in TABLES}
    monkeypatch.setattr(costs, "rates", lambda folder: costs.Rates(1e10, 1e9))
    monkeypatch.setattr(costs, "speed", lambda path: Speed("toy", **times, bytes_per_second=1e9))
    output = tmp_path / "frequency.md"
    assert main(["frequency", f"--results={tmp_path}", f"--output={output}"]) == 0
    text = output.read_text()
    # 1.1 times 0.2 is 0.22: after 100 + 44 * 0.8 steps of the base.
    assert "| base | 43 | 21 | 135 (135 to 135) | +0.000 (+0.000 to +0.000) | 50 | 50 | 6.8 | 6.8 |" in text
    assert "| statistics 1 | 144 | 34 | 100 (100 to 100) | -0.100 (-0.100 to -0.100) | 80 |" in text
    assert "Fewest seconds along *statistics*: statistics 1 (8.0 s)" in text
    assert "## mnist_resnet" not in text
    (tmp_path / "experiments.jsonl").write_text("")
    assert main(["frequency", f"--results={tmp_path}", f"--output={output}"]) == 2
    assert "python -m benchmarks.experiments run frequency" in capsys.readouterr().err
