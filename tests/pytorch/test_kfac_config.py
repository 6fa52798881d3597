"""Every hyperparameter out of range is named, with what is allowed; points come in the forms the runners use."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import pytest

from algoperf_kfac.pytorch import KFACConfig

BAD: dict[str, tuple[list[Any], str]] = {
    "learning_rate": ([-1e-3, math.nan, math.inf, "fast", None, True], "number"),
    "one_minus_beta1": ([0.0, 1.5, -0.1, math.nan], "number"),
    "beta2": ([1.0, -0.1, 2], "number"),
    "eps": ([-1e-8], "number >= 0"),
    "weight_decay": ([-0.1], "number >= 0"),
    "approximation": (["both", {"linear": "both"}, {"dense": "expand"}, None, ["expand"]], "'expand', 'reduce'"),
    "fisher": (["true", None], "'empirical', 'mc', 'exact'"),
    "fisher_samples": ([0, 1.5, "1", math.nan, math.inf], "(at least 1|whole number)"),
    "preconditioner": (["shampoo"], "'eigen', 'inverse'"),
    "decomposition": (["svd", None, True], "'eigh', 'qr'"),
    "scaling": (["sqrt", 0.75], "'inverse', 'polar', 'power', 'root', 'second_moment'"),
    "power": ([0.0, -0.5, 1.01, math.nan, math.inf, "1", None, True], "number"),
    "polar_exponent": ([-0.1, 1.01, math.nan, "1/8", None], "number"),
    "polar_steps": ([0, -1, 2.5, True, math.nan, math.inf, "3", None], "(at least 1|whole number)"),
    "damping": ([0.0, -1.0], "number > 0"),
    "damping_mode": (["adaptive"], "'relative', 'absolute'"),
    "noise_floor": ([-1.0, math.nan, "1", True], "number"),
    "initial_refreshes": (["all", 2, None], "'doubling', 'every'"),
    "factor_decay": ([1.0, -0.1], r"\[0, 1\)"),
    "factor_interval": ([0, -5, 2.5, True, math.nan, math.inf, "10"], "(at least 1|whole number)"),
    "statistics_rows": ([0, -5, 2.5, True, math.nan, math.inf, "10"], "(at least 1|whole number)"),
    "statistics_rows_by_side": ([None, 1, "yes"], "True or False"),
    "initial_statistics": ([-1, 2.5, True, math.nan, math.inf, "10", None], "(at least 0|whole number)"),
    "refresh_interval": (
        [0, 15, 5, math.nan, math.inf, None],
        "(multiple of factor_interval=10|whole number)",
    ),
    "refresh_budget": ([0.0, 1.0, -0.1, math.nan, "0.1", True], "number"),
    "drift_tolerance": ([-0.1, 1.0], r"\[0, 1\)"),
    "length": (["nadamw", True, 0.5], "'graft', 'rms', 'none'"),
    "length_factor": ([0.0, -1.0, math.inf, None], "number"),
    "grafting": (["yes", 1], "True or False"),
    "max_factor_dim": ([0, 10.5, math.nan, -math.inf], "(at least 1|whole number)"),
    "large_factor": (["drop"], "'block', 'one_sided'"),
}
CASES = [
    pytest.param(name, value, allowed, id=f"{name}={value}")
    for name, (values, allowed) in BAD.items()
    for value in values
]


def test_every_field_has_a_bad_value() -> None:
    assert set(BAD) == {field.name for field in dataclasses.fields(KFACConfig)}


@pytest.mark.parametrize(("name", "value", "allowed"), CASES)
def test_out_of_range(name: str, value: Any, allowed: str) -> None:
    message = rf"^hyperparameter {name}={re.escape(repr(value))}: allowed is .*{allowed}"
    with pytest.raises(ValueError, match=message):
        KFACConfig(**{name: value})


@pytest.mark.parametrize(
    "good",
    [
        {"learning_rate": 0}, {"one_minus_beta1": 1.0}, {"beta2": 0.0}, {"factor_decay": 0.0},
        {"approximation": {"linear": "reduce", "conv": "expand"}}, {"approximation": {}},
        {"factor_interval": 1, "refresh_interval": 1},
        {"power": 1}, {"power": 1e-3}, {"initial_statistics": 0}, {"initial_statistics": 1000},
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges(good: dict[str, Any]) -> None:
    KFACConfig(**good)


def test_a_damping_of_ones_own_is_not_raised() -> None:
    """The floor stands beside the default damping, and where it is asked for; points and updates keep to that."""
    assert KFACConfig().floor == KFACConfig(power=0.5).floor == 1
    assert KFACConfig(damping=1e-12).floor == KFACConfig.from_hyperparameters({"damping": 1e-1}).floor == 0
    assert KFACConfig.updated(KFACConfig(), {"damping": 1e-4}).floor == 0
    assert KFACConfig.updated(KFACConfig(damping=1e-4), {"damping": 1e-2}).floor == 1
    assert KFACConfig(damping=1e-12, noise_floor=2).floor == 2
    assert KFACConfig(noise_floor=0.0).floor == 0


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "graft"),
        ({"grafting": True}, "graft"),
        ({"grafting": False}, "none"),
        ({"length": "graft"}, "graft"),
        ({"length": "rms"}, "rms"),
        ({"length": "none"}, "none"),
        ({"length": "graft", "grafting": True}, "graft"),
        ({"length": "rms", "grafting": False}, "rms"),
        ({"length": "none", "grafting": False}, "none"),
    ],
    ids=str,
)
def test_the_two_names_of_the_length(options: dict[str, Any], rule: str) -> None:
    assert KFACConfig(**options).length_rule == rule
    assert KFACConfig.updated(KFACConfig(), options).length_rule == rule


@pytest.mark.parametrize(("grafting", "length"), [(True, "rms"), (True, "none"), (False, "graft")])
def test_the_two_names_of_the_length_contradict_each_other(grafting: bool, length: str) -> None:
    message = rf"grafting={grafting} contradicts length='{length}': leave grafting out"
    with pytest.raises(ValueError, match=message):
        KFACConfig(grafting=grafting, length=length)
    with pytest.raises(ValueError, match=message):
        KFACConfig.updated(KFACConfig(grafting=grafting), {"length": length})


def test_integers_of_a_search_space_come_as_floats() -> None:
    config = KFACConfig(factor_interval=10.0, refresh_interval=50.0, fisher_samples=2.0, initial_statistics=3.0)  # type: ignore[arg-type]
    assert (config.factor_interval, config.refresh_interval, config.fisher_samples) == (10, 50, 2)
    assert type(config.factor_interval) is type(config.initial_statistics) is int
    with pytest.raises(ValueError, match=r"factor_interval=10\.5: allowed is a whole number"):
        KFACConfig(factor_interval=10.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "exponent"),
    [
        ({}, 0.75),
        ({"scaling": "power", "power": 0.6}, 0.6),
        ({"scaling": "root", "power": 0.6}, 0.5),
        ({"scaling": "inverse", "power": 0.6}, 1.0),
        ({"scaling": "polar", "power": 0.6}, 0.625),
        ({"scaling": "polar", "polar_exponent": 0}, 0.5),
    ],
    ids=str,
)
def test_exponents_of_the_scalings(options: dict[str, Any], exponent: float) -> None:
    assert KFACConfig(**options).exponent == exponent


Point = collections.namedtuple("Point", "learning_rate damping refresh_interval")


@pytest.mark.parametrize(
    "point", [Point(0.01, 0.1, 40.0), Point(0.01, 0.1, 40.0)._asdict()], ids=["namedtuple", "dict"]
)
def test_points_of_a_search_space(point: Any) -> None:
    config = KFACConfig.from_hyperparameters(point, damping=0.5, fisher="mc")
    assert config == KFACConfig(learning_rate=0.01, damping=0.1, refresh_interval=40, fisher="mc")


def test_no_point_is_the_defaults() -> None:
    assert KFACConfig.from_hyperparameters(None) == KFACConfig()
    assert KFACConfig.from_hyperparameters(None, damping=0.5).damping == 0.5


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown hyperparameter 'lr': known are .*'learning_rate'"):
        KFACConfig.from_hyperparameters({"lr": 0.1})
    with pytest.raises(ValueError, match="unknown hyperparameter 'momentum'"):
        KFACConfig.from_hyperparameters(None, momentum=0.9)


@pytest.mark.parametrize("point", [0.1, [("learning_rate", 0.1)], "learning_rate"])
def test_other_forms(point: Any) -> None:
    with pytest.raises(ValueError, match=rf"namedtuple, a mapping or None, got {type(point).__name__}"):
        KFACConfig.from_hyperparameters(point)


def test_approximation_by_layer_kind() -> None:
    config = KFACConfig(approximation={"conv": "reduce"})
    assert [config.approximation_for(kind) for kind in ("linear", "conv", "conv_transpose")] == [
        "expand",
        "reduce",
        "expand",
    ]
    assert KFACConfig(approximation="reduce").approximation_for("linear") == "reduce"


def test_inverses_have_no_bases_to_follow() -> None:
    with pytest.raises(
        ValueError, match=r'decomposition="qr" follows eigenbases: preconditioner="inverse" has none'
    ):
        KFACConfig(decomposition="qr", preconditioner="inverse")
