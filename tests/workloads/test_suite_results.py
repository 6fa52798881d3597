"""The tables and the figure of a suite, from trials that took no time."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from benchmarks import suite_figure, suite_paces, suite_results, suite_table
from commands import documents
from commands.errors import UserError
from tests.workloads.fake_training import Trainer
from workloads import registry, study
from workloads.runner import jobs
from workloads.studies import archives, suite, suite_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """NadamW reaches both targets at step 40, or 50 on odd seeds, K-FAC-expand at 20 or 30, K-FAC-reduce never."""
    folder = tmp_path_factory.mktemp("suite")
    points = {"nadamw": [0.025, 0.026], "kfac_expand": [0.05, 0.051], "kfac_reduce": [0.001, 0.0011]}
    spaces = []
    for name, rates in points.items():
        (folder / f"{name}.json").write_text(json.dumps([{"learning_rate": rate} for rate in rates]))
        spaces.append(f"{name}={folder / name}.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_start", Trainer())
        patch.setattr(suite_run, "report", lambda *_: True)
        patch.setitem(
            suite.SUITES, "embedded", suite.Suite(tuple(points), points=2, raced=1, raced_on_variants=1, studies=3)
        )
        flags = ["--suite=embedded", "--workloads=mnist_vit,bible_lm", f"--experiment_dir={folder / 'x'}"]
        assert study.main([*flags, f"--tuning_search_space={','.join(spaces)}"]) == 0
    return folder / "x"


def test_what_nobody_tuned_on_comes_first(finished, monkeypatch):
    monkeypatch.setattr(registry.WORKLOADS["bible_lm"].task(), "tuned_on", False)
    judged = suite_results.judge(finished / "race", 3)
    assert [(one.group.key, one.group.workloads) for one in judged] == [
        ("new", ("bible_lm",)),
        ("tuned_on", ("mnist_vit",)),
    ]


def test_variants_stand_apart_behind_what_they_are_variants_of():
    names = ["mnist_vit_glu", "brain_unet_tanh", "mnist_vit", "brain_unet", "unknown"]
    assert [(one.key, one.workloads) for one in suite_results.groups(names)] == [
        ("new", ("brain_unet",)),
        ("variants", ("brain_unet_tanh",)),
        ("tuned_on", ("mnist_vit",)),
        ("variants_of_tuned_on", ("mnist_vit_glu",)),
    ]


def test_where_the_reference_missed_the_ratio_is_a_bound(finished, tmp_path, monkeypatch):
    """NadamW counts as its step hint there, 400 steps; the table and the figure say so."""
    missed = shutil.copytree(finished, tmp_path / "missed")
    for path in missed.glob("race/nadamw/*/mnist_vit_pytorch/*/outcome.json"):
        outcome = json.loads(path.read_text())
        path.write_text(json.dumps(outcome | {"steps_to_target": None}))
        measurements = path.with_name("eval_measurements.csv")
        table = pd.read_csv(measurements)
        table.assign(**{"validation/accuracy": 0.0}).to_csv(measurements, index=False)
    (one,) = suite_results.judge(missed / "race", 3)
    mean = one.means["steps"].loc["kfac_expand"]
    assert (mean["workloads"], mean["bounded"]) == (2, 1)
    assert mean["ratio"] == pytest.approx((30 / 50 * 30 / 400) ** 0.5)
    seconds = one.means["time"].loc["kfac_expand", "ratio"]
    outcome = json.loads(next(missed.glob("pace/nadamw/*/mnist_vit_pytorch/*/outcome.json")).read_text())
    first, steps = outcome["first_step_time"], outcome["global_step"]
    allowed = first + 399 * (outcome["accumulated_submission_time"] - first) / (steps - 1)
    costs = one.cells["time"].set_index(["submission", "workload"])["cost"]
    other = costs["kfac_expand", "bible_lm"] / costs["nadamw", "bible_lm"]
    assert seconds == pytest.approx((costs["kfac_expand", "mnist_vit"] / allowed * other) ** 0.5)
    summary = suite_table.summary_table(one, "title")
    shown = {row[0]: row[1] for row in summary.rows}
    assert shown["kfac_expand"].startswith("≤ 0.21 [")
    assert (shown["nadamw"], shown["kfac_reduce"]) == ("1.00", "–")
    labels: list[str] = []
    annotate = Axes.annotate
    monkeypatch.setattr(
        Axes, "annotate", lambda self, text, *a, **k: labels.append(text) or annotate(self, text, *a, **k)
    )
    suite_figure.draw([one])
    assert labels.count("missed") == 2  # K-FAC-reduce's steps and time
    assert labels.count("≤ 0.21") == 2


def test_tables_figure_and_rows(finished, tmp_path):
    (one,) = suite_results.judge(finished / "race", 3)
    assert one.submissions == ["kfac_expand", "nadamw", "kfac_reduce"]
    summary = suite_table.summary_table(one, "title")
    # Seeds 1001, 1002, 1003: two odd ones, so the medians are 30 and 50.
    assert summary.rows[0][:3] == ["kfac_expand", "0.60 [0.40 to 0.75]", "2 of 2"]
    assert summary.rows[2][:3] == ["kfac_reduce", "–", "0 of 2"]
    cells = suite_table.cost_table(one, "steps")
    assert cells.rows[0] == ["kfac_expand", *["30 (20 to 30)"] * 2]
    assert cells.rows[2] == ["kfac_reduce", *["miss, 0 of 3"] * 2]
    table = suite_table.rows([one])
    assert table.query("submission == 'nadamw'")["steps"].tolist() == [50, 50]
    assert suite_figure.draw([one]).startswith(b"\x89PNG")
    archives.pack(finished, tmp_path / "packed")
    archives.unpack(tmp_path / "packed", tmp_path / "y")
    (again,) = suite_results.judge(tmp_path / "y/race", 3)
    pd.testing.assert_frame_equal(suite_table.rows([again]), table, rtol=1e-5)


def test_times_are_at_the_pace_measured_alone(finished, tmp_path):
    (one,) = suite_results.judge(finished / "race", 3)
    assert one.alone == ("mnist_vit", "bible_lm")
    for path in finished.glob("pace/kfac_expand/*/mnist_vit_pytorch/trial_1/outcome.json"):
        slower = tmp_path / "slower"
        shutil.copytree(finished, slower)
        outcome = json.loads(path.read_text())
        outcome |= {"first_step_time": 1.0, "accumulated_submission_time": 1.0 + 0.5 * (outcome["global_step"] - 1)}
        (slower / path.relative_to(finished)).write_text(json.dumps(outcome))
    (again,) = suite_results.judge(slower / "race", 3)
    seconds = suite_table.rows([again]).set_index(["submission", "workload"])["seconds"]
    assert seconds["kfac_expand", "mnist_vit"] == pytest.approx(1.0 + 0.5 * 29)  # the median study: 30 steps
    before = suite_table.rows([one]).set_index(["submission", "workload"])["seconds"]
    assert seconds["nadamw", "mnist_vit"] == pytest.approx(before["nadamw", "mnist_vit"])
    # A submission without a pace: all times of the workload are those of the race.
    shutil.rmtree(slower / "pace/kfac_expand/study_1/mnist_vit_pytorch")
    (rest,) = suite_results.judge(slower / "race", 3)
    assert rest.alone == ("bible_lm",)
    assert "Of bible_lm: the race's steps" in suite_table.cost_table(rest, "time").note
    assert "of mnist_vit: as the race took them" in suite_table.cost_table(rest, "time").note


def slowed(path, factors):
    """A trial's seconds, of training and evaluations, so many times as long."""
    table = pd.read_csv(path)
    for name in ("accumulated_submission_time", "accumulated_eval_time"):
        table[name] = (np.diff(table[name], prepend=0.0) * np.resize(factors, len(table))).cumsum()
    table.to_csv(path, index=False)
    spent = table["accumulated_submission_time"]
    outcome = json.loads(path.with_name("outcome.json").read_text())
    outcome |= {"first_step_time": 0.1 * factors[0], "accumulated_submission_time": spent.iloc[-1]}
    path.with_name("outcome.json").write_text(json.dumps(outcome))


def paces(directory, **factors):
    """Seconds a step on mnist_vit, of a suite whose submissions' paces were slowed down."""
    for name, slower in factors.items():
        (path,) = directory.glob(f"pace/{name}/*/mnist_vit_pytorch/trial_1/eval_measurements.csv")
        slowed(path, slower)
    return {place[0]: pace.later for place, pace in suite_paces.read(directory).items() if place[1] == "mnist_vit"}


def test_paces_do_not_depend_on_how_fast_the_machine_was(finished, tmp_path):
    """One submission is measured while everything takes twice as long, or while it does so half of the time."""
    alone = paces(finished)
    slower = paces(shutil.copytree(finished, tmp_path / "slower"), nadamw=[2.0])
    assert slower == pytest.approx(alone)
    place = "nadamw", "mnist_vit", "pytorch"
    measured = suite_paces.read(tmp_path / "slower", one_speed=False)[place].later
    assert measured == pytest.approx(2 * suite_paces.read(finished, one_speed=False)[place].later)
    half = paces(shutil.copytree(finished, tmp_path / "half"), nadamw=[1.0, 1.0, 2.0, 2.0])
    assert half == pytest.approx(alone, rel=0.15)  # between the speeds lies an interval with ends of both


def test_paces_without_evaluations_are_as_they_were_measured(finished, tmp_path):
    here = shutil.copytree(finished, tmp_path / "x")
    (path,) = here.glob("pace/kfac_expand/*/mnist_vit_pytorch/trial_1/eval_measurements.csv")
    pd.read_csv(path).assign(accumulated_eval_time=0.0).to_csv(path, index=False)
    assert paces(here, nadamw=[2.0])["nadamw"] == pytest.approx(2 * paces(finished)["nadamw"])


def test_paces_are_of_a_framework(finished, tmp_path):
    """Races in JAX whose paces were not measured, beside those in PyTorch whose were."""
    both = shutil.copytree(finished, tmp_path / "both")
    for path in both.glob("race/*/study_*/*_pytorch"):
        shutil.copytree(path, path.with_name(path.name.replace("pytorch", "jax")))
    pytorch, jax = suite_results.judge(both / "race", 3)
    assert (pytorch.framework, pytorch.alone) == ("pytorch", ("mnist_vit", "bible_lm"))
    assert (jax.framework, jax.alone) == ("jax", ())
    assert "Of mnist_vit, bible_lm: as the race took them" in suite_table.cost_table(jax, "time").note
    assert "second program" in suite_table.pace_table(jax).note
    assert not suite_table.pace_table(pytorch).note


def test_the_page_says_what_each_side_was_given(finished):
    judged = suite_results.judge(finished / "race", 3)
    notes = json.loads((finished / "suite.json").read_text())
    page = suite_table.page(judged, archives.chosen_records(finished), notes, "figures/suite.png")
    assert "Each submission was given 2 points of its own space" in page
    assert "its best 1 were raced on the seeds 1001, 1002, 1003, 2 processes on" in page
    assert page.count("### ") == 1 + 3 + 1  # a summary, three tables below it, the edges


def test_best_points_at_an_edge_are_said(finished):
    record = {"chosen": [3], "at_an_edge": {"trial_3": ["learning_rate (high)"]}}
    inside = {"chosen": [1], "at_an_edge": {"trial_1": []}}
    table = suite_table.edges_table({"bible_lm": {"nadamw": record, "soap": inside}})
    assert table.rows == [["bible_lm", "nadamw", "learning_rate (high)"]]
    assert table.note.startswith("1 of 2 best points.")


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    document = tmp_path / "results.md"
    document.write_text(f"before\n{suite_table.BEGIN}\nold\n{suite_table.END}\nafter\n")
    documents.insert(document, suite_table.BEGIN, suite_table.END, "new")
    assert document.read_text() == f"before\n{suite_table.BEGIN}\n\nnew\n\n{suite_table.END}\nafter\n"
    document.write_text("nothing")
    with pytest.raises(UserError, match="lacks the lines"):
        documents.insert(document, suite_table.BEGIN, suite_table.END, "new")
