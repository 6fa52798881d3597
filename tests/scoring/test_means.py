"""Geometric means of ratios to a reference, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from commands.errors import UserError
from scoring.judge.means import geometric_means
from scoring.judge.rules import Rules, Target

INF = np.inf
STUDIES = {
    ("ref", "a"): (100, 200, 300),
    ("ref", "b"): (100, 100, 100),
    ("ref", "c"): (10, 10, 10),
    ("ours", "a"): (50, 50, 50),  # 1/4 of the median, in any replicate from 1/6 to 1/2
    ("ours", "b"): (400, 400, 400),  # 4
    ("ours", "c"): (5, INF, INF),  # its median is a miss: does not enter
    ("sometimes", "a"): (200, 200, INF),  # 1, infinite in some replicates
}


def _cells(studies):
    rows = [
        {
            "submission": submission,
            "workload": workload,
            "cost": sorted(values)[1],
            "values": tuple(values),
            "present": len(values),
        }
        for (submission, workload), values in studies.items()
    ]
    return pd.DataFrame(rows)


ALLOWED = {"a": 400, "b": 500, "c": 600}
RULES = Rules("embedded", {name: Target("loss", 1.0, False) for name in "abc"}, ("a", "b", "c"), {})


def test_misses_do_not_enter_and_are_counted():
    found = geometric_means(_cells(STUDIES), RULES, "ref", ALLOWED)
    assert found.loc["ref"].to_dict() == {"ratio": 1.0, "low": 1.0, "high": 1.0, "workloads": 3, "bounded": 0}
    assert found.loc["ours", "workloads"] == 2
    assert found.loc["ours", "ratio"] == pytest.approx((1 / 4 * 4) ** 0.5)
    assert found.loc["ours", "low"] == pytest.approx((1 / 6 * 4) ** 0.5)
    assert found.loc["ours", "high"] == pytest.approx((1 / 2 * 4) ** 0.5)
    assert found.loc["sometimes", ["ratio", "workloads"]].tolist() == [1.0, 1]
    assert found.loc["sometimes", "high"] == INF


def test_where_the_reference_misses_it_is_taken_to_have_spent_what_it_was_allowed():
    studies = {**STUDIES, ("ref", "b"): (100, INF, INF), ("ref", "a"): (100, 200, INF)}
    found = geometric_means(_cells(studies), RULES, "ref", ALLOWED)
    assert found.loc["ref"].to_dict() == {"ratio": 1.0, "low": 1.0, "high": 1.0, "workloads": 2, "bounded": 0}
    assert found.loc["ours", ["workloads", "bounded"]].tolist() == [2, 1]
    assert found.loc["ours", "ratio"] == pytest.approx((50 / 200 * 400 / 500) ** 0.5)
    # Of the reference's medians the replicates have 100, 200 or a miss, and 100 or a miss.
    assert found.loc["ours", "low"] == pytest.approx((50 / 400 * 400 / 500) ** 0.5)
    assert found.loc["ours", "high"] == pytest.approx((50 / 100 * 400 / 100) ** 0.5)


def test_without_a_workload_or_from_one_study_there_is_no_interval():
    studies = {**STUDIES, ("never", "a"): (INF, INF, INF), ("once", "a"): (100,)}
    cells = _cells({key: values for key, values in studies.items() if key[0] != "once"})
    once = pd.DataFrame([{"submission": "once", "workload": "a", "cost": 100.0, "values": (100.0,), "present": 1}])
    found = geometric_means(pd.concat([cells, once]), RULES, "ref", ALLOWED)
    assert found.loc["never", "workloads"] == 0
    assert found.loc["never", ["ratio", "low", "high"]].isna().all()
    assert found.loc["once", "ratio"] == 0.5
    assert found.loc["once", ["low", "high"]].isna().all()
    with pytest.raises(UserError, match="no submission 'nobody': there are never, once, ours, ref, sometimes"):
        geometric_means(pd.concat([cells, once]), RULES, "nobody", ALLOWED)
