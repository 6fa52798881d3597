"""A case that does not show what it should is not passed over."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from benchmarks.official.conditions import COMPILED_STATISTICS, problems
from benchmarks.official.record import Record

LOSSES = [3.0, 2.5, 2.0, 1.5, 1.0, 7.0]
COUNTERS = {"steps": 5, "failures": 0, "dropped": 0, "stand_ins": 0, "a/refreshes": 2, "b/skipped": 2}
GOOD = Record(
    workload="ogbg",
    framework="jax",
    submission="kfac_reduce",
    losses=LOSSES,
    covered=999,
    parameters=1000,
    layers=["a", "b"],
    fallbacks={"scale": "a norm's"},
    counters=COUNTERS,
    gradient_errors={"a": 1e-6, "b": 2e-4},
    rounding_bounds={"a": 1e-7, "b": 1.5e-4},
    resumed=True,
    restore_error="AttributeError: 'NoneType' object has no attribute 'items'",
)


def test_a_good_record_has_none():
    assert problems(GOOD) == []
    assert problems(dataclasses.replace(GOOD, submission="nadamw", counters={}, layers=[], covered=0)) == []
    pytorch = {"framework": "pytorch", "restore_error": None, "counters": COUNTERS | {"missed_layers": 0}}
    assert problems(dataclasses.replace(GOOD, **pytorch)) == []
    assert problems(dataclasses.replace(GOOD, **pytorch, workload="wmt_post_ln", compiled=True)) == []


def test_a_gradient_that_lost_digits_is_told_from_one_of_other_tensors():
    lost = {"gradient_errors": {"a": 1e-6, "b": 3e-4}}
    assert problems(dataclasses.replace(GOOD, **lost, convolution_errors={"b": (0.0, 1e-16)})) == []
    for again in ((3e-4, 1e-16), (0.0, 3e-4), (math.nan, 0.0)):
        (found,) = problems(dataclasses.replace(GOOD, **lost, convolution_errors={"b": again}))
        assert "b: G^T A is off" in found
    (found,) = problems(dataclasses.replace(GOOD, **lost, convolution_errors={"a": (0.0, 0.0)}))
    assert "b: G^T A is off" in found


def test_whether_statistics_run_compiled_is_what_is_expected():
    pytorch = {"framework": "pytorch", "restore_error": None, "counters": COUNTERS | {"missed_layers": 0}}
    compiled = dataclasses.replace(GOOD, **pytorch, workload="mnist", compiled=True, covered=1000)
    uncompiled = "statistics steps run uncompiled: layer shared is called 2 times"
    assert problems(dataclasses.replace(compiled, note=COMPILED_STATISTICS)) == []
    (found,) = problems(dataclasses.replace(compiled, note=uncompiled))
    assert found.startswith(uncompiled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [1.0, *LOSSES[1:]]}, "falling"),
        ({"losses": [*LOSSES[:5], math.nan]}, "finite"),
        ({"losses": LOSSES[:5]}, "finite"),
        ({"resumed": False}, "same bits"),
        ({"compiled": True}, "compiled"),
        ({"restore_error": None}, "restore"),
        ({"counters": COUNTERS | {"failures": 1, "a/failures": 1}}, r"failures is 1.*a/failures"),
        ({"counters": COUNTERS | {"stand_ins": 2}}, "stand_ins is 2"),
        ({"counters": COUNTERS | {"missed_layers": 0}}, "missed layers"),
        ({"counters": COUNTERS | {"b/skipped": 0}}, "b was neither"),
        ({"gradient_errors": {"a": 1e-6}}, "checked were"),
        ({"layers": [], "gradient_errors": {}}, "checked were"),
        ({"gradient_errors": {"a": 1e-6, "b": 3e-4}}, "b: G.T A is off"),
        ({"gradient_errors": {"a": math.nan, "b": 1e-6}}, "a: G.T A is off"),
        ({"rounding_bounds": {"a": 0.0, "b": 1.5e-4}}, "a has no gradient"),
        ({"fallbacks": {"scale": ""}}, "scale takes the fallback without"),
        ({"covered": 990}, "99.00 %"),
        ({"workload": "criteo1tb"}, "scale takes the fallback, and is no embedding"),
    ],
)
def test_each_shortcoming_is_named(changes, message):
    (found,) = problems(dataclasses.replace(GOOD, **changes))
    assert re.search(message, found), found
