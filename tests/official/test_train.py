"""Every submission on every workload of AlgoPerf, inside its own training loop: what each case must show.

A case takes from ten seconds to forty minutes, in JAX longest, most of it compilation. Choose with -k:
`-k "ogbg and kfac_reduce"`, `-k variants`.
"""

from __future__ import annotations

import functools
import importlib.metadata

import pytest

from benchmarks.official.batches import OTHER_CUTS
from benchmarks.official.conditions import problems
from benchmarks.official.record import BROKEN, POINT, SUBMISSIONS, Failure, Record
from benchmarks.official.table import run_case
from commands.frameworks import FRAMEWORKS
from submissions.registry import path_of
from workloads import algoperf
from workloads.algoperf import VARIANTS, WORKLOADS

pytestmark = pytest.mark.skipif(not algoperf.installed(), reason=algoperf.NOT_INSTALLED)

CASES, VARIANT_CASES = (
    [
        pytest.param(name, framework, submission, id=f"{label}{name}-{framework}-{submission}")
        for name in names
        for framework in FRAMEWORKS
        for submission in SUBMISSIONS
    ]
    for label, names in (("", (*WORKLOADS, *OTHER_CUTS)), ("variants-", VARIANTS))
)


@functools.cache
def result_of(name: str, framework: str, submission: str, data_parallel: bool = False, devices: int = 1) -> Record:
    """The record of a case; each is run once."""
    if algoperf.base_of(name) == algoperf.FROM_1_0 and algoperf.is_older():
        pytest.skip(f"{name} needs AlgoPerf 1.0")
    if not path_of(submission, framework).is_file():
        pytest.skip(f"there is no {submission} for {framework} yet")
    result = run_case(name, framework, submission, data_parallel=data_parallel, devices=devices)
    if isinstance(result, Failure):
        pytest.fail(result.reason)
    return result


@pytest.mark.parametrize(("name", "framework", "submission"), CASES)
def test_trains_and_resumes(name, framework, submission):
    assert problems(result_of(name, framework, submission)) == []


@pytest.mark.parametrize(("name", "framework", "submission"), VARIANT_CASES)
def test_variants_train_and_resume(name, framework, submission):
    if (name, framework) in BROKEN:
        pytest.skip(f"AlgoPerf cannot build it: {BROKEN[name, framework]}")
    assert problems(result_of(name, framework, submission)) == []


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
    assert problems(wrapped) == []
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
    assert problems(several) == []
    assert (several.devices, alone.devices) == (devices, 1)
    assert several.layers == alone.layers
    assert several.losses == pytest.approx(alone.losses, rel=1e-4)


def test_the_point_is_one_the_submissions_accept():
    assert POINT["grad_clip"] is None
