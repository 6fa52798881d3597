"""Seconds of a plan: arithmetic against sums by hand, and the calibration as a user makes and meets it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.cost import Load
from algoperf_kfac.seconds import Speed, interpolated, paced, refresh_in_turns, seconds_of, with_blocks
from submissions.__main__ import main
from submissions.cli import assumed, calibration
from tests.submissions.planned import make_plan
from tests.submissions.test_plan import one_layer

# Products at 2 flops a nanosecond, the rest with times of its own; sizes 10 to 40.
PRODUCTS = {n: 1e-9 * n**3 for n in (10, 20, 40)}
SPEED = Speed(
    "toy",
    PRODUCTS,
    decompositions={10: 1e-3, 20: 5e-3, 40: 3e-2},
    iterations={10: 3e-4, 40: 7e-3},
    inverses={10: 1e-4, 40: 4e-3},
    bytes_per_second=1e9,
)
LOAD = Load(examples=8, positions=5, products=40, input_elements=1200, output_elements=400)


def test_times_between_and_beyond_those_measured():
    assert interpolated(SPEED.decompositions, 20) == 5e-3
    assert interpolated(SPEED.decompositions, 200**0.5) == pytest.approx((1e-3 * 5e-3) ** 0.5)
    assert interpolated(SPEED.decompositions, 80) == pytest.approx(8 * 3e-2)
    assert interpolated(SPEED.decompositions, 3) == 1e-3
    assert SPEED.product(10, 20, 40) == pytest.approx(8e-6)
    assert SPEED.product(0, 20, 40) == 0


def test_seconds_by_hand():
    """A is 40 x 40 and B 20 x 20; the product of (m, k) and (k, n) takes mkn nanoseconds."""
    coverage = one_layer(weight_shape=(20, 40), in_dim=40, out_dim=20, in_blocks=(40,), out_blocks=(20,))
    config = KFACConfig(factor_interval=2, refresh_interval=4)
    found = seconds_of(make_plan(coverage, {"l.weight": LOAD}, config), SPEED)
    assert found.statistics == pytest.approx((1e-9 * 8 * (1600 + 400) + 4 * 1600 / 1e9) / 2)
    assert found.refresh == pytest.approx((3e-2 + 5e-3 + 1e-9 * (40**3 + 20**3)) / 4)
    assert found.preconditioning == pytest.approx(1e-9 * (20 * 40 * 40 + 20 * 20 * 40))
    assert found.total == found.statistics + found.refresh + found.preconditioning
    inverse = seconds_of(
        make_plan(coverage, {}, KFACConfig(preconditioner="inverse", refresh_interval=4, factor_interval=2)), SPEED
    )
    assert inverse.statistics == 0
    assert inverse.refresh == pytest.approx((4e-3 + interpolated(SPEED.inverses, 20)) / 4)
    following = make_plan(coverage, {}, KFACConfig(decomposition="qr", refresh_interval=4, factor_interval=2))
    each = 7e-3 + interpolated(SPEED.iterations, 20)
    assert seconds_of(following, SPEED).refresh == pytest.approx((each + 1e-9 * (40**3 + 20**3)) / 4)
    second = make_plan(coverage, {}, KFACConfig(scaling="second_moment", refresh_interval=4, factor_interval=2))
    assert seconds_of(second, SPEED).preconditioning == pytest.approx(3 * found.preconditioning)
    assert seconds_of(second, SPEED).refresh == pytest.approx((3e-2 + 5e-3) / 4)


def test_channel_groups_are_multiplied_in_one_call_and_decomposed_one_by_one():
    """Products of this speed take 1e-6 s at least: that of four groups no longer than that of one."""
    floor = dataclasses.replace(SPEED, products={n: max(1e-6, 1e-9 * n**3) for n in (1, 5, 10, 20, 40)})
    coverage = one_layer(weight_shape=(16, 4), in_dim=4, out_dim=4, groups=4, in_blocks=(4,), out_blocks=(4,))
    found = seconds_of(make_plan(coverage, {}, KFACConfig(factor_interval=2, refresh_interval=4)), floor)
    one, all_of_them = floor.product(4, 4, 4), floor.product(4, 16, 4)
    assert one == 1e-6
    assert found.preconditioning == pytest.approx(2 * all_of_them)
    assert all_of_them < 2 * one
    assert found.refresh == pytest.approx((4 * 2 * 1e-3 + 2 * all_of_them) / 4)


@pytest.mark.parametrize(
    ("approximation", "spatial", "rows", "expected"),
    [
        ("expand", False, None, 1e-9 * 40 * (1600 + 400)),
        ("expand", False, 20, 1e-9 * 20 * (1600 + 400)),  # four of eight examples
        ("expand", False, 10, 1e-9 * 12 * (1600 + 400)),  # and three of their five positions
        ("reduce", False, 4, 1e-9 * 4 * (1600 + 400) + 4 * 0.5 * 1600 / 1e9),  # every second example
        ("mixed", False, None, 1e-9 * 8 * (1600 + 400) + 4 * 1600 / 1e9),
        ("mixed", True, 10, 1e-9 * (12 * 1600 + 8 * 400) + 4 * 400 / 1e9),  # A is expand's
    ],
)
def test_seconds_of_statistics_are_those_of_the_rows_taken(approximation, spatial, rows, expected):
    blocks = {"in_blocks": (40,), "out_blocks": (20,)}
    coverage = one_layer(
        weight_shape=(20, 40), in_dim=40, out_dim=20, approximation=approximation, spatial=spatial, **blocks
    )
    config = KFACConfig(factor_interval=1, statistics_rows=rows)
    found = seconds_of(make_plan(coverage, {"l.weight": LOAD}, config), SPEED)
    assert found.statistics == pytest.approx(expected)


def test_the_busiest_device_counts():
    base = one_layer().layers[0]
    specs = [
        type(base)(**(vars(base) | {"name": str(i), "weight": str(i), "in_blocks": (n,), "out_blocks": ()}))
        for i, n in enumerate((40, 40, 20))
    ]
    coverage = type(one_layer())(tuple(specs), ())
    each = {n: SPEED.decompositions[n] + PRODUCTS[n] for n in (20, 40)}
    for devices, busiest in ((1, 2 * each[40] + each[20]), (2, each[40] + each[20]), (3, each[40])):
        plan = make_plan(coverage, {}, KFACConfig(refresh_interval=4, factor_interval=2), devices=devices)
        assert seconds_of(plan, SPEED).refresh == pytest.approx(busiest / 4)


def test_the_busiest_device_counts_for_directions():
    config = KFACConfig(refresh_interval=4, factor_interval=2)
    each = {n: seconds_of(make_plan(refreshes(n), {}, config), SPEED).preconditioning for n in (20, 40)}
    for devices, busiest in ((1, 2 * each[40] + each[20]), (2, each[40] + each[20]), (3, each[40])):
        plan = make_plan(refreshes(40, 40, 20), {}, config, devices=devices)
        assert seconds_of(plan, SPEED).preconditioning == pytest.approx(busiest)


def refreshes(*sizes):
    """Layers with one factor each, two turns: a decomposition and a product of each, at the toy's speed."""
    base = one_layer().layers[0]
    specs = [
        type(base)(**(vars(base) | {"name": str(i), "weight": str(i), "in_blocks": (n,), "out_blocks": ()}))
        for i, n in enumerate(sizes)
    ]
    return type(one_layer())(tuple(specs), ())


def test_the_interval_of_a_refresh_budget_by_hand():
    """On two devices the turns are {40, 20} and {40}: each takes as long as its largest."""
    config = KFACConfig(refresh_interval=4, factor_interval=2, refresh_budget=0.1)
    plan = make_plan(refreshes(40, 40, 20), {}, config, devices=2)
    each = {n: SPEED.decompositions[n] + PRODUCTS[n] for n in (20, 40)}
    assert refresh_in_turns(plan, SPEED) == pytest.approx(2 * each[40])
    found = paced(plan, SPEED, step=0.01, budget=0.1)
    assert found.refresh == refresh_in_turns(plan, SPEED)
    assert found.share == pytest.approx(2 * each[40] / (2 * each[40] + 4 * 0.01))
    assert found.interval == 56  # 54.06 steps of 0.01 s are nine tenths where refreshes are one
    assert found.share_then <= 0.1 < found.refresh / (found.refresh + 52 * 0.01)
    assert paced(plan, SPEED, step=100.0, budget=0.1).interval == 4


def test_smaller_blocks_are_refreshed_sooner():
    config = KFACConfig(refresh_interval=2, factor_interval=2, max_factor_dim=40)
    plan = make_plan(refreshes(40), {}, config)
    halves = refresh_in_turns(with_blocks(plan, 20), SPEED)
    assert halves == pytest.approx(2 * (SPEED.decompositions[20] + PRODUCTS[20]))
    assert refresh_in_turns(with_blocks(plan, 40), SPEED) == refresh_in_turns(plan, SPEED) > halves


def test_assumed_speeds_are_those_of_their_sources():
    speed = assumed.a100()
    assert speed.decompositions[1024] == pytest.approx(0.05625)
    assert interpolated(speed.decompositions, 4096) == pytest.approx(0.9)
    assert speed.products[4096] == pytest.approx(2 * 4096**3 / (0.5 * 156e12))
    assert speed.products[64] == 1e-5
    assert speed.iterations[1024] == pytest.approx(8e-3 + 2 * speed.products[1024])
    assert interpolated(speed.iterations, 4096) == pytest.approx(64e-3 + 2 * speed.products[4096])


def test_plans_say_what_a_refresh_budget_comes_to(capsys):
    code, out, _ = command(capsys, "--workload=mnist_vit", "--devices=1", "--assume=a100")
    assert code == 0
    assert "By the calibration of an A100 of 40 GB by assumption" in out
    (line,) = [line for line in out.splitlines() if line.startswith("All layers are refreshed in ")]
    assert "every 12 steps that is within 10.0 % of the time where a step takes " in line
    seconds = [float(word) for word in line.replace(":", "").split() if word[0].isdigit() and "." in word]
    assert seconds[2] == pytest.approx(seconds[0] * 9 / 12, rel=2e-2)


def test_plans_say_what_another_way_of_refreshing_comes_to(capsys):
    def refreshed(*flags):
        code, out, _ = command(capsys, "--workload=mnist_vit", "--devices=1", "--assume=a100", *flags)
        assert code == 0
        (line,) = [line for line in out.splitlines() if line.startswith("All layers are refreshed in ")]
        return float(next(word for word in line.split() if word[0].isdigit()))

    assert refreshed("--decomposition=qr") < refreshed() == refreshed("--decomposition=eigh")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--assume=a100", "--calibrate"), "--assume stands in place of a calibration"),
        (("--refresh_budget=0", "--workload=mnist_vit"), "hyperparameter refresh_budget=0.0: allowed is"),
    ],
)
def test_flags_that_say_nothing(capsys, flags, message):
    code, out, err = command(capsys, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_impossible_speeds_are_refused():
    with pytest.raises(ValueError, match="positive times"):
        Speed("toy", {}, {10: 1.0}, {10: 1.0}, {10: 1.0}, 1e9)
    with pytest.raises(ValueError, match="positive times"):
        Speed("toy", {10: 1.0}, {10: 1.0}, {10: 0.0}, {10: 1.0}, 1e9)
    with pytest.raises(ValueError, match="bytes_per_second"):
        Speed("toy", PRODUCTS, PRODUCTS, PRODUCTS, PRODUCTS, 0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "SIZES", (4, 8))
    monkeypatch.setattr(calibration, "SUMMED", 1000)
    return tmp_path / "algoperf-kfac" / "calibration.json"


def command(capsys, *arguments):
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


def test_a_machine_is_measured_once_and_plans_say_seconds_from_then_on(cache, capsys):
    pytest.importorskip("jax")
    plan = ("--workload=mnist_vit", "--devices=1")
    _, out, _ = command(capsys, *plan)
    assert "Seconds are not known here: python -m submissions plan --calibrate" in out
    assert not cache.exists()
    code, out, _ = command(capsys, "--calibrate", "--framework=pytorch,jax")
    assert code == 0
    assert out.count("eigendecomposition ms") == 2
    assert out.count(str(cache)) == 2
    kept = json.loads(cache.read_text())
    assert [key.split(":")[0] for key in kept] == ["pytorch", "jax"]
    assert set(kept[next(iter(kept))]["products"]) == {"4", "8"}
    for framework in ("pytorch", "jax"):
        _, out, _ = command(capsys, *plan, f"--framework={framework}")
        assert "By the calibration of " in out
        assert "Seconds are not known" not in out
        rows = [line.split() for line in out.partition("K-FAC adds, per step")[2].splitlines()]
        seconds = {row[0]: float(row[-1]) for row in rows if row and row[0] in ("statistics", "refresh", "sum")}
        assert all(value > 0 for value in seconds.values())
        assert seconds["sum"] > seconds["refresh"]
    _, out, _ = command(capsys, *plan, "--noseconds")
    assert "calibration of" not in out


def test_a_workload_goes_on_to_its_plan_after_the_measurement(cache, capsys):
    code, out, _ = command(capsys, "--calibrate", "--workload=mnist_vit", "--devices=1")
    assert code == 0
    assert out.index("Kept in ") < out.index("mnist_vit: batch 128 on 1 device")


@pytest.mark.parametrize("content", ["no json", "[]", '{"KEY": {"products": 3}}'])
def test_a_broken_calibration_is_named(cache, capsys, content):
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", f"pytorch: {calibration.device('pytorch').name()}"))
    code, out, err = command(capsys, "--workload=mnist_vit", "--devices=1")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"{cache} is no calibration of this program; delete it" in err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = command(capsys, "--calibrate")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: cannot ")
    assert str(tmp_path / "file") in err


def wide():
    return torch.nn.Linear(3000, 3000), torch.zeros(4, 3000)


def test_a_model_that_does_not_fit_gets_one_clear_line(cache, capsys):
    flags = (f"--model={__name__}:wide", "--devices=2")
    code, out, _ = command(capsys, *flags, "--device_gb=0.1")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "does NOT fit" in line]
    assert "it does NOT fit 0.1 GB: take more --devices, a smaller --batch_size or less max_factor_dim" in line
    assert "it fits 40 GB" in command(capsys, *flags)[1]
    assert "it fits 20 GB (50% of 40 GB)" in command(capsys, *flags, "--usable=0.5")[1]
