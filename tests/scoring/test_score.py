"""Scores, profiles, speedups and bootstrap: against fine numerical integration, and what must not change them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands.errors import UserError
from scoring.judge import bootstrap, parity, score, versions
from scoring.judge import rules as rules_module
from scoring.judge.rules import Rules

RULES = versions.load("0.5")
COSTS = st.one_of(st.just(np.inf), st.floats(0.5, 50.0))


def cells(values: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Cells from ``values[submission][workload]``, the costs of the studies."""
    rows = [
        {
            "submission": name,
            "workload": workload,
            "cost": float(np.median(costs)),
            "values": tuple(costs),
            "state": "hit",
        }
        for name, workloads in values.items()
        for workload, costs in workloads.items()
    ]
    return pd.DataFrame(rows)


def rules(*workloads: str, held_out: dict[str, str] | None = None) -> Rules:
    """Rules over made-up workloads."""
    variants = held_out or {}
    known = {name: rules_module.Target("loss", 1.0, False, 100.0, 1000.0) for name in (*workloads, *variants)}
    return Rules("test", known, workloads, variants, studies=0)


def even(ratios: dict[str, list[float]]) -> tuple[pd.DataFrame, Rules]:
    names = [f"w{k}" for k in range(len(next(iter(ratios.values()))))]
    table = cells({s: {w: [r] for w, r in zip(names, row, strict=True)} for s, row in ratios.items()})
    return table, rules(*names)


@settings(max_examples=50, deadline=None)
@given(st.lists(COSTS, min_size=1, max_size=12))
def test_exact_integral_against_a_fine_grid(ratio: list[float]) -> None:
    ratios = np.array(ratio)
    tau = np.linspace(1.0, 4.0, 30_001)
    middle = (tau[1:] + tau[:-1]) / 2
    numeric = (ratios <= middle[:, None]).mean(axis=1).mean()
    assert score.exact(ratios) == pytest.approx(numeric, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(COSTS, min_size=1, max_size=12))
def test_the_official_grid_is_near_the_integral_but_not_it(ratio: list[float]) -> None:
    ratios = np.maximum(np.array(ratio), 1.0)
    # Half a cell of the grid per workload; the jump at tau = 1 is exact.
    assert abs(parity.trapezoid(ratios) - score.exact(ratios)) <= 0.5 / 99 + 1e-12


def test_scores_worked_out_by_hand() -> None:
    table, two = even({"a": [1.0, 2.0], "b": [2.5, 1.0], "c": [5.0, 4.0], "d": [np.inf, np.inf]})
    found = score.scores(table, two)
    assert found["a"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["b"] == pytest.approx((1.5 / 3 + 1) / 2)
    assert found["c"] == found["d"] == 0.0
    assert list(found.index) == ["a", "b", "c", "d"]


def test_profiles_are_the_integrand() -> None:
    table, two = even({"a": [1.0, 2.0], "b": [2.5, 1.0], "c": [np.inf, 3.9]})
    for name, (tau, share) in score.profiles(table, two).items():
        assert tau[0] == 1.0
        assert tau[-1] == 4.0
        area = float((np.diff(tau) * share[:-1]).sum() / 3)
        assert area == pytest.approx(score.scores(table, two)[name], abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(COSTS, min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 100.0), min_size=3, max_size=3),
)
def test_units_of_time_change_nothing(rows: list[list[float]], units: list[float]) -> None:
    names = [f"s{k}" for k in range(len(rows))]
    table, three = even(dict(zip(names, rows, strict=True)))
    scaled, _ = even(
        {name: [c * u for c, u in zip(row, units, strict=True)] for name, row in zip(names, rows, strict=True)}
    )
    pd.testing.assert_series_equal(
        score.scores(table, three).sort_index(), score.scores(scaled, three).sort_index(), rtol=1e-9, atol=1e-9
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(COSTS, min_size=2, max_size=2), min_size=2, max_size=5), st.floats(1.0, 3.0))
def test_being_slower_never_helps(rows: list[list[float]], factor: float) -> None:
    names = [f"s{k}" for k in range(len(rows))]
    table, two = even(dict(zip(names, rows, strict=True)))
    slower, _ = even({n: [c * factor if n == "s0" else c for c in r] for n, r in zip(names, rows, strict=True)})
    assert score.scores(slower, two)["s0"] <= score.scores(table, two)["s0"] + 1e-9


def test_a_fixed_reference_makes_scores_absolute() -> None:
    table, two = even({"ref": [10.0, 10.0], "a": [15.0, 5.0], "b": [1.0, 1.0]})
    penalty = pd.Series(100.0, index=["w0", "w1"])
    unit = score.reference_unit(table, two, "ref", penalty)
    alone, _ = even({"ref": [10.0, 10.0], "a": [15.0, 5.0]})
    assert (
        score.scores(table, two, unit)["a"]
        == score.scores(alone, two, unit)["a"]
        == pytest.approx((2.5 / 3 + 3.5 / 3) / 2)
    )
    assert score.scores(table, two)["a"] == pytest.approx(0.0)
    with pytest.raises(UserError, match="no submission"):
        score.reference_unit(table, two, "nobody", penalty)


def test_a_reference_that_misses_counts_at_the_penalty() -> None:
    table, two = even({"ref": [10.0, np.inf], "a": [10.0, 50.0]})
    unit = score.reference_unit(table, two, "ref", pd.Series(101.0, index=["w0", "w1"]))
    assert score.scores(table, two, unit)["a"] == pytest.approx((1.0 + (4 - 50 / 101) / 3) / 2)
    assert score.scores(table, two, unit)["ref"] == 0.5


HELD = rules("base", "other", held_out={"variant": "base"})


@pytest.mark.parametrize(
    ("variant", "credit"),
    [(8.0, 1.0), (np.inf, 0.0), (40.1, 0.0), (39.9, 1.0)],
    ids=["reached", "missed", "over 4x", "4x"],
)
def test_credit_on_a_base_needs_its_held_out_variant(variant: float, credit: float) -> None:
    table = cells({"a": {"base": [5.0], "variant": [variant]}, "b": {"base": [5.0], "variant": [10.0]}})
    if variant < 10:
        table = table[table["submission"] == "a"]
    assert score.scores(table, HELD)["a"] == pytest.approx(credit / 2)


def test_a_held_out_cell_without_its_base_sets_no_standard() -> None:
    """b is fast on the variant but misses the base: a's 40 s are not over four times b's 1 s."""
    table = cells({"a": {"base": [5.0], "variant": [40.0]}, "b": {"base": [np.inf], "variant": [1.0]}})
    assert score.scores(table, HELD)["a"] == pytest.approx(0.5)


def test_a_missing_workload_is_a_miss() -> None:
    table = cells({"a": {"w0": [1.0]}, "b": {"w0": [1.0], "w1": [1.0]}})
    found = score.scores(table, rules("w0", "w1"))
    assert found["a"] == 0.5
    assert found["b"] == 1.0


def test_speedup_is_a_geometric_mean_with_misses_at_the_penalty() -> None:
    own, other = np.array([10.0, np.inf]), np.array([40.0, 25.0])
    assert score.speedups(own, other, np.array([100.0, 100.0])) == pytest.approx(np.sqrt(4 * 0.25))


def test_bootstrap_of_equal_studies_is_a_point() -> None:
    table = cells({"a": {"w0": [1.0] * 5}, "b": {"w0": [2.0] * 5}})
    found = bootstrap.group(table, rules("w0"), replicates=50)
    assert found.loc["a", ["score_low", "score_high", "rank_low", "rank_high", "first"]].tolist() == [1, 1, 1, 1, 1]
    assert found.loc["b", "score_low"] == found.loc["b", "score_high"] == pytest.approx(2 / 3)
    assert found.loc["b", "rank_low"] == 2


def test_bootstrap_covers_the_score_and_is_deterministic() -> None:
    table = cells({"a": {"w0": [1.0, 2.0, 3.0, 4.0, np.inf]}, "b": {"w0": [2.0, 2.5, 3.0, 3.5, 4.0]}})
    one, two = (bootstrap.group(table, rules("w0")) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    exact = score.scores(table, rules("w0"))
    assert (one["score_low"] <= exact).all()
    assert (one["score_high"] >= exact).all()
    assert one.loc["a", "score_low"] < one.loc["a", "score_high"]
    assert 0 < one.loc["a", "first"] < 1


def test_bootstrap_matches_the_distribution_of_a_median() -> None:
    """Of three studies, the median is the middle one with probability 13 / 27, and each end with 7 / 27."""
    draws: npt.NDArray[np.float64] = bootstrap.medians([1.0, 2.0, np.inf], 60_000, 0, "x")
    shares = [(draws == value).mean() for value in (1.0, 2.0, np.inf)]
    assert shares == pytest.approx([7 / 27, 13 / 27, 7 / 27], abs=0.01)


def test_another_submission_changes_no_draws() -> None:
    table = cells({"a": {"w0": [1.0, 2.0, 3.0]}, "b": {"w0": [2.0, 5.0, 3.0]}})
    only = table[table["submission"] == "b"]
    both = bootstrap.resample(table, rules("w0"), 100)
    np.testing.assert_array_equal(both[:, 1], bootstrap.resample(only, rules("w0"), 100)[:, 0])


def test_interval_orders_infinities() -> None:
    low, high = bootstrap.interval(np.array([[np.inf], [1.0], [2.0]]))
    assert (low[0], high[0]) == (1.0, np.inf)


def test_data_files() -> None:
    five, six = versions.load("0.5"), versions.load("0.6", "self")
    assert (five.studies, five.trials, five.budget_factor) == (5, 5, 1.0)
    assert (six.studies, six.trials, six.budget_factor) == (3, 1, 1.5)
    assert versions.load("0.5", "self").budget_factor == 3.0
    assert len(five.base) == len(six.base) == 8
    assert len(five.held_out) == 6
    assert not six.held_out
    assert six.budget("fastmri") == 1.5 * 4430
    assert five.targets["wmt"].higher_is_better
    assert not five.targets["librispeech_conformer"].higher_is_better
    for rule in (five, six):
        assert set(rule.scored) <= set(rule.targets)
        assert set(rule.qualification) == {"criteo1tb", "ogbg", "wmt"}
    assert five.restricted(["ogbg"]).scored == ("ogbg", "ogbg_model_size")
    with pytest.raises(UserError, match="unknown workload"):
        five.restricted(["mnist"])


def test_a_broken_data_file_is_one_line() -> None:
    with pytest.raises(UserError, match="neither a known version"):
        versions.load("0.7")


def test_other_targets() -> None:
    changed = RULES.with_targets({"wmt": 20.0})
    assert changed.targets["wmt"].value == 20.0
    assert replace(changed.targets["wmt"], value=RULES.targets["wmt"].value) == RULES.targets["wmt"]
    with pytest.raises(UserError, match="unknown workload"):
        RULES.with_targets({"x": 1.0})
