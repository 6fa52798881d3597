"""The runner with --framework=jax: repeatable, resumable bit for bit, on several devices, clear about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import serialization

from tests.workloads.helpers import CHECKOUT, arguments, environment, metrics, shrink, start, table
from workloads import registry, run
from workloads.runner import loop
from workloads.runner.jax import JaxBackend

TRIAL = "e/bible_lm_jax/trial_1"
STEPS = 5


def _submission(name):
    return CHECKOUT / f"submissions/{name}/jax/submission.py"


def _flags(folder, submission="nadamw", **changes):
    """A short run with dropout, so that the rng of each step matters."""
    folder.mkdir(parents=True, exist_ok=True)
    space = folder / "space.json"
    space.write_text('[{"learning_rate": 0.01, "dropout_rate": 0.2}]')
    values = {
        "framework": "jax",
        "submission_path": _submission(submission),
        "tuning_ruleset": None,
        "tuning_search_space": space,
        "max_global_steps": STEPS,
        **changes,
    }
    return arguments(folder, **values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        folder = tmp_path_factory.mktemp("whole")
        assert run.main(_flags(folder)) == 0
    return folder / TRIAL


def test_files(whole):
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert {"checkpoint_4", "checkpoint_5", "eval_measurements.csv", "hparams.json", "outcome.json"} <= names
    assert [row["global_step"] for row in table(whole / "eval_measurements.csv")] == ["1", "2", "4", "5"]
    rows = table(whole / "measurements.csv")
    assert [row["global_step"] for row in rows] == ["0", "1", "2", "4", "5"]
    assert float(rows[0]["loss"]) > 3
    content = json.loads((whole / "meta_data_0.json").read_text())
    assert {"jax_version", "flax_version", "optax_version", "device"} <= set(content)


def test_first_step_is_timed_and_counts(whole):
    outcome = json.loads((whole / "outcome.json").read_text())
    assert 0 < outcome["first_step_time"] < outcome["accumulated_submission_time"]
    first = float(table(whole / "eval_measurements.csv")[0]["score"])
    assert first >= outcome["first_step_time"]


@pytest.mark.parametrize("moment", [0, 3])
def test_interrupted_run_equals_an_uninterrupted_one(small, whole, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        _interrupt_at(patch, moment)
        assert run.main(_flags(tmp_path)) == 130
    assert run.main([*_flags(tmp_path), "--resume_last_run"]) == 0
    assert metrics(tmp_path / TRIAL) == metrics(whole)
    assert (tmp_path / TRIAL / "checkpoint_5").exists()
    for name in ("model_params", "optimizer_state"):
        ours, theirs = (_checkpoint(trial)[name] for trial in (tmp_path / TRIAL, whole))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not _submission("kfac_reduce").exists(), reason="needs K-FAC in JAX")
def test_state_of_kfac_resumes_too(small, tmp_path, monkeypatch):
    assert run.main(_flags(tmp_path / "whole", "kfac_reduce", max_global_steps=4)) == 0
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 3)
        assert run.main(_flags(tmp_path, "kfac_reduce", max_global_steps=4)) == 130
    assert run.main([*_flags(tmp_path, "kfac_reduce", max_global_steps=4), "--resume_last_run"]) == 0
    assert metrics(tmp_path / TRIAL) == metrics(tmp_path / "whole" / TRIAL)
    # After step 2, the last evaluation before the interruption.
    assert [row["preemption_count"] for row in table(tmp_path / TRIAL / "eval_measurements.csv")] == ["0", "0", "1"]


def _interrupt_at(patch, step):
    """Ctrl-C before a step, counted from 0."""
    update = loop._Run.update

    def interrupted(self, *rngs):
        if self.step == step:
            raise KeyboardInterrupt
        update(self, *rngs)

    patch.setattr(loop._Run, "update", interrupted)


def _checkpoint(trial):
    return serialization.msgpack_restore((trial / "checkpoint_5").read_bytes())


def test_damaged_or_foreign_checkpoints_are_noticed(whole):
    backend = JaxBackend()
    content = (whole / "checkpoint_5").read_bytes()
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the reader makes of a torn file)
        backend.unpack(content[: len(content) // 2], {}, ({}, None))
    with pytest.raises(ValueError, match="other arrays"):
        backend.unpack(content, {"w": np.zeros(3)}, ({}, None))


def test_two_devices_agree_with_one(whole, tmp_path):
    """In a process of its own, because the number of devices is fixed once JAX has started."""
    code = (
        "import jax, sys; from tests.workloads.helpers import shrink; from workloads import run; shrink(setattr);"
        "assert len(jax.devices()) == 2; sys.exit(run.main(sys.argv[1:]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, *_flags(tmp_path)],
        cwd=CHECKOUT,
        env={**environment(), "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for two, one in zip(metrics(tmp_path / TRIAL), metrics(whole), strict=True):
        for name, value in one.items():
            assert float(two[name]) == pytest.approx(float(value), rel=1e-3), name


def _refused(capsys, flags, *words):
    assert run.main([str(flag) for flag in flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("{'momentum': 3}", ("pair",)),
        ("({'update': len}, None)", ("'update'", "builtin_function", "--nosave_checkpoints")),
        ("({'name': 'adam'}, None)", ("'name'", "str")),
        ("({'empty': np.zeros((0, 3))}, None)", ("'empty'", "without entries")),
    ],
)
def test_state_that_cannot_be_saved(tmp_path, capsys, state, words):
    path = tmp_path / "stateless.py"
    path.write_text(
        "import numpy as np\nfrom submissions.nadamw.jax.submission import *\n"
        f"def init_optimizer_state(*arguments): return {state}\n"
    )
    _refused(capsys, arguments(tmp_path, framework="jax", submission_path=path), *words)
    assert not (tmp_path / "e").exists()


def test_flags_of_pytorch_alone_are_refused(tmp_path, capsys):
    flags = arguments(tmp_path, framework="jax", submission_path=_submission("nadamw"))
    _refused(capsys, [*flags, "--torch_compile"], "--torch_compile", "pytorch")
    assert not (tmp_path / "e").exists()


def test_submission_refuses_a_point(tmp_path, capsys):
    space = tmp_path / "bad.json"
    space.write_text('[{"learning_rate": -1}]')
    _refused(capsys, _flags(tmp_path, tuning_search_space=space), "learning_rate", "refuses point 0")


def test_command(tmp_path):
    flags = arguments(tmp_path, framework="jax", submission_path=_submission("nadamw"), workload="imagenet")
    process = start(flags)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors == f"error: Unknown workload 'imagenet'. Known: {', '.join(registry.WORKLOADS)}.\n"
