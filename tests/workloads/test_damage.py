"""A trial whose records a crash left empty or cut is unfinished: a note says so, and it goes on."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.workloads.helpers import arguments, metrics, shrink
from workloads import run, study
from workloads.runner import experiment

TRIAL = "e/bible_lm_pytorch/trial_1"
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "null": lambda _: b"null",
}


def _flags(folder, space, **changes):
    values = {"tuning_ruleset": None, "tuning_search_space": space, "rng_seed": 3, **changes}
    return arguments(folder, **values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and its search space."""
    folder = tmp_path_factory.mktemp("finished")
    space = folder / "space.json"
    space.write_text('[{"learning_rate": 0.01}]')
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        assert run.main(_flags(folder, space)) == 0
    return folder


def _damage(finished, folder, damage, *names):
    shutil.copytree(finished, folder)
    for name in names:
        path = folder / TRIAL / name
        path.write_bytes(DAMAGES[damage](path.read_bytes()))


def _assert_whole(finished, folder):
    assert metrics(folder / TRIAL) == metrics(finished / TRIAL)
    for path in (folder / TRIAL).glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)
    for name in ("outcome.json", "meta_data_0.json", "meta_data_1.json"):
        assert json.loads((folder / TRIAL / name).read_text())["rng_seed"] == 3
    assert json.loads((folder / TRIAL / "hparams.json").read_text()) == {"learning_rate": 0.01}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["outcome.json", "meta_data_0.json", "hparams.json"])
def test_damaged_record(small, finished, tmp_path, capsys, name, damage):
    folder = tmp_path / "x"
    _damage(finished, folder, damage, name)
    assert experiment.outcome(folder / TRIAL) is None
    assert run.main([*_flags(folder, finished / "space.json"), "--resume_last_run"]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert name in note
    assert "taken for unfinished" in note
    _assert_whole(finished, folder)


@pytest.mark.parametrize("seed", [3, None])
def test_all_records_damaged(small, finished, tmp_path, seed):
    """The checkpoint knows the seed, too."""
    folder = tmp_path / "x"
    names = [path.name for path in (finished / TRIAL).glob("*.json")]
    assert len(names) == 4
    _damage(finished, folder, "empty", *names)
    assert run.main([*_flags(folder, finished / "space.json", rng_seed=seed), "--resume_last_run"]) == 0
    _assert_whole(finished, folder)


def test_another_seed_is_refused_though_the_record_is_damaged(small, finished, tmp_path, capsys):
    folder = tmp_path / "x"
    _damage(finished, folder, "cut", "outcome.json", "meta_data_0.json")
    assert run.main([*_flags(folder, finished / "space.json", rng_seed=4), "--resume_last_run"]) == 2
    assert "--rng_seed=3" in capsys.readouterr().err


def test_outcome_of_other_keys_is_damaged(finished, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(finished, folder)
    (folder / TRIAL / "outcome.json").write_text("{}")
    assert experiment.outcome(folder / TRIAL) is None


def test_study_goes_on_with_a_damaged_trial(tmp_path, monkeypatch, capsys):
    flags = ["--submissions=nadamw", "--workloads=bible_lm", f"--experiment_dir={tmp_path}", "--max_global_steps=1"]
    trial = tmp_path / "nadamw/study_1/bible_lm_pytorch/trial_1"
    assert study.main(flags) == 0
    (trial / "outcome.json").write_text("")
    capsys.readouterr()
    assert study.main(flags) == 0
    printed = capsys.readouterr()
    assert "taken for unfinished" in printed.err
    assert "[1/1" in printed.out
    assert len(metrics(trial)) == 1
