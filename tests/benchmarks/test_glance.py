"""`python -m benchmarks.paper glance`: the figure is made of what is kept, and says what is not."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.damping import command as damping
from benchmarks.paper.damping import training
from benchmarks.paper.damping.grid import QUICK
from benchmarks.paper.glance import sources
from benchmarks.paper.glance.command import RESULTS
from tests.benchmarks.made_up import made_up


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The repository's results, with made-up ones of damping."""
    folder = tmp_path_factory.mktemp("results")
    for name in sources.MADE_BY:
        (folder / name).parent.mkdir(exist_ok=True)
        if name != "damping.jsonl":
            shutil.copy(RESULTS / name, folder / name)
    book, gains = damping.books(folder)
    training.train_parts(QUICK, book, gains, train_one=lambda _, case: made_up(case))
    return folder


def test_the_figure_is_written_and_says_what_the_results_say(results, tmp_path):
    output = tmp_path / "figures" / "paper.png"
    assert main(["glance", f"--results={results}", f"--output={output}"]) == 0
    assert output.read_bytes()[:4] == b"\x89PNG"
    found = sources.read(results)
    table = (results / "suite" / "table.csv").read_text()
    of_graphs = found.steps["expand"]["molecules_gnn"]
    rows = dict.fromkeys(("kfac_expand", "nadamw"), 0.0)
    for name in rows:
        (line,) = (one for one in table.splitlines() if one.startswith(f"pytorch,new,molecules_gnn,{name},"))
        rows[name] = float(line.split(",")[6])
    assert of_graphs.middle == pytest.approx(rows["kfac_expand"] / rows["nadamw"])
    assert (
        found.exact["loss per position,\nsquared error"][0] < 1e-10 < found.exact["weighted sum,\nsquared error"][0]
    )
    assert {approximation for _, _, approximation in found.damping} == {"expand", "reduce"}


@pytest.mark.parametrize("name", sources.MADE_BY)
def test_what_is_missing_is_named_with_the_command_that_makes_it(results, tmp_path, capsys, name):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    (folder / name).unlink()
    output = tmp_path / "paper.png"
    assert main(["glance", f"--results={folder}", f"--output={output}"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {folder / name} is missing: {sources.MADE_BY[name]}\n"
    assert not output.exists()


def test_a_file_that_lacks_what_a_panel_shows_is_named(results, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    (folder / "update.jsonl").write_text("")
    assert main(["glance", f"--results={folder}", f"--output={tmp_path / 'paper.png'}"]) == 2
    assert "update.jsonl has no expand at batch 128: python -m benchmarks.paper update" in capsys.readouterr().err
