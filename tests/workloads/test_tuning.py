"""Search spaces: deterministic draws that fill the space, and malformed ones refused by name."""

from __future__ import annotations

import json
import math

import pytest

from commands.errors import UserError
from workloads.runner import tuning

SPACE = {
    "learning_rate": {"min": 1e-3, "max": 1e-1, "scaling": "log"},
    "weight_decay": {"min": 0.0, "max": 2.0, "scaling": "linear"},
    "beta2": {"feasible_points": [0.9, 0.99, 0.999]},
    "dropout_rate": {"feasible_points": [0.0]},
    "warmup": {"min": 5, "max": 5, "scaling": "linear"},
}


def _write(tmp_path, content):
    path = tmp_path / "space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_draws_are_a_prefix_of_longer_draws(tmp_path):
    path = _write(tmp_path, SPACE)
    short, long = tuning.read_points(path, 5), tuning.read_points(path, 40)
    assert short == long[:5]
    assert len(set(long)) == 40
    assert type(short[0]).__name__ == "Hyperparameters"
    assert short[0]._fields == tuple(SPACE)


def test_draws_fill_the_space_evenly():
    points = tuning.draw(SPACE, 60)
    assert {point["dropout_rate"] for point in points} == {0.0}
    assert {point["warmup"] for point in points} == {5.0}
    for value in (0.9, 0.99, 0.999):
        assert 18 <= sum(point["beta2"] == value for point in points) <= 22
    positions = [math.log(point["learning_rate"] / 1e-3) / math.log(100) for point in points]
    for quarter in range(4):
        assert 13 <= sum(quarter / 4 <= position < (quarter + 1) / 4 for position in positions) <= 17
    assert all(0.0 <= point["weight_decay"] <= 2.0 for point in points)
    assert max(point["weight_decay"] for point in points) > 1.9


@pytest.mark.parametrize("first", range(8))
def test_no_two_of_nine_dimensions_move_together(first):
    space = {f"x{i}": {"min": 0.0, "max": 1.0, "scaling": "linear"} for i in range(9)}
    points = tuning.draw(space, 60)
    for second in range(first + 1, 9):
        xs = [point[f"x{first}"] - 0.5 for point in points]
        ys = [point[f"x{second}"] - 0.5 for point in points]
        correlation = sum(x * y for x, y in zip(xs, ys, strict=True)) / math.sqrt(
            sum(x * x for x in xs) * sum(y * y for y in ys)
        )
        assert abs(correlation) < 0.35, (first, second, correlation)


def test_list_gives_its_points_in_order(tmp_path):
    path = _write(tmp_path, [{"learning_rate": 0.1, "steps": 3}, {"learning_rate": 0.2, "steps": 4}])
    assert [tuple(point) for point in tuning.read_points(path, 5)] == [(0.1, 3), (0.2, 4)]
    assert len(tuning.read_points(path, 1)) == 1


RANGE = {"min": 1.0, "max": 2.0, "scaling": "log"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not valid JSON"]),
        ("3", ["object of ranges or a list"]),
        ({}, ["is empty", "feasible_points"]),
        ({"beta2": 0.9}, ["'beta2'", "allowed forms", "feasible_points", "linear"]),
        ({"beta2": {"min": 0.9, "max": 0.99}}, ["'beta2'", "keys ['max', 'min']", "allowed forms"]),
        ({"lr": {**RANGE, "scaling": "logarithmic"}}, ["'lr'", "logarithmic", "allowed forms"]),
        ({"lr": {**RANGE, "min": 0.0}}, ["'lr'", "must be > 0"]),
        ({"lr": {**RANGE, "min": 3.0}}, ["'lr'", "above max"]),
        ({"lr": {**RANGE, "max": "x"}}, ["'lr'", "no finite number"]),
        ({"lr": {"feasible_points": []}}, ["'lr'", "at least one value"]),
        ({"lr": {"feasible_points": [1], "min": 1}}, ["'lr'", "other keys"]),
        ({"learning rate": RANGE}, ["'learning rate'", "name of a hyperparameter"]),
        ([], ["at least one point"]),
        ([1, 2], ["at least one point"]),
        ([{"lr": 1}, {"beta": 2}], ["not in every point", "'beta'"]),
        ([{"lr": {"min": 1}}], ["'lr'", "single value"]),
        ({"lr": {"feasible_points": [[1, 2]]}}, ["'lr'", "single value"]),
        ({"lr": {"feasible_points": ["1e-3"]}}, ["'lr'", "number 1e-3 in quotes"]),
        ([{"lr": "1e-3"}], ["'lr'", "number 1e-3 in quotes"]),
        ({"lr": 0.5}, ["'lr'", '{"feasible_points": [0.5]}']),
        ({"\u00b5": RANGE}, ["name of a hyperparameter"]),
        ('{"lr": {"feasible_points": [1]}, "lr": {"feasible_points": [2]}}', ["'lr'", "several times"]),
        ('{"lr": {"min": 1, "min": 2, "max": 3, "scaling": "log"}}', ["'min'", "several times"]),
        ('[{"lr": 1}, {"lr": 1, "lr": 2}]', ["'lr'", "several times"]),
        ('{"lr": {"min": NaN, "max": 1, "scaling": "log"}}', ["NaN", "not finite"]),
        ('{"lr": {"feasible_points": [-Infinity]}}', ["-Infinity", "not finite"]),
        ('[{"lr": 1e999}]', ["1e999", "not finite"]),
        ("[" * 100_000, ["not valid JSON"]),
        ("", ["not valid JSON"]),
    ],
)
def test_malformed_space_names_the_key_and_the_forms(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        tuning.read_points(_write(tmp_path, content), 5)
    for word in [*words, "space.json"]:
        assert word in str(caught.value)


def test_what_is_meant_is_taken(tmp_path):
    path = tmp_path / "space.json"
    path.write_bytes(
        '{"grad_clip": {"feasible_points": [null, 1.0]}, "kind": {"feasible_points": ["cosine"]}}'.encode(
            "utf-8-sig"
        )
    )
    points = tuning.read_points(str(path), 2)
    assert {point.grad_clip for point in points} == {None, 1.0}
    assert points[0].kind == "cosine"
    path.write_text('[{"count": 1, "index": 2.0}]')
    (point,) = tuning.read_points(str(path), 2)
    assert (point.count, point.index) == (1, 2.0)


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "space.json"
    path.write_bytes('{"lr": 1}'.encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        tuning.read_points(str(path), 1)


def test_missing_space(tmp_path):
    with pytest.raises(UserError, match=r"none\.json does not exist.*--tuning_search_space"):
        tuning.read_points(str(tmp_path / "none.json"), 1)


def test_selection():
    assert tuning.select("abcd", 1, 3) == [(1, "b"), (2, "c")]
    assert tuning.select("ab", None, None) == [(0, "a"), (1, "b")]
    with pytest.raises(UserError, match="there are 2"):
        tuning.select("ab", 2, None)
