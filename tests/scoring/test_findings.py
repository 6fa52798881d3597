"""Nothing odd is silent: missing metrics, lost trials, copies, names and archives of every kind."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands.errors import UserError
from scoring.cli import main
from scoring.judge import cells, leaderboard, lint, trials, versions
from scoring.read import logs
from scoring.read.logs import Logs
from tests.scoring.trees import official_meta, official_rows, write_official, write_trial

KEYS = ["submission", "study", "workload", "framework", "trial"]


def names(root: Path) -> set[tuple[object, ...]]:
    return set(logs.read([root]).trials[KEYS].itertuples(index=False, name=None))


def findings(root: Path) -> pd.DataFrame:
    runs = logs.read([root])
    rules = versions.rules_for(runs.trials)
    return lint.lint(runs, rules, trials.reach(runs, rules))


# Metrics.


def official(root: Path, damage: Callable[[pd.DataFrame], pd.DataFrame], meta: bool) -> Path:
    """A submission whose first study on ogbg is damaged, with or without meta_data."""
    write_official(root, {"a": {"ogbg": [900.0] * 3, "wmt": [900.0] * 3}}, "1.0")
    folder = root / "a" / "study_0" / "ogbg_jax" / "trial_1"
    damage(official_rows("ogbg", 900.0, "1.0")).to_csv(folder / "eval_measurements.csv", index=False)
    if not meta:
        (folder / "meta_data_0.json").write_text("{}")
    return root


METRIC = "validation/mean_average_precision"


def some(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(**{METRIC: rows[METRIC].where(rows.index != 1)})


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda rows: rows.drop(columns=METRIC), "no target metric"),
        (lambda rows: rows.assign(**{METRIC: np.nan}), "no target metric"),
        (some, "missing metric"),
    ],
    ids=["no column", "nowhere a number", "some rows"],
)
def test_a_missing_metric_is_an_error(
    tmp_path: Path, damage: Callable[[pd.DataFrame], pd.DataFrame], what: str, meta: bool
) -> None:
    root = official(tmp_path, damage, meta)
    found = findings(root)
    mine = found[found["what"] == what]
    assert len(mine) == 1
    assert mine["level"].iloc[0] == "error"
    assert "study_0/ogbg_jax/trial_1" in mine["where"].iloc[0]
    assert METRIC in mine["detail"].iloc[0]
    assert main(["lint", str(root)]) == 1


def test_a_metric_the_meta_data_name_wrongly_is_sought_as_the_rules_say(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": {"ogbg": [900.0] * 3}}, "1.0")
    folder = root / "a" / "study_0" / "ogbg_jax" / "trial_1"
    meta = official_meta("ogbg", "1.0") | {"target_metric_name": "loss"}
    write_trial(
        folder, "ogbg", official_rows("ogbg", 900.0, "1.0").rename(columns={METRIC: "validation/loss"}), meta
    )
    found = findings(root).set_index("what")
    assert found.loc["metric disagrees", "level"] == "warning"
    assert found.loc["no target metric", "level"] == "error"


@pytest.mark.parametrize("lost", ["trial", "study", "workload"])
def test_strict_fails_on_what_is_missing(tmp_path: Path, lost: str) -> None:
    """As the official --strict does; whole logs pass both."""
    base = versions.load("0.6").base
    root = write_official(tmp_path, {"a": {name: [900.0] * 3 for name in base}}, "0.6")
    for flags in root.rglob("flags_0.json"):
        flags.write_text(json.dumps({"tuning_ruleset": "self" if lost != "trial" else "external"}))
        rows = official_rows(flags.parent.parent.name.removesuffix("_jax"), 900.0, "0.6")
        period = versions.load("0.6").targets[flags.parent.parent.name.removesuffix("_jax")].eval_period
        times = 900.0 - period * np.arange(len(rows))[::-1]
        rows["score"] = rows["accumulated_submission_time"] = np.clip(times, 1.0, None) + np.arange(len(rows))
        rows.to_csv(flags.parent / "eval_measurements.csv", index=False)
    if lost == "trial":  # one of five is there
        assert main(["lint", str(root)]) == 0
        assert main(["lint", str(root), "--strict"]) == 1
        return
    found = findings(root)
    assert set(found["level"]) <= {"note", "warning"}
    before = set(found["what"])
    folder = root / "a" / "study_2" if lost == "study" else root / "a"
    for path in sorted(folder.rglob("*"), reverse=True):
        if lost == "study" or "ogbg_jax" in path.parts:
            path.unlink() if path.is_file() else path.rmdir()
    assert f"missing {lost}" in set(findings(root)["what"]) - before
    assert main(["lint", str(root), "--strict"]) == 1


def test_lost_trials_are_errors(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": {"ogbg": [900.0] * 3}}, "1.0")
    write_trial(root / "a" / "study_0" / "trial_1", "ogbg", official_rows("ogbg", 1.0, "1.0"))
    found = findings(root)
    assert found.loc[found["what"] == "trial outside a workload", "level"].tolist() == ["error"]


# Copies of one trial.


def scores(root: Path) -> dict[tuple[str, str], float]:
    runs = logs.read([root], use_cache=False)
    rules = versions.rules_for(runs.trials, "1.0", "self", studies=1)
    table = cells.cells(cells.studies(trials.reach(runs, rules), rules), rules)
    return dict(zip(zip(table["submission"], table["workload"], strict=True), table["cost"], strict=True))


def rows_of(count: int, hit: bool) -> pd.DataFrame:
    """``count`` evaluations 100 s apart, of which the last one may be the hit."""
    target = official_meta("ogbg", "1.0")["validation_target_value"]
    value = np.full(count, 0.5 * target)
    value[-1] = target if hit else value[-1]
    time = 100.0 * np.arange(1, count + 1)
    columns = {"accumulated_submission_time": time, "global_step": 10 * np.arange(1, count + 1), "score": time}
    return pd.DataFrame(columns | {METRIC: value})


PLACES = {
    "study put aside": "kfac-2024-01-02-10-00-00/study_0_backup/ogbg_jax/trial_1",
    "restart before": "kfac-2024-01-01-10-00-00/ogbg_jax/trial_1",
    "restart after": "kfac-2024-01-03-10-00-00/ogbg_jax/trial_1",
    "backup": "kfac-2024-01-02-10-00-00/ogbg_jax/trial_1_backup",
    "old copy": "kfac-2024-01-02-10-00-00/ogbg_jax/trial_1.old",
}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(PLACES)), st.integers(1, 12), st.booleans(), st.booleans())
def test_a_fragment_never_changes_a_score(
    tmp_path_factory: pytest.TempPathFactory, place: str, count: int, damaged: bool, stated: bool
) -> None:
    """The whole run hits at its eighth evaluation; beside it lies a fragment, even a longer one without a hit."""
    root = tmp_path_factory.mktemp("copies")
    meta = official_meta("ogbg", "1.0") if stated else {}
    write_trial(root / "kfac-2024-01-02-10-00-00" / "ogbg_jax" / "trial_1", "ogbg", rows_of(8, True), meta)
    before = scores(root)
    assert before == {("kfac", "ogbg"): 800.0}
    folder = write_trial(root / PLACES[place], "ogbg", rows_of(count, False), meta)
    if damaged:
        path = folder / "eval_measurements.csv"
        path.write_bytes(path.read_bytes()[:-5])
    assert scores(root) == before
    found = logs.read([root], use_cache=False).oddities
    mine = found[found["what"] == "duplicate trial"]
    assert len(mine) == 1
    assert "differs" in mine["detail"].iloc[0]
    assert "to step 80" in mine["detail"].iloc[0]


def test_only_known_endings_make_a_study_a_copy(tmp_path: Path) -> None:
    """Slices of a sweep are studies of their own, whatever they have in common."""
    meta = official_meta("ogbg", "1.0")
    for study in ("study_1", "study_1.old", "study_1 (copy)", "seed_1_lr_0.1", "seed_1_lr_0.01"):
        write_trial(tmp_path / "kfac" / study / "ogbg_jax" / "trial_1", "ogbg", rows_of(4, True), meta)
    assert {row[1] for row in names(tmp_path)} == {"study_1", "seed_1_lr_0.1", "seed_1_lr_0.01"}


def test_a_trial_of_another_name_is_lost(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": {"ogbg": [900.0] * 2}}, "1.0")
    write_trial(root / "a" / "study_0" / "ogbg_jax" / "trial_x", "ogbg", rows_of(4, True))
    found = logs.read(root).oddities
    assert found.loc[found["what"] == "backup directory", "level"].tolist() == ["error"]
    assert main(["lint", str(root)]) == 1


def test_the_complete_copy_counts_even_if_it_is_the_backup(tmp_path: Path) -> None:
    """The trial was started anew over a finished one that somebody had put aside."""
    home = tmp_path / "kfac" / "ogbg_jax"
    meta = official_meta("ogbg", "1.0")
    write_trial(home / "trial_1", "ogbg", rows_of(3, False), meta)
    write_trial(home / "trial_1_backup", "ogbg", rows_of(8, True), meta)
    assert scores(tmp_path) == {("kfac", "ogbg"): 800.0}


def test_a_run_that_hit_is_complete_before_a_longer_one_that_did_not(tmp_path: Path) -> None:
    meta = official_meta("ogbg", "1.0")
    write_trial(tmp_path / "k-2024-01-01-10-00-00" / "ogbg_jax" / "trial_1", "ogbg", rows_of(4, True), meta)
    write_trial(tmp_path / "k-2024-01-02-10-00-00" / "ogbg_jax" / "trial_1", "ogbg", rows_of(20, False), meta)
    assert scores(tmp_path) == {("k", "ogbg"): 400.0}


def test_starts_given_one_by_one_are_still_one_submission(tmp_path: Path) -> None:
    """As a shell expands kfac-*; the same name in another folder is another submission."""
    meta = official_meta("ogbg", "1.0")
    inputs = [tmp_path / "x" / f"k-2024-01-0{day}-10-00-00" for day in (1, 2)]
    for folder, rows in zip(inputs, (rows_of(9, False), rows_of(4, True)), strict=True):
        write_trial(folder / "ogbg_jax" / "trial_1", "ogbg", rows, meta)
    other = tmp_path / "y" / "k"
    write_trial(other / "ogbg_jax" / "trial_1", "ogbg", rows_of(5, True), meta)
    runs = logs.read([*inputs, other])
    assert runs.trials["submission"].tolist() == ["k", "y/k"]
    assert (runs.oddities["what"] == "duplicate trial").sum() == 1
    assert runs.trials["evaluations"].tolist() == [4, 5]


def test_one_name_in_two_folders_of_one_input_is_two_submissions(tmp_path: Path) -> None:
    meta = official_meta("ogbg", "1.0")
    for home, count in (("x", 4), ("y", 6)):
        folder = tmp_path / home / "k" / "study_0" / "ogbg_jax" / "trial_1"
        write_trial(folder, "ogbg", rows_of(count, True), meta)
    assert scores(tmp_path) == {("k", "ogbg"): 400.0, ("y/k", "ogbg"): 600.0}


def test_one_name_in_two_folders_is_said(tmp_path: Path) -> None:
    """Workloads that ran on two machines; or two submissions that happen to be called alike."""
    for home, workload in (("x", "ogbg"), ("y", "wmt")):
        folder = tmp_path / home / "k" / "study_0" / f"{workload}_jax" / "trial_1"
        write_trial(folder, workload, official_rows(workload, 900.0, "1.0"), official_meta(workload, "1.0"))
    runs = logs.read([tmp_path / "x", tmp_path / "y"])
    assert set(runs.trials["submission"]) == {"k"}
    found = runs.oddities.set_index("what")
    assert found.loc["one name in several folders", "level"] == "warning"


def test_of_two_whole_runs_the_first_counts_not_the_better(tmp_path: Path) -> None:
    """Two tries are not worth the better of them."""
    meta = official_meta("ogbg", "1.0")
    write_trial(tmp_path / "k-2024-01-01-10-00-00" / "ogbg_jax" / "trial_1", "ogbg", rows_of(9, True), meta)
    write_trial(tmp_path / "k-2024-01-02-10-00-00" / "ogbg_jax" / "trial_1", "ogbg", rows_of(4, True), meta)
    assert scores(tmp_path) == {("k", "ogbg"): 900.0}


def test_a_long_fragment_of_a_self_tuning_run_is_none_the_less_one(tmp_path: Path) -> None:
    """It passed the budget of external tuning without a hit, and crashed before its own."""
    meta = official_meta("ogbg", "1.0") | {"max_allowed_runtime_sec": 1000}
    for name, rows in (("k-2024-01-01-10-00-00", rows_of(12, False)), ("k-2024-01-02-10-00-00", rows_of(4, True))):
        folder = write_trial(tmp_path / name / "ogbg_jax" / "trial_1", "ogbg", rows, meta)
        (folder / "flags_0.json").write_text(json.dumps({"tuning_ruleset": "self"}))
    assert scores(tmp_path) == {("k", "ogbg"): 400.0}


def test_starts_with_other_workloads_are_one_submission(tmp_path: Path) -> None:
    meta = official_meta("ogbg", "1.0")
    write_trial(tmp_path / "k-2024-01-01-10-00-00" / "ogbg_jax" / "trial_1", "ogbg", rows_of(4, True), meta)
    rows = official_rows("wmt", 900.0, "1.0")
    folder = tmp_path / "k-2024-01-02-10-00-00" / "wmt_jax" / "trial_1"
    write_trial(folder, "wmt", rows, official_meta("wmt", "1.0"))
    assert set(scores(tmp_path)) == {("k", "ogbg"), ("k", "wmt")}


def test_what_is_wrong_with_a_copy_that_does_not_count_is_no_error(tmp_path: Path) -> None:
    home = tmp_path / "kfac" / "ogbg_jax"
    meta = official_meta("ogbg", "1.0")
    write_trial(home / "trial_1", "ogbg", rows_of(8, True), meta)
    folder = write_trial(home / "trial_1_backup", "ogbg", None, meta)
    (folder / "eval_measurements.csv").write_text("")
    found = logs.read([tmp_path]).oddities
    assert "error" not in set(found["level"])
    assert {"duplicate trial", "empty file"} <= set(found["what"])


# Names.


def test_a_submission_may_be_called_like_a_workload(tmp_path: Path) -> None:
    write_official(tmp_path, {"schedule_free_adamw_jax": {"ogbg": [900.0] * 2}}, "1.0")
    expected = {("schedule_free_adamw_jax", f"study_{k}", "ogbg", "jax", 1) for k in (0, 1)}
    assert names(tmp_path) == expected
    assert logs.read([tmp_path]).oddities.empty
    assert names(tmp_path / "schedule_free_adamw_jax") == expected


def test_studies_of_any_name(tmp_path: Path) -> None:
    for submission in ("kfac", "nadamw_pytorch"):
        for study in ("runa", "runb_jax"):
            folder = tmp_path / submission / study / "ogbg_jax" / "trial_1"
            write_trial(folder, "ogbg", rows_of(4, True), official_meta("ogbg", "1.0"))
    assert names(tmp_path) == {
        (submission, study, "ogbg", "jax", 1)
        for submission in ("kfac", "nadamw_pytorch")
        for study in ("runa", "runb_jax")
    }
    assert "unusual study names" in set(logs.read([tmp_path]).oddities["what"])


def test_a_folder_of_runs_is_told_from_a_submission_by_its_flags(tmp_path: Path) -> None:
    for name in ("kfac", "adam"):
        folder = tmp_path / "experiments" / name / "ogbg_jax" / "trial_1"
        write_trial(folder, "ogbg", rows_of(4, True), official_meta("ogbg", "1.0"))
        (folder / "flags_0.json").write_text(json.dumps({"submission_path": f"submissions/{name}/submission.py"}))
    assert names(tmp_path) == {(name, "study_0", "ogbg", "jax", 1) for name in ("kfac", "adam")}


def test_a_workload_without_a_framework_in_its_name(tmp_path: Path) -> None:
    for name, framework in (("a", "pytorch"), ("b", "")):
        folder = tmp_path / name / "study_1" / "ogbg" / "trial_1"
        write_trial(folder, "ogbg", rows_of(4, True), official_meta("ogbg", "1.0"))
        (folder / "flags_0.json").write_text(json.dumps({"framework": framework} if framework else {}))
    assert names(tmp_path) == {("a", "study_1", "ogbg", "pytorch", 1), ("b", "study_1", "ogbg", "", 1)}
    assert set(scores(tmp_path).values()) == {400.0}


# Archives.


def test_archives_of_the_finder(tmp_path: Path) -> None:
    root = write_official(tmp_path / "runs", {"a": {"ogbg": [900.0] * 2}}, "1.0")
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(root.rglob("*")):
            name = path.relative_to(tmp_path)
            out.write(path, name)
            if path.is_file():
                out.writestr(f"__MACOSX/{name.parent}/._{name.name}", b"\0\5\26\7\0\2\0\0Mac OS X")
    assert names(archive) == names(root)
    found = logs.read([archive]).oddities
    assert found["what"].tolist() == ["files of the Finder"]
    with tarfile.open(tmp_path / "packed.tar", "w") as out:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            out.add(path, str(path.relative_to(tmp_path)))
            out.add(path, str(path.relative_to(tmp_path).with_name(f"._{path.name}")))
    assert names(tmp_path / "packed.tar") == names(root)


def test_finder_files_that_were_unpacked(tmp_path: Path) -> None:
    root = write_official(tmp_path, {"a": {"ogbg": [900.0] * 2}}, "1.0")
    before = names(root)
    write_trial(root / "__MACOSX" / "a" / "study_0" / "ogbg_jax" / "trial_1", "ogbg", rows_of(8, True))
    (root / "a" / "study_0" / "ogbg_jax" / "trial_1" / "._eval_measurements.csv").write_bytes(b"\0\5\26\7")
    assert names(root) == before


def test_archives_with_backslashes(tmp_path: Path) -> None:
    root = write_official(tmp_path / "runs", {"a": {"ogbg": [900.0] * 2}}, "1.0")
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo("x")
            info.filename = str(path.relative_to(tmp_path)).replace("/", "\\")
            out.writestr(info, path.read_bytes())
    assert names(archive) == names(root)


def test_an_archive_packed_with_its_folder(tmp_path: Path) -> None:
    """Runs of two submissions in one folder in an archive: the folder is not the submission."""
    for name in ("kfac", "adam"):
        folder = tmp_path / "everything" / name / "ogbg_jax" / "trial_1"
        write_trial(folder, "ogbg", rows_of(4, True), official_meta("ogbg", "1.0"))
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        out.add(tmp_path / "everything", "everything")
    assert {row[0] for row in names(tmp_path / "x.tar")} == {"kfac", "adam"}


def test_an_unchanged_archive_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_official(tmp_path / "runs", {"a": {"ogbg": [900.0] * 2}}, "1.0")
    archive = tmp_path / "packed.tar.xz"
    with tarfile.open(archive, "w:xz") as out:
        out.add(root, "runs")
    first = logs.read(archive)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *args, **keywords: pytest.fail("opened again"))
        again = logs.read(archive)
    pd.testing.assert_frame_equal(first.evals, again.evals)
    pd.testing.assert_frame_equal(first.oddities, again.oddities)
    with tarfile.open(archive, "w:xz") as out:
        out.add(root / "a" / "study_0", "runs/a/study_0")
    assert len(logs.read(archive).trials) == 1


def test_an_archive_below_a_folder_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_official(tmp_path / "runs", {"a": {"ogbg": [900.0] * 2}}, "1.0")
    with tarfile.open(root / "b.tar", "w") as out:
        out.add(root / "a", "b")
    first = logs.read(root)
    assert set(first.trials["submission"]) == {"a", "b"}
    monkeypatch.setattr(tarfile, "open", lambda *args, **keywords: pytest.fail("opened again"))
    pd.testing.assert_frame_equal(first.evals, logs.read(root).evals)


# Filtering.


def test_filtering_is_one_call(tmp_path: Path) -> None:
    write_official(
        tmp_path, {"muon": {"ogbg": [900.0]}, "muon_v2": {"wmt": [900.0]}, "lion": {"ogbg": [900.0]}}, "1.0"
    )
    write_official(tmp_path, {"lion": {"wmt": [900.0]}}, "1.0", "pytorch")
    runs = logs.read(tmp_path)

    def kept(chosen: Logs) -> set[tuple[str, str]]:
        found = set(zip(chosen.trials["submission"], chosen.trials["workload"], strict=True))
        assert set(zip(chosen.evals["submission"], chosen.evals["workload"], strict=True)) == found
        return found

    assert kept(runs.select(submission="muon*")) == {("muon", "ogbg"), ("muon_v2", "wmt")}
    assert kept(runs.select(submission="muon,lion", workload="ogbg")) == {("muon", "ogbg"), ("lion", "ogbg")}
    assert kept(runs.select(framework="pytorch")) == {("lion", "wmt")}
    assert kept(runs.select(submission="lion (jax)")) == {("lion", "ogbg")}
    assert kept(runs.select(exclude=["muon*"])) == {("lion", "ogbg"), ("lion", "wmt")}
    assert leaderboard.build(runs.select(workload="ogbg"), workloads="ogbg", replicates=20).ranking.index.size == 2
    with pytest.raises(UserError, match="no submission is called adam: there are lion, muon, muon_v2"):
        runs.select(submission="adam")
