"""Directories and archives of every shape: the same tidy table, and a line for each thing that does not belong."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from commands.errors import UserError
from scoring.read import folders, layout, logs
from tests.scoring.trees import META, curve, plain, write_runs, write_trial

KEYS = ["submission", "study", "workload", "framework", "trial"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path / "runs", {"fast": 2.0, "slow": 1.0}, studies=2, workloads=("mnist_vit",))


def names(root: Path | list[Path]) -> set[tuple[Any, ...]]:
    found = logs.read(root if isinstance(root, list) else [root])
    return set(found.trials[KEYS].itertuples(index=False, name=None))


WHOLE = {(name, f"study_{k}", "mnist_vit", "pytorch", 1) for name in ("fast", "slow") for k in (0, 1)}


def test_every_level(runs: Path) -> None:
    assert names(runs) == WHOLE
    assert names([runs / "fast", runs / "slow"]) == WHOLE
    assert names(runs.parent) == WHOLE
    one = {("fast", "study_1", "mnist_vit", "pytorch", 1)}
    study = runs / "fast" / "study_1"
    assert names(study) == one
    assert names(study / "mnist_vit_pytorch") == one
    assert names(study / "mnist_vit_pytorch" / "trial_1") == one


def test_a_run_without_studies(tmp_path: Path) -> None:
    write_trial(tmp_path / "exp" / "my run [2]" / "mnist_vit_jax" / "trial_3", "mnist_vit", curve("mnist_vit", 1))
    assert names(tmp_path / "exp") == {("my run [2]", "study_0", "mnist_vit", "jax", 3)}


def test_columns_and_types(runs: Path) -> None:
    evals = logs.read([runs]).evals
    assert list(evals.columns[:6]) == [*KEYS, "hyperparameters"]
    assert {"step", "time", "validation/accuracy", "test/loss"} <= set(evals.columns)
    assert evals["step"].dtype == evals["time"].dtype == evals["validation/accuracy"].dtype == "float64"
    assert isinstance(evals["submission"].dtype, pd.CategoricalDtype)
    assert set(evals["hyperparameters"]) == {'{"beta2": 0.999, "learning_rate": 0.001}'}
    assert "validation/num_examples" not in evals


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_archives(runs: Path, tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"packed{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted(runs.rglob("*")):
                out.write(path, path.relative_to(runs.parent))
    else:
        with tarfile.open(archive, f"w:{suffix[5:]}") as out:
            out.add(runs, "runs")
    unpacked, packed = logs.read([runs]), logs.read([archive])
    pd.testing.assert_frame_equal(unpacked.evals, packed.evals)
    assert packed.oddities.empty


def test_an_archive_of_studies_takes_its_own_name(runs: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "fast.tar.gz", "w:gz") as out:
        for study in (runs / "fast").iterdir():
            out.add(study, study.name)
    assert names(tmp_path / "fast.tar.gz") == {key for key in WHOLE if key[0] == "fast"}


def test_an_archive_beside_its_folder_counts_once(runs: Path) -> None:
    with tarfile.open(runs / "fast.tar", "w") as out:
        out.add(runs / "fast", "fast")
    found = logs.read([runs])
    assert len(found.trials) == len(WHOLE)
    assert (found.oddities["what"] == "duplicate trial").sum() == 2


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz", ".zip"])
def test_damaged_archive(runs: Path, tmp_path: Path, suffix: str) -> None:
    """What comes before the damage is kept, if anything; nothing is raised but the one-line error."""
    whole = Path(
        shutil.make_archive(
            str(tmp_path / "x"), {".tar.gz": "gztar", ".tar.xz": "xztar", ".zip": "zip"}[suffix], runs
        )
    )
    broken = runs / f"zz{suffix}"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = logs.read([runs])
    assert set(found.trials[KEYS].itertuples(index=False, name=None)) >= WHOLE
    assert "damaged archive" in set(found.oddities["what"])


def test_nothing_is_unpacked_outside(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as out:
        info = tarfile.TarInfo("../../evil/mnist_vit_jax/trial_1/eval_measurements.csv")
        out.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds no trial"):
        logs.read([archive])
    assert sorted(tmp_path.rglob("*")) == before


def test_what_lies_beside_trials(runs: Path) -> None:
    home = runs / "fast" / "study_0" / "mnist_vit_pytorch"
    better = curve("mnist_vit", 50.0)
    for name in ("trial_1_backup", "trial_1.old", "trial_1 (copy)", "trial_x", "checkpoints"):
        write_trial(home / name, "mnist_vit", better)
    write_trial(runs / "fast" / "study_0" / "trial_1", "mnist_vit", better)
    (home / "notes.txt").write_text("x")
    (runs / "README.md").write_text("x")
    clean = dict(_curves(runs).items())
    found = logs.read([runs])
    assert set(clean) == WHOLE
    kinds = found.oddities.groupby("what")["count"].sum()
    assert kinds["backup directory"] == 4
    assert kinds["stray directory"] == 1
    assert kinds["trial outside a workload"] == 1
    assert kinds["stray file"] == 2


def _curves(root: Path) -> dict[tuple[Any, ...], list[float]]:
    evals = logs.read([root]).evals
    return {
        tuple(key): part["validation/accuracy"].tolist()
        for key, part in evals.groupby(KEYS, observed=True)
        if len(part)
    }


class _Shuffled:
    """os.scandir with its entries in another order."""

    def __init__(self, path: str) -> None:
        with _scandir(path) as entries:
            self.entries = sorted(entries, key=lambda entry: (hash(entry.name) % 7, entry.name), reverse=True)

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(self.entries)

    def __exit__(self, *args: object) -> None:
        pass


_scandir = os.scandir


def test_directory_order_changes_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trial(runs / "fast" / "study_0" / "mnist_vit_jax" / "trial_1", "mnist_vit", curve("mnist_vit", 1))
    (runs / "fast" / "study_0" / "mnist_vit_jax" / "trial_2_old").mkdir()
    before = logs.read([runs], use_cache=False)
    monkeypatch.setattr(folders.os, "scandir", _Shuffled)
    after = logs.read([runs], use_cache=False)
    pd.testing.assert_frame_equal(before.evals, after.evals)
    pd.testing.assert_frame_equal(before.trials, after.trials)
    pd.testing.assert_frame_equal(before.oddities, after.oddities)


def test_the_same_name_in_two_inputs(runs: Path, tmp_path: Path) -> None:
    other = write_runs(tmp_path / "later", {"fast": 1.5}, studies=1, workloads=("mnist_vit",))
    found = logs.read([runs, other])
    assert set(found.trials["submission"]) == {"fast", "slow", "later/fast"}
    assert "same name twice" in set(found.oddities["what"])
    again = logs.read([runs, runs / "fast"])
    assert set(again.trials["submission"]) == {"fast", "slow"}
    assert len(again.trials) == len(WHOLE)


def test_studies_given_one_by_one(runs: Path) -> None:
    assert names([runs / "fast" / "study_0", runs / "fast" / "study_1"]) == {k for k in WHOLE if k[0] == "fast"}


def test_timestamps_are_no_part_of_a_name(tmp_path: Path) -> None:
    write_trial(
        tmp_path / "exp-2024-05-06-07-08-09" / "study_1" / "mnist_vit_jax" / "trial_1",
        "mnist_vit",
        curve("mnist_vit", 1),
    )
    assert names(tmp_path) == {("exp", "study_1", "mnist_vit", "jax", 1)}


def test_links_do_not_loop(runs: Path) -> None:
    (runs / "fast" / "study_0" / "loop").symlink_to(runs)
    (runs / "broken").symlink_to(runs / "nowhere")
    found = logs.read([runs])
    assert set(found.trials[KEYS].itertuples(index=False, name=None)) == WHOLE


def test_no_such_directory_and_no_trial(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        logs.read([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no trial"):
        logs.read([tmp_path / "empty"])
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match="neither a directory nor an archive"):
        logs.read([tmp_path / "file.txt"])


def test_a_trial_without_measurements_is_kept_as_such(runs: Path) -> None:
    write_trial(runs / "slow" / "study_2" / "mnist_vit_pytorch" / "trial_1", "mnist_vit", None)
    found = logs.read([runs])
    assert found.trials.set_index(KEYS)["evaluations"].loc[("slow", "study_2", "mnist_vit", "pytorch", 1)] == 0
    assert "no measurements" in set(found.oddities["what"])


def test_cache(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unchanged tree is not parsed again; any change is seen; a torn cache file is no harm."""
    from scoring.read import cache

    first = logs.read([runs])
    with monkeypatch.context() as patch:
        patch.setattr(logs, "parse", lambda *args: pytest.fail("parsed again"))
        again = logs.read([runs])
    pd.testing.assert_frame_equal(first.evals, again.evals)
    pd.testing.assert_frame_equal(first.trials, again.trials)
    pd.testing.assert_frame_equal(first.oddities, again.oddities)
    plain().to_csv(
        runs / "fast" / "study_0" / "mnist_vit_pytorch" / "trial_1" / "eval_measurements.csv", index=False
    )
    changed = logs.read([runs])
    assert len(changed.evals) != len(first.evals)
    for path in cache.folder().glob("*.npz"):
        path.write_bytes(path.read_bytes()[:1000])
    pd.testing.assert_frame_equal(logs.read([runs]).evals, changed.evals)


def test_an_unwritable_cache_is_no_error(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(logs.read([runs]).trials) == len(WHOLE)


def test_archive_names() -> None:
    assert folders.archive_stem("a.tar.gz") == "a"
    assert folders.archive_stem("a.b.ZIP") == "a.b"
    assert folders.archive_stem("a.csv") is None
    assert folders.archive_stem(".zip") is None


def test_meta_data_of_the_trees_name_known_workloads() -> None:
    assert all(layout.WORKLOAD.fullmatch(f"{name}_pytorch") for name in META)
