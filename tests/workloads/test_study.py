"""Studies: layout, seeds, skipping of finished trials, failures that are told; and the demo on top."""

from __future__ import annotations

import json
import subprocess
import types
from pathlib import Path

import pytest

from tests.workloads.helpers import metrics, start_here
from workloads import demo, registry, study
from workloads.runner import jobs


def _main(folder, *flags):
    return study.main(
        [
            "--submissions=nadamw",
            "--workloads=bible_lm",
            f"--experiment_dir={folder}",
            "--max_global_steps=1",
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert _main(folder, "--num_studies=2", "--jobs=2") == 0
    return folder


def test_layout_and_seeds(finished):
    trials = [finished / f"nadamw/study_{j}/bible_lm_pytorch/trial_1" for j in (1, 2)]
    seeds = [json.loads((trial / "meta_data_0.json").read_text())["rng_seed"] for trial in trials]
    assert seeds == [study.study_seed(1), study.study_seed(2)]
    assert metrics(trials[0]) != metrics(trials[1])
    # Readers of the experiment take visible folders for submissions.
    assert [path.name for path in finished.iterdir() if not path.name.startswith(".")] == ["nadamw"]


def test_finished_trials_are_skipped(finished, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_start", lambda job: pytest.fail(f"{job.name} was started again"))
    assert _main(finished, "--num_studies=2") == 0
    assert capsys.readouterr().out.count(": kept, ") == 2


def test_trial_finished_with_another_limit_does_not_count(finished, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_start", start_here)
    assert study.main(["--submissions=nadamw", "--workloads=bible_lm", f"--experiment_dir={finished}"]) == 1
    errors = capsys.readouterr().err
    assert "FAILED, error: The trial" in errors
    assert "was finished with --max_global_steps=1, not None" in errors


def test_only_what_is_missing_is_run(finished, monkeypatch, capsys):
    started = []

    def fail(job):
        started.append(job.name)
        job.log.write_text("first line\nthe reason\n")
        return subprocess.Popen(["false"])

    monkeypatch.setattr(jobs, "_start", fail)
    assert _main(finished, "--num_studies=3", "--jobs=1") == 1
    assert started == ["nadamw/study_3/bible_lm_pytorch/trial_1"]
    assert "FAILED, the reason (see " in capsys.readouterr().err


def test_failure_is_told_with_its_reason(tmp_path, capsys, monkeypatch):
    space = tmp_path / "space.json"
    space.write_text('[{"learning_rate": -1}]')
    monkeypatch.setattr(jobs, "_start", start_here)
    assert _main(tmp_path / "x", f"--tuning_search_space={space}") == 1
    errors = capsys.readouterr().err
    assert "nadamw/study_1/bible_lm_pytorch/trial_1: FAILED" in errors
    assert "allowed is a number > 0" in errors
    assert "1 of the trials failed" in errors


def test_jobs_of_a_tuned_and_an_untuned_submission(tmp_path):
    space = tmp_path / "space.json"
    space.write_text('{"learning_rate": {"min": 1, "max": 2, "scaling": "log"}}')
    values = study.define()
    flags = [
        "study",
        "--submissions=nadamw,nadamw",
        "--workloads=mnist_vit",
        f"--experiment_dir={tmp_path}",
        f"--tuning_search_space=nadamw={space}",
        "--num_tuning_trials=4",
        "--hparam_start_index=2",
        "--nostop_at_target",
    ]
    values(flags)
    tuned = study._jobs_of(values)
    assert [job.folders[0].name for job in tuned[:2]] == ["trial_3", "trial_4"]
    assert "--hparam_start_index=2" in tuned[0].command
    assert "--num_tuning_trials=4" in tuned[0].command
    assert "--stop_at_target=False" in tuned[0].command
    assert "--save_checkpoints=True" in tuned[0].command
    (untuned,) = study.jobs(tmp_path, ["nadamw"], ["mnist_vit"], "pytorch", [1], {}, {})
    assert "--tuning_ruleset=self" in untuned.command


def test_each_submission_has_the_points_of_its_own_space_once(tmp_path):
    spaces = {"nadamw": 1, "adamw": 3}
    for name, count in spaces.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"learning_rate": 0.1}] * count))
    values = study.define()
    flags = [
        "study",
        "--submissions=nadamw,adamw,nadamw",
        "--workloads=mnist_vit,mnist_vit",
        f"--experiment_dir={tmp_path}",
        "--tuning_search_space=" + ",".join(f"{name}={tmp_path / name}.json" for name in spaces),
        "--num_tuning_trials=3",
    ]
    values(flags)
    found = [str(job.folders[0].relative_to(tmp_path)) for job in study._jobs_of(values)]
    assert found == [
        f"{name}/study_1/mnist_vit_pytorch/trial_{trial + 1}"
        for name, count in spaces.items()
        for trial in range(count)
    ]


@pytest.mark.parametrize("flag", ["workloads", "framework", "stages"])
def test_a_list_that_was_emptied_is_refused(flag, tmp_path, capsys):
    """Nothing to do would else be done at once, and well."""
    suite = ["--suite=embedded"] if flag == "stages" else []
    flags = ["--submissions=nadamw", *suite, f"--experiment_dir={tmp_path / 'runs'}", f"--{flag}="]
    assert study.main(flags) == 2
    assert f"--{flag}= names nothing" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_demo_trains_and_reports(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_start", start_here)
    monkeypatch.setattr(demo, "SUBMISSIONS", ("nadamw",))
    monkeypatch.setattr(demo, "TUNED", tmp_path)
    monkeypatch.setattr(registry, "BASES", ["bible_lm", "mnist_vit"])
    commands = []

    def report(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    # The demo's alone: trials run in this process, and read the machine's name by subprocesses.
    monkeypatch.setattr(demo, "subprocess", types.SimpleNamespace(run=report))
    flags = [f"--output_dir={tmp_path}", "--max_global_steps=1", "--framework=pytorch"]
    assert demo.main(flags) == 0
    for workload in ("mnist_vit", "bible_lm"):
        assert len(metrics(tmp_path / f"nadamw/study_1/{workload}_pytorch/trial_1")) == 1
    assert commands[0][1:] == ["-m", "scoring", "report", str(tmp_path), f"--output_dir={tmp_path / 'report'}"]
    assert f"The report lies in {tmp_path / 'report'}" in capsys.readouterr().out
    monkeypatch.setattr(jobs, "_start", lambda job: pytest.fail("nothing was left to train"))
    assert demo.main(flags) == 0


def test_demo_is_a_race_in_both_frameworks(tmp_path, monkeypatch):
    raced = []

    def run(todo, parallel):
        raced.extend(todo)
        return []

    record = {"ranking": [{"point": {"learning_rate": rate}} for rate in (0.1, 0.2)], "chosen": [2, 1]}
    (tmp_path / "chosen.json").write_text(json.dumps({"bible_lm": {"nadamw": record}}))
    monkeypatch.setattr(demo, "TUNED", tmp_path)
    monkeypatch.setattr(demo, "SUBMISSIONS", ("nadamw", "kfac_expand", "kfac_reduce"))
    monkeypatch.setattr(registry, "BASES", ["bible_lm", "mnist_vit"])
    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    assert demo.main([f"--output_dir={tmp_path / 'x'}"]) == 0
    assert {job.name for job in raced} == {
        f"{submission}/study_1/{workload}_{framework}/trial_1"
        for submission in ("nadamw", "kfac_expand", "kfac_reduce")
        for workload in ("mnist_vit", "bible_lm")
        for framework in ("pytorch", "jax")
    }
    # The best point where one was found, else the submission's own.
    for job in raced:
        space = [part for part in job.command if part.startswith("--tuning_search_space=")]
        if job.name.startswith("nadamw/study_1/bible_lm"):
            assert json.loads(Path(space[0].partition("=")[2]).read_text()) == [{"learning_rate": 0.1}]
        else:
            assert space == []
            assert "--tuning_ruleset=self" in job.command
