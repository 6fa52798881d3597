"""`python -m benchmarks.paper evidence`: the experiment's parts by hand, and what is kept and shown."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.paper.evidence import cases, command, cost, page, training
from benchmarks.paper.evidence.cases import EQUAL_COST, GRID, SEEDS
from benchmarks.paper.evidence.training import EVIDENCE, WIDTH, Case


def made_up(case):
    """The grid is best at 1e-3 by held-out images, and at 1e-1 on the test."""
    found = {"accuracy": 0.9, "log_likelihood": -0.3, "calibration": 0.02, "seconds": 10.0, "version": "0"}
    if case.method in EVIDENCE:
        value = -1.0 - case.width / 8
        return {**found, "seconds": 30.0, "evidence": value, "evidence_seconds": 2.0, "decay_found": 4e-3}
    best = {1e-3: -0.1, 1e-1: -0.2}.get(case.decay, -0.5)
    return {**found, "log_likelihood": -0.4 + case.decay, "held_out": best}


def test_scores_by_hand():
    """Four images: logits say (0.8, 0.2) and (0.5, 0.5) half of the time each."""
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5], [0.5, 0.5]]).log()
    found = training.scores(torch.nn.Identity(), logits, torch.tensor([0, 1, 0, 0]))
    assert found["accuracy"] == 0.75
    expected = (math.log(0.8) + math.log(0.2) + 2 * math.log(0.5)) / 4
    assert found["log_likelihood"] == pytest.approx(expected)
    # Half of the images in a bin that says 0.8 and is right in 0.5, half in one of 0.5 that is always right.
    assert found["calibration"] == pytest.approx(0.5 * 0.3 + 0.5 * 0.5)


def test_images_that_are_trained_on_are_not_tested_on():
    (images, labels), (others, their_labels) = training._data()
    assert (len(images), len(labels)) == (training.IMAGES, training.IMAGES)
    assert (len(others), len(their_labels)) == (4000, 4000)
    seen = {image.numpy().tobytes() for image in images}
    assert not any(other.numpy().tobytes() in seen for other in others)
    assert labels.bincount().tolist() == [training.IMAGES // 10] * 10


@pytest.mark.parametrize("method", [*EVIDENCE, "grid", "retrained"])
def test_a_run_of_each_method(monkeypatch, method):
    monkeypatch.setattr(training, "EPOCHS", 2)
    monkeypatch.setattr(training, "EVERY", 1)
    monkeypatch.setattr(training, "BURN_IN", 0)
    monkeypatch.setattr(training, "IMAGES", 300)
    found = training.run(Case(method, True, 2, 0.0 if method in EVIDENCE else 1e-3, 1))
    assert found["log_likelihood"] > -2.4
    assert ("held_out" in found) == (method == "grid")
    if method in EVIDENCE:
        assert found["evidence"] < 0
        assert found["decay_found"] != pytest.approx(1 / 300, rel=1e-2)


def test_it_goes_on_and_the_page_by_hand(tmp_path, capsys):
    runs, costs = cases.books(tmp_path)
    wanted, ran = cases.runs(), []

    def interrupted(case):
        if len(ran) == 7:
            raise KeyboardInterrupt
        ran.append(case)
        return made_up(case)

    with pytest.raises(KeyboardInterrupt):
        command.train(wanted, runs, runs=interrupted)
    runs, _ = cases.books(tmp_path)
    assert runs.missing(wanted) == wanted[7:]
    command.train(wanted, runs, runs=made_up)
    assert f"==> {len(wanted) - 7} runs" in capsys.readouterr().out
    assert runs.missing(wanted) == []
    for one in cases.costs():
        seconds = {"fit": 2.0, "evidence": 0.001, "passes": 1.5}
        costs.add(one, {"seconds": seconds, "peak_bytes": 5e7, "version": "0"})
    again = cases.retrained(runs)
    assert [(one.decay, one.augment) for one in again] == [(1e-3, False)] * 3 + [(1e-3, True)] * 3
    for one in again:
        runs.add(one, made_up(one) | {"log_likelihood": -0.35})
    text = page.page(runs, costs)
    assert "| as they are | evidence, reduce | 0.900 (0.900 to 0.900) | -0.300 (-0.300 to -0.300) |" in text
    assert "| as they are | grid of three, then on all images | 0.900 (0.900 to 0.900) | -0.350" in text
    assert "| 0.020 (0.020 to 0.020) | 40 |  | 0.001 (0.001 to 0.001) |" in text
    assert "| small | expand | 2.00 | 1.50 | 0.50 | 50 | 1.0 |" in text
    assert "| width 16 | -3.000 (-3.000 to -3.000) |" in text
    # Held-out images choose, not the test; the seconds are those of all that were tried.
    three = cases.by_grid(runs, False, EQUAL_COST, SEEDS[0])
    assert (three["decay"], three["seconds"]) == (1e-3, 30.0)
    assert cases.by_grid(runs, False, GRID, SEEDS[0])["decay"] == 1e-3
    assert cases.by_grid(runs, False, GRID, SEEDS[0], "log_likelihood")["decay"] == 1e-1


def test_an_incomplete_grid_chooses_nothing(tmp_path):
    runs, _ = cases.books(tmp_path)
    for decay in EQUAL_COST[:2]:
        one = Case("grid", False, WIDTH, decay, SEEDS[0])
        runs.add(one, made_up(one))
    assert cases.by_grid(runs, False, EQUAL_COST, SEEDS[0]) is None
    assert cases.retrained(runs) == []


def test_a_cost_is_measured_in_its_own_process():
    found = cost.measure(cost.Cost("reduce", "small"))
    assert found["seconds"]["fit"] > 0
    assert found["seconds"]["passes"] > 0
