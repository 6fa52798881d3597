"""Expand against reduce by two constants: arithmetic against sums by hand, and what `plan` says of it."""

from __future__ import annotations

import math

import pytest

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Load
from algoperf_kfac.crossover import PATCHES, REORDERED, Rates, Work, compare, work_of
from algoperf_kfac.layers import Coverage
from submissions.cli import calibration
from tests.submissions.planned import make_plan
from tests.submissions.test_plan import one_layer
from tests.submissions.test_plan_seconds import SPEED, command

RATES = Rates(flops_per_second=1e9, bytes_per_second=1e6)
# 8 examples of 5 positions; A 30 x 30, B 10 x 10.
LOAD = Load(examples=8, positions=5, products=40, input_elements=1200, output_elements=400)
(SPEC,) = one_layer().layers
(CONV,) = one_layer(kind="conv").layers


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_work_by_hand_whatever_the_layer_is_set_to(approximation):
    (spec,) = one_layer(approximation=approximation).layers
    assert work_of(spec, LOAD, reduces=False) == Work(2 * 40 * 1000, 0)
    assert work_of(spec, LOAD, reduces=True) == Work(2 * 8 * 1000, 4 * 1600)


def test_convolutions_lay_out_their_patches():
    assert work_of(CONV, LOAD, reduces=False) == Work(80_000, 4 * REORDERED * 400, 4 * 40 * 30)
    assert work_of(CONV, LOAD, reduces=True) == Work(16_000, 4 * (REORDERED * 1200 + 400))


def test_a_part_of_the_rows_is_a_part_of_the_work():
    """20 rows are four examples of five positions: half of them."""
    assert work_of(CONV, LOAD, reduces=False, rows=20).flops == 40_000
    assert work_of(CONV, LOAD, reduces=False, rows=20).bytes == work_of(CONV, LOAD, reduces=False).bytes / 2
    assert work_of(CONV, LOAD, reduces=False, rows=20).patch_bytes == 4 * 20 * 30
    # Reduce has one row an example: eight of them are all that 20 could ask for.
    assert work_of(SPEC, LOAD, reduces=True, rows=20) == work_of(SPEC, LOAD, reduces=True)


def test_seconds_by_hand_with_and_without_a_third_constant():
    work = Work(flops=2e9, bytes=3e6, patch_bytes=5e6)
    assert RATES.seconds(work) == pytest.approx(2 + 3 + 5 * PATCHES)
    assert Rates(1e9, 1e6, 5e6).seconds(work) == pytest.approx(2 + 3 + 1)


def two_layers():
    wide, narrow = (
        type(SPEC)(**(vars(SPEC) | {"name": name, "weight": f"{name}.weight"} | blocks))
        for name, blocks in (
            ("wide", {"in_blocks": (300,), "out_blocks": (100,)}),
            ("narrow", {"in_blocks": (2,), "out_blocks": (1,)}),
        )
    )
    return Coverage((wide, narrow), ())


def test_comparison_by_hand():
    """Expand and reduce of the wide layer: 8 and 1.6 + 6.4 ms; of the narrow one 0.4 us, and 6.40008 ms."""
    plan = make_plan(two_layers(), {"wide.weight": LOAD, "narrow.weight": LOAD}, KFACConfig(factor_interval=2))
    found = compare(plan, RATES)
    wide, narrow = (8e-3, 8e-3), (80 * 5e-9, 16 * 5e-9 + 6.4e-3)
    assert found.expand == pytest.approx((wide[0] + narrow[0]) / 2)
    assert found.reduce == pytest.approx((wide[1] + narrow[1]) / 2)
    assert found.best == pytest.approx((min(wide) + min(narrow)) / 2)
    assert found.saved == pytest.approx(found.expand - found.reduce)
    assert found.saved < 0
    faster = compare(plan, Rates(1e9, 1e7))
    assert faster.reduced == 1
    assert faster.expand == pytest.approx(found.expand)
    every = compare(plan, RATES, interval=1)
    assert (every.expand, every.reduce) == pytest.approx((2 * found.expand, 2 * found.reduce))


def test_layers_that_were_not_seen_count_as_nothing():
    plan = make_plan(two_layers(), {}, KFACConfig())
    found = compare(plan, RATES)
    assert (found.expand, found.reduce, found.best, found.reduced) == (0, 0, 0, 0)


def test_rates_of_a_calibration():
    found = Rates.of(SPEED)
    assert found.flops_per_second == pytest.approx(2e9)
    assert found.bytes_per_second == 1e9


@pytest.mark.parametrize("rates", [(0, 1), (1, -1), (math.inf, 1), (math.nan, 1), (1, 1, 0.0)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="rates must be positive and finite"):
        Rates(*rates)


def test_impossible_intervals_are_refused():
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        compare(make_plan(two_layers(), {}, KFACConfig()), RATES, interval=0)


@pytest.mark.parametrize(("entries", "shape"), [(2**25, (2048, 64, 256)), (1000, (125, 1, 8)), (7, (7, 1, 1))])
def test_the_sum_that_is_timed_is_over_positions(entries, shape):
    assert calibration.rows_of(entries) == shape
    assert math.prod(shape) == entries


def test_plans_say_which_approximation_is_faster(capsys):
    code, out, _ = command(capsys, "--workload=mnist_vit", "--devices=1", "--assume=a100")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("By two constants, flops and bytes, A and B")]
    words = line.split()
    seconds = [float(words[i]) for i, word in enumerate(words[1:-1], 0) if words[i + 1] == "s"]
    expand, reduce, saved = seconds[:3]
    assert saved == pytest.approx(abs(expand - reduce), rel=2e-2)
    assert ("reduce saves" in line) == (reduce < expand)
