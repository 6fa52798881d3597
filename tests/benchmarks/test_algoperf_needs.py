"""What winning AlgoPerf's workloads asks: arithmetic, the published bests, and the page they are written into."""

from __future__ import annotations

import math

import pytest

import scoring
from algoperf_kfac.config import KFACConfig
from benchmarks.algoperf_needs import Best, best, needs, page, step_seconds
from commands.errors import UserError
from scoring.judge import published
from submissions.cli import assumed
from submissions.cli.named_plan import Named, Room
from submissions.cli.plan_tables import render_all
from tests.submissions.planned import make_plan
from tests.submissions.test_plan import one_layer
from workloads.algoperf import BUDGETS


def test_steps_that_win():
    steps, time = Best(5_000, "a"), Best(1_000.0, "b")
    assert needs(0.3, 0.1, steps, time, budget=9_999, step_hint=1) == (0.4, 2_500, 0.5)
    nobody = Best(math.inf, "a")
    assert needs(0.3, 0.1, nobody, nobody, budget=800, step_hint=10_000) == (0.4, 2_000, 0.2)


@pytest.fixture(scope="module")
def cells():
    rules = scoring.load_version("1.0", "self")
    return scoring.cells(scoring.studies(published.load(rules, "time"), rules), rules)


def test_the_best_of_the_published(cells):
    """As docs/algoperf.md has them."""
    assert best(cells, "fastmri").submission == "schedule_free_adamw_v2"
    assert round(best(cells, "fastmri").cost) == 1_129
    assert best(cells, "imagenet_resnet").cost == math.inf
    assert 0.1 < step_seconds(cells, "fastmri", "pytorch") < 0.2


def named(**options):
    plan = make_plan(one_layer(), {}, KFACConfig(refresh_budget=0.1), devices=4)
    return Named("ogbg", plan, "", 512, Room(40e9, 1.0), options.get("speed"), BUDGETS["ogbg"])


def test_the_page():
    with pytest.raises(UserError, match="seconds are not known here: python -m submissions plan --calibrate"):
        page({"jax": [named()]}, "command")
    text = page({"jax": [named(speed=assumed.a100())]}, "command")
    assert "Made by `command`" in text
    assert "### JAX, on an A100 of 40 GB by assumption" in text
    row = next(line for line in text.splitlines() if line.startswith("| ogbg"))
    assert row.split(" | ")[1:5] == ["7,711", "muon_torch", "1,833", "muon_torch"]
    assert text.startswith("Made by")


def test_plans_of_all_workloads_have_the_intervals():
    text = render_all({"PyTorch": [named(speed=assumed.a100())]}, "command", "text")
    assert "Refreshes that take at most 10.0 % of the time, in PyTorch on an A100 of 40 GB by assumption:" in text
    assert "Refreshes that take" not in render_all({"PyTorch": [named()]}, "command", "text")
