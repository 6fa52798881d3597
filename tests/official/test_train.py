"""Every submission on every workload of AlgoPerf, inside its own training loop: what each case must show.

A case takes from ten seconds to forty minutes, in JAX longest, most of it compilation. Choose with -k:
`-k "ogbg and kfac_reduce"`, `-k variants`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math

import pytest

from tests.official import batches, environment
from tests.official.record import POINT, STEPS, SUBMISSIONS, Record, exists
from tests.official.table import Failure, run_case
from tests.official.variants import BROKEN, VARIANTS

pytestmark = pytest.mark.skipif(not environment.INSTALLED, reason=environment.REASON)

CASES, VARIANT_CASES = (
    [
        pytest.param(name, framework, submission, id=f"{label}{name}-{framework}-{submission}")
        for name in names
        for framework in environment.FRAMEWORKS
        for submission in SUBMISSIONS
    ]
    for label, names in (("", batches.BASES), ("variants-", VARIANTS))
)
# Share of the parameters in layers with a rule, in percent: at least this much must be covered, in both frameworks.
# What is left are scales and biases of norms, and query scalings; in criteo1tb the embedding, a lookup alone.
LEAST_COVERAGE = {
    "criteo1tb": 22.0,
    "fastmri": 99.9,
    "imagenet_resnet": 99.7,
    "imagenet_vit": 99.2,
    "librispeech_conformer": 99.3,
    "librispeech_deepspeech": 99.0,
    "ogbg": 99.7,
    "wmt": 97.0,
    "mnist": 100.0,
    "cifar": 99.9,
}
# Which workloads AlgoPerf's runner compiles, without those of `case.NOT_COMPILED`.
COMPILED = {"mnist", "cifar", "imagenet_resnet", "wmt"}


@functools.cache
def result_of(name: str, framework: str, submission: str, data_parallel: bool = False, devices: int = 1) -> Record:
    """The record of a case; each is run once."""
    if not exists(submission, framework):
        pytest.skip(f"there is no {submission} for {framework} yet")
    result = run_case(name, framework, submission, data_parallel=data_parallel, devices=devices)
    if isinstance(result, Failure):
        pytest.fail(result.reason)
    return result


def check(record: Record) -> None:
    """What every case must show."""
    assert len(record.losses) == STEPS + 1
    assert all(math.isfinite(loss) for loss in record.losses)
    assert record.losses[STEPS - 1] < record.losses[0], record.losses
    assert record.resumed
    assert record.compiled == (record.framework == "pytorch" and batches.base_of(record.workload) in COMPILED)
    if record.framework == "jax":
        assert record.restore_error is not None, "AlgoPerf restores JAX checkpoints now: drop the detour"
        assert "NoneType" in record.restore_error
    if record.submission.startswith("kfac"):
        check_kfac(record)


def check_kfac(record: Record) -> None:
    """Every declared layer received its statistics, and they are those of its gradient."""
    counters = record.counters
    assert counters["steps"] == STEPS
    names = ["failures", "dropped", "stand_ins"]
    if record.framework == "pytorch":
        names.append("missed_layers")
    else:
        # A layer that misses its statistics raises while the step is traced, before anything could be counted.
        assert "missed_layers" not in counters, "JAX counts missed layers now: check them"
    for name in names:
        assert counters[name] == 0, (name, {k: v for k, v in counters.items() if k.endswith("/" + name) and v})
    assert record.layers
    for layer in record.layers:
        assert counters[f"{layer}/refreshes"] + counters[f"{layer}/skipped"] >= 1, layer
    assert set(record.gradient_errors) == set(record.layers)
    for layer, error in record.gradient_errors.items():
        assert record.rounding_bounds[layer] > 0, f"{layer} has no gradient: its error says nothing"
        assert error < 1e-4 + record.rounding_bounds[layer], (layer, error, record.rounding_bounds[layer])
    assert all(reason for reason in record.fallbacks.values())


@pytest.mark.parametrize(("name", "framework", "submission"), CASES)
def test_trains_and_resumes(name, framework, submission):
    record = result_of(name, framework, submission)
    check(record)
    if submission.startswith("kfac"):
        assert 100 * record.covered / record.parameters >= LEAST_COVERAGE[name]
        if name == "criteo1tb":
            assert all(parameter.startswith("embedding_") for parameter in record.fallbacks), record.fallbacks


@pytest.mark.parametrize(("name", "framework", "submission"), VARIANT_CASES)
def test_variants_train_and_resume(name, framework, submission):
    if (name, framework) in BROKEN:
        pytest.skip(f"AlgoPerf cannot build it: {BROKEN[name, framework]}")
    check(result_of(name, framework, submission))


@pytest.mark.parametrize(("name", "framework"), BROKEN)
def test_what_algoperf_cannot_build(name, framework):
    failure = run_case(name, framework, "nadamw")
    assert isinstance(failure, Failure), "AlgoPerf builds it now: it belongs to the others"
    assert failure.reason == BROKEN[name, framework]


@pytest.mark.parametrize("name", ["mnist", "ogbg"])
@pytest.mark.parametrize("submission", SUBMISSIONS)
def test_data_parallel_changes_nothing(name, submission):
    """DataParallel without GPUs calls its module as it is; what is tested is that names and hooks survive it."""
    wrapped = result_of(name, "pytorch", submission, data_parallel=True)
    plain = result_of(name, "pytorch", submission)
    check(wrapped)
    assert wrapped.losses == plain.losses
    assert wrapped.layers == plain.layers


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("submission", ["nadamw", "kfac_reduce"])
def test_devices_change_little(submission, devices):
    """JAX splits the batch over the devices; sums are taken in another order, and that is all.

    Not kfac_expand: its damping for a batch of 16 examples with 785 inputs is as small as float32's rounding of the
    factor, so that one device with other compiler flags differs as much. tests/jax compares it in float64.
    """
    orbax = importlib.metadata.version("orbax-checkpoint")
    if tuple(map(int, orbax.split(".")[:2])) >= (0, 12):
        pytest.skip("orbax-checkpoint 0.12 cannot save arrays of several devices at AlgoPerf's JAX 0.7.0")
    several = result_of("mnist", "jax", submission, devices=devices)
    alone = result_of("mnist", "jax", submission)
    check(several)
    assert (several.devices, alone.devices) == (devices, 1)
    assert several.layers == alone.layers
    assert several.losses == pytest.approx(alone.losses, rel=1e-4)


def test_the_point_is_one_the_submissions_accept():
    assert POINT["grad_clip"] is None
