"""The commands as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scoring.cli import main
from tests.scoring.trees import write_official, write_runs

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "scoring", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path / "runs", {"kfac": 2.0, "nadamw": 1.0}, studies=2, workloads=("bible_lm",))


def test_report(runs: Path, tmp_path: Path) -> None:
    done = command("report", runs / "kfac", runs / "nadamw", "--output_dir=out/here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "nadamw (reference)" in done.stdout
    assert (tmp_path / "out" / "here" / "report.html").exists()
    assert (tmp_path / "out" / "here" / "curves.png").exists()


def test_leaderboard_with_ours(runs: Path, tmp_path: Path) -> None:
    logs = write_official(
        tmp_path / "logs", {"baseline": {"ogbg": [900.0] * 3}, "fast": {"ogbg": [600.0] * 3}}, "0.6"
    )
    done = command("leaderboard", logs, "--ours", runs, "--workloads=ogbg", "--cost=steps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fast is first with a score of 1.0000 (1 of 1 workloads credited), 0.1665 ahead of")
    assert "AlgoPerf 0.6, external tuning, steps to target, exact rules" in lines[2]
    assert [line.split()[0] for line in lines[5:9]] == ["fast", "baseline", "kfac", "nadamw"]
    assert not (tmp_path / "report").exists()


def test_no_framework_is_imported(tmp_path: Path) -> None:
    """Scoring works without torch, jax, and the rest of the repository."""
    code = (
        "import pathlib, sys, scoring\n"
        "root = pathlib.Path(scoring.__file__).parent\n"
        "for path in root.rglob('*.py'):\n"
        "    name = '.'.join(path.relative_to(root.parent).with_suffix('').parts)\n"
        "    if path.stem != '__main__': __import__(name.removesuffix('.__init__'))\n"
        "print({'torch', 'jax', 'algoperf_kfac', 'submissions', 'workloads', 'absl'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["report", "--help"], ["leaderboard", "--help"], ["lint", "--help"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "docs/scoring.md" in capsys.readouterr().out


@pytest.mark.parametrize("workloads", ["base", "present", "ours"])
def test_logs_of_which_no_workload_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workloads: str
) -> None:
    logs = write_official(tmp_path / "logs", {"baseline": {"ogbg": [900.0] * 3}}, "0.6")
    for folder in list(logs.glob("baseline/*/ogbg_*")):
        for meta in folder.rglob("meta_data_*.json"):
            meta.unlink()
        folder.rename(folder.with_name(folder.name.replace("ogbg", "ours")))
    assert main(["leaderboard", str(logs), f"--workloads={workloads}"]) == 2
    assert "no workload of these logs has a target (ours): name a data file with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere", "--output_dir={tmp}/o"], "nowhere: no such file or directory"),
        (["report", "{tmp}", "--output_dir={tmp}/o"], "holds no trial"),
        (
            ["report", "{runs}", "--output_dir={runs}/kfac/study_0/bible_lm_pytorch/trial_1/hparams.json"],
            "File exists",
        ),
        (["report", "{runs}", "--output_dir={tmp}/o", "--reference=adam"], "there are kfac, nadamw"),
        (["report", "{runs}", "--output_dir={tmp}/o", "--target=bible_lm"], "write WORKLOAD=VALUE"),
        (["report", "{runs}", "--output_dir={tmp}/o", "--target=x=1"], "unknown workload x"),
        (["report", "{runs}", "--output_dir={tmp}/o", "--benchmark=0.7"], "neither a known version"),
        (["leaderboard", "{runs}", "--benchmark=0.6"], "nothing to score"),
        (["leaderboard", "{runs}", "--workloads=wmt"], "unknown workload wmt"),
        (["leaderboard", "{runs}", "--workloads=qualification"], "no qualification set"),
        (["leaderboard", "{runs}", "--reference=adam"], "there are kfac, nadamw"),
        (["leaderboard", "{runs}", "--cost=nonsense"], "no column 'nonsense'"),
        (["leaderboard", "{runs}", "--replicates=0"], "at least 1"),
        (["leaderboard", "{runs}", "--studies=-1"], "'-1' is no whole number"),
        (["leaderboard", "{runs}", "--workloads=,"], "no workload is named"),
        (["leaderboard", "{runs}", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["leaderboard", "{runs}", "--parity=compare", "--sweep"], "goes with none of"),
        (["leaderboard", "{runs}", "--target_relaxations=all"], "write NAME=SHARE"),
        (["leaderboard", "{runs}", "--include_submissions=adam*"], "no submission is called adam*"),
        (["leaderboard", "{runs}", "--exclude_submissions=*"], "no trial is left"),
        (["leaderboard", "{runs}", "--framework=jax"], "no framework is called jax: there are pytorch"),
        (["standing", "{runs}", "--output={tmp}/x.md", "--benchmark=2.0"], "neither a known version"),
        (["published", "{runs}", "--output_dir={tmp}"], "--source"),
        (["nonsense"], "invalid choice"),
        ([], "--help lists what there is"),
        (["lint", "nowhere"], "no such file"),
    ],
)
def test_mistakes_are_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code = main([argument.format(tmp=empty, runs=runs) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_mistake_as_typed(tmp_path: Path) -> None:
    done = command("report", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere: no such file or directory\n"


def test_lint_exit_codes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(runs)]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    (runs / "kfac" / "study_0" / "bible_lm_pytorch" / "trial_1_backup").mkdir()
    assert main(["lint", str(runs)]) == 0
    assert main(["lint", str(runs), "--strict"]) == 1
    (runs / "kfac" / "study_1" / "bible_lm_pytorch" / "trial_1" / "eval_measurements.csv").write_text("")
    capsys.readouterr()
    assert main(["lint", str(runs), "--all", f"--output_dir={tmp_path}"]) == 1
    shown = capsys.readouterr().out
    assert "empty file" in shown
    assert "backup directory" in shown
    assert "empty file" in (tmp_path / "oddities.csv").read_text()


@pytest.mark.parametrize("parity", ["official", "compare"])
def test_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str], parity: str) -> None:
    logs = write_official(tmp_path / "logs", {"a": {"ogbg": [900.0]}, "b": {"ogbg": [1500.0] * 3}}, "0.6")
    assert (
        main(["leaderboard", str(logs), f"--parity={parity}", "--workloads=ogbg", f"--output_dir={tmp_path / 'o'}"])
        == 0
    )
    shown = capsys.readouterr().out
    assert ("official procedure" in shown) == (parity == "official")
    assert ("missing studies" in shown) == (parity == "compare")
    assert any((tmp_path / "o").iterdir())
