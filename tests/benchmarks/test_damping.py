"""`python -m benchmarks.paper damping`: widths by hand, wrong factors in float64, what is run, kept and shown."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math

import pytest
import torch

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.preconditioner import LayerState
from algoperf_kfac.pytorch.scalings import inverse, power
from benchmarks.experiments.experiment import SEEDS as OF_EXPERIMENTS
from benchmarks.kept import Book
from benchmarks.paper.__main__ import main
from benchmarks.paper.damping import command, grid, reading, scale, training
from benchmarks.paper.damping.grid import GRAFTED, PAPER, QUICK, SHIPPED, Case, Part, Point
from benchmarks.paper.damping.training import Gained
from submissions.kfac_expand import DESCRIPTION
from tests.benchmarks.made_up import made_up

PART = Part("mnist_vit", (PAPER, GRAFTED), (1e-4, 1e-2, 1.0))


def test_steps_are_read_off_a_line_between_evaluations():
    curve = [[10, 2.0], [20, 1.0], [30, 0.5]]
    assert reading.reached(curve, 1.25) == pytest.approx(17.5)
    assert reading.reached(curve, 2.5) == 10
    assert reading.reached(curve, 0.4) == math.inf
    assert reading.reached([[10, None], [20, 1.0]], 1.5) == 20  # no line from what is not finite


def test_the_width_of_a_curve_by_hand():
    found = reading.width({1e-4: 40.0, 1e-2: 20.0, 1.0: 24.0})
    # 22 steps are within 10 %: half of the way to 24, a tenth of that to 40.
    assert found.best == 1e-2
    assert found.high == pytest.approx(1e-1)
    assert found.low == pytest.approx(10**-2.2)
    assert found.decades == pytest.approx(1.2)
    assert not found.open_below
    assert not found.open_above
    flat = reading.width({1e-4: 20.0, 1e-2: 21.0})
    assert flat.open_below
    assert flat.open_above
    assert (flat.low, flat.high) == (1e-4, 1e-2)
    beside = reading.width({1e-4: math.inf, 1e-2: 20.0, 1.0: math.inf})
    assert (beside.low, beside.high, beside.open_below) == (1e-2, 1e-2, False)
    assert reading.width({1e-2: math.inf}) is None


@pytest.mark.parametrize("scaling", scale.SCALINGS)
@pytest.mark.parametrize("mistake", ["A, R²", "B, 1/R²"])
def test_a_wrong_scale_is_nothing_to_relative_damping_and_another_damping_to_absolute(scaling, mistake):
    relative = scale.seen(scaling, "relative", mistake, "reduce")
    assert relative.off < 1e-10
    assert relative.shifted > 1e-2  # the control: another damping does end elsewhere
    absolute = scale.seen(scaling, "absolute", mistake, "reduce")
    assert absolute.off > 1e-2
    assert absolute.shifted < 1e-10


@pytest.mark.parametrize(("name", "base"), [("inverse", inverse.Scaling), ("power", power.Scaling)])
def test_what_is_not_grafted_is_multiplied_by_its_gain(name, base):
    gained = importlib.import_module(f"benchmarks.experiments.objects.gained_{name}").DESCRIPTION
    spec = LayerSpec("layer", "linear", "weight", None, (3, 2), 1, 2, 3, "expand", (2,), (3,))
    state = LayerState.zeros(spec, torch.zeros(1, dtype=torch.float64), {})
    state.a_basis, state.b_basis = [2 * torch.eye(2).double()[None]], [3 * torch.eye(3).double()[None]]
    state.a_values, state.b_values = [torch.ones(1, 2).double()], [torch.ones(1, 3).double()]
    momentum = torch.ones(1, 3, 2).double()

    def direction(scaling):
        state.a_operator, state.b_operator = scaling.operators(state)
        return scaling.precondition(state, momentum, momentum, 0.9)

    plain = direction(base(KFACConfig(length_factor=5.0)))
    torch.testing.assert_close(direction(gained.defaults["scaling"](KFACConfig(length_factor=5.0))), 5 * plain)


def test_every_point_of_the_whole_grid_can_be_configured():
    every = [point for part in grid.WHOLE for point in part.points()]
    default = [point for part in grid.DEFAULT for point in part.points()]
    assert set(default) < set(every)
    assert len(set(every)) == len(every) == 4 * 9 * 2 * 7
    for point in every:
        found = grid.hyperparameters(point, point.workload, 7.0, 1.0)
        _, config = DESCRIPTION.configure(found)
        assert config.damping_mode == point.form.mode
        assert config.length_rule == point.form.length
        assert config.floor == 0  # the damping is taken as it is
        assert (config.length_factor == 7.0) == (point.form.length == "none")
        assert grid.path(point).is_file()
    assert not {grid.TUNING_SEED, *grid.SEEDS} & set(OF_EXPERIMENTS)


def test_a_curve_takes_the_rate_that_ended_lowest_and_nothing_is_run_twice(tmp_path, capsys):
    book, gains = Book(Case, tmp_path / "runs.jsonl"), Book(Gained, tmp_path / "gains.jsonl")
    asked = []

    def train_one(point, case):
        asked.append(case)
        return made_up(case, best=3.0 if case.approximation == "reduce" else 1.0)

    training.train_parts([PART], book, gains, measure=lambda point: 2.0, train_one=train_one)
    assert "==> 51 runs" in capsys.readouterr().out
    assert len(asked) == 51 == sum(training.expected([PART]).values())
    of_seeds = [case for case in asked if case.seed != grid.TUNING_SEED and case.scaling != "nadamw"]
    assert {(case.approximation, case.rate) for case in of_seeds} == {("expand", 1.0), ("reduce", 3.0)}
    assert {case.gain for case in asked if case.length == "none"} == {2.0}
    training.train_parts([PART], book, gains, measure=lambda point: 9.9, train_one=train_one)
    assert len(asked) == 51
    assert "==> 0 runs" in capsys.readouterr().out


def test_one_run_and_one_gain(monkeypatch):
    """Two steps of each, as they are: a gain makes directions as long as NadamW's."""
    monkeypatch.setattr(training, "GAIN_STEP", 2)
    point = Point("mnist_vit", PAPER, "reduce", 1e-2)
    assert (
        0
        < training.gain(dataclasses.replace(point, damping=1e-2))
        < training.gain(dataclasses.replace(point, damping=1.0))
    )
    case = dataclasses.replace(grid.case_of(point, "mnist_vit", 100.0, 1.0, 1), steps=2)
    found = training.train(point, case)
    assert [step for step, _ in found["curve"]] == [2]
    assert 0 < found["curve"][0][1] < 10


@pytest.fixture
def short_comparison(monkeypatch):
    """Of right and wrong factors, five steps in each training; what comes of the whole of them is tested above."""
    monkeypatch.setattr(scale, "STEPS", 5)
    monkeypatch.setattr(scale, "_right", functools.cache(scale._right.__wrapped__))  # keeps none of them


@pytest.mark.usefixtures("short_comparison")
def test_the_page_and_the_figure_from_what_is_kept(tmp_path, capsys):
    book, gains = command.books(tmp_path)
    training.train_parts([PART], book, gains, measure=lambda _: 1.0, train_one=lambda _, case: made_up(case))
    training.train_parts(QUICK, book, gains, measure=lambda _: 1.0, train_one=lambda _, case: made_up(case))
    output = tmp_path / "generated" / "damping.md"
    assert main(["damping", "--quick", f"--results={tmp_path}", f"--output={output}"]) == 0
    assert "==> 0 runs" in capsys.readouterr().out
    text = output.read_text()
    assert "12 of the 504 points" in text
    assert "on 1 of 4 workloads (mnist_vit)" in text
    best, horizon = 0.5, grid.steps_of("mnist_vit")
    assert f"Steps to a loss of {reading.MARGIN * best:.3f}, of {horizon}" in text
    assert f"| {PAPER.title} | expand | 1e-02 |" in text
    assert SHIPPED.title not in text
    assert (tmp_path / "figures" / "damping.png").read_bytes()[:4] == b"\x89PNG"


def test_results_that_are_a_file_are_refused(tmp_path, capsys):
    (tmp_path / "kept.jsonl").touch()
    assert main(["damping", f"--results={tmp_path / 'kept.jsonl'}", f"--output={tmp_path / 'x.md'}"]) == 2
    assert "of damping it is a folder" in capsys.readouterr().err
