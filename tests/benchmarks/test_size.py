"""`python -m benchmarks.paper size`: tiny models by hand, plans of published ones, what is kept and shown."""

from __future__ import annotations

import argparse
import dataclasses
import math

import numpy as np
import pytest
import torch

from algoperf_kfac.pytorch.probe import plan_of
from benchmarks.kept import Book
from benchmarks.paper.__main__ import main
from benchmarks.paper.architectures.cases import fit
from benchmarks.paper.exactness_cases import approximate
from benchmarks.paper.size import command, costs, exact_page, ladder, ladder_page, page, shapes, tiny, trend
from benchmarks.paper.size.ladder import RATES, RUNGS, SEEDS, SUBMISSIONS, RungWorkload, Training
from benchmarks.paper.size.tiny import Tiny
from workloads.data import bible

SMALLEST = Tiny(8, 1, 3, 0, 5)
GPT2, GPT3 = shapes.SHAPES[:4], shapes.SHAPES[4:]


@pytest.fixture
def float64():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def dense(case, layer):
    """Exact, expand's and reduce's block from inputs, Jacobians of the logits and p alone, sum by sum."""
    inputs, module = [], case.model.get_submodule(layer)
    hook = module.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    logits = case.model(case.x)
    hook.remove()
    (a,) = (x.detach() for x in inputs)
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    probabilities = logits.detach().softmax(-1)
    hessian = torch.diag_embed(probabilities) - probabilities[..., :, None] * probabilities[..., None, :]

    def shifted(shift):
        hook = module.register_forward_hook(lambda _, args, out: out + shift)
        out = case.model(case.x)
        hook.remove()
        return out

    n, r, _ = a.shape
    jacobian = torch.autograd.functional.jacobian(shifted, torch.zeros(n, r, module.weight.shape[0]))
    jacobian = torch.stack([jacobian[i, :, :, i] for i in range(n)])  # (n, losses, classes, positions, outputs)
    curvature = torch.einsum("nscro,nscd,nsdtp->nrotp", jacobian, hessian, jacobian)
    exact = torch.einsum("nrotp,nri,ntj->oipj", curvature, a, a)
    a_expand, a_reduce = (
        torch.einsum("nri,nrj->ij", a, a) / (n * r),
        torch.einsum("ni,nj->ij", a.mean(1), a.mean(1)) / n,
    )
    b_expand = torch.einsum("nrorp->op", curvature).contiguous()
    b_reduce = curvature.sum((0, 1, 3)).contiguous()
    size = exact.shape[0] * exact.shape[1]
    return exact.reshape(size, size), {
        "expand": torch.kron(b_expand, a_expand),
        "reduce": torch.kron(b_reduce, a_reduce),
    }


@pytest.mark.usefixtures("float64")
def test_errors_are_those_of_dense_matrices_by_hand():
    case, found = tiny.case_of(SMALLEST), tiny.fits(SMALLEST)
    for layer in ("blocks.0.attention.query", "blocks.0.attention.value", "blocks.0.mlp.linear1", "output"):
        exact, blocks = dense(case, layer)
        for approximation, block in blocks.items():
            expected, got = fit(block, exact), found[approximation][layer]
            assert (got.error, got.cosine) == pytest.approx((expected.error, expected.cosine), rel=1e-8)
            assert got.error > 0.05


@pytest.mark.usefixtures("float64")
def test_of_one_position_expand_and_reduce_are_one():
    case = tiny.case_of(dataclasses.replace(SMALLEST, positions=1))
    expand, reduce = (approximate(case, approximation) for approximation in tiny.APPROXIMATIONS)
    for layer, block in expand.items():
        assert float((block - reduce[layer]).norm()) <= 1e-12 * float(block.norm()), layer


def test_a_model_trains_before_it_is_compared():
    sequences = tiny.case_of(Tiny(8, 1, 8, 0, 5)).x
    assert sequences.shape == (tiny.SEQUENCES, 8)
    assert 0 <= int(sequences.min()) < int(sequences.max()) < tiny.SYMBOLS
    fresh, trained = (tiny.case_of(Tiny(8, 1, 8, steps, 5)) for steps in (0, 3))
    assert torch.equal(fresh.x, trained.x)
    assert not torch.equal(fresh.model.output.weight, trained.model.output.weight)


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_models_have_the_published_parameters(shape):
    with torch.device("meta"):
        model = shapes.GPT(shape, shape.depth)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == pytest.approx(shape.parameters, rel=0.01 if shape in GPT2 else 0.02)


def test_one_block_repeated_is_the_whole_of_gpt2():
    shape, config = GPT2[0], costs.config_of("reduce")
    grown = plan_of(shapes.whole(shape, config, sequences=16), devices=32)
    expected = plan_of(shapes.seen(shape, config, sequences=16, depth=shape.depth), devices=32)
    assert grown.layers == expected.layers
    assert grown.memory == expected.memory
    assert grown.flops == expected.flops
    assert sorted(grown.coverage.fallbacks, key=str) == sorted(expected.coverage.fallbacks, key=str)


@pytest.fixture(scope="module")
def smallest():
    return costs.sized(GPT2[0])


def test_costs_of_gpt2_by_hand(smallest):
    d, depth, tokens = 768, 12, costs.TOKENS
    model = 6 * tokens * (depth * 12 * d**2 + shapes.VOCABULARY * d)
    in_blocks = 4 * ((d + 1) ** 2 + d**2) + (d + 1) ** 2 + (4 * d) ** 2 + (4 * d + 1) ** 2 + d**2
    assert smallest.model == model
    assert smallest.gpus == 32
    assert (smallest.layers, smallest.split, smallest.blocks) == (6 * depth + 1, 0, (4 * d + 1,))
    # Of the table one factor, of its rows as input and as output layer.
    expand = 2 * tokens * (depth * in_blocks + 2 * d**2)
    assert smallest.costs["expand"].statistics == pytest.approx(expand / model)
    # Of 16 texts on a GPU four, which have 4,096 positions: every third where a layer's sides ask for 1,024
    # rows, all where those of an MLP ask for 3,072 and one more, and in the table.
    attention = 4 * ((d + 1) ** 2 + d**2)
    few = 4 * 342 / (16 * 1024)
    part = 2 * tokens * (depth * (attention * few + (in_blocks - attention) / 4) + 2 * d**2 / 4)
    assert smallest.costs["part"].statistics == pytest.approx(part / model)
    assert smallest.costs["reduce"].statistics < smallest.costs["part"].statistics / 50
    assert smallest.factors == pytest.approx(4 * (depth * in_blocks + d**2), rel=1e-5)
    assert smallest.moments == 8 * smallest.parameters


def test_intervals_keep_to_the_budget(smallest):
    for form, cost in smallest.costs.items():
        shipped = costs.config_of(form).refresh_interval
        model, statistics, refresh, directions = cost.seconds
        other = model + statistics / cost.factor_interval + directions
        assert cost.interval % shipped == 0
        assert refresh / (refresh + cost.interval * other) <= costs.BUDGET
        assert refresh / (refresh + (cost.interval - shipped) * other) > costs.BUDGET
        assert cost.step == pytest.approx((other + refresh / cost.interval) / model)
        # The table of symbols is one layer, with a side of the identity: into the basis, the polar factor, back.
        d, vocabulary = 768, shapes.VOCABULARY
        table = 4 * d**2 * vocabulary + 3 * (4 * d**2 * vocabulary + 2 * d**3)
        assert cost.dealt == pytest.approx(table / smallest.model)
        assert 1 < cost.step < cost.step_alone


def test_what_is_kept_is_not_measured_again(tmp_path, capsys):
    def interrupted(make, after):
        done = []

        def one(case):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(case)
            return make(case)

        return one

    tinies, runs = tiny.tinies(quick=False), ladder.trainings(quick=False)
    exact, trained = Book(Tiny, tmp_path / "a.jsonl"), Book(Training, tmp_path / "b.jsonl")
    with pytest.raises(KeyboardInterrupt):
        command.measure_tiny(tinies, exact, measure=interrupted(made_up_fits, 4))
    with pytest.raises(KeyboardInterrupt):
        command.train(runs, trained, train_one=interrupted(lambda case: made_up(case, 1.0), 3))
    assert Book(Tiny, exact.path).missing(tinies) == tinies[4:]
    assert Book(Training, trained.path).missing(runs) == runs[3:]
    command.measure_tiny(tinies[:4], Book(Tiny, exact.path))
    command.train(runs[:3], Book(Training, trained.path))
    out = capsys.readouterr().out
    assert "==> 0 tiny models" in out
    assert "==> 0 runs of the ladder" in out


def made_up_fits(case):
    pair = [case.seed - tiny.SEEDS[0], 0.5]
    return {"fits": {one: dict.fromkeys(tiny.KINDS, pair) for one in tiny.APPROXIMATIONS}, "version": "0"}


def made_up(case, loss):
    return {"curve": [[case.steps // 4, loss + 1], [case.horizon, loss]], "seconds": 0.1, "version": "0"}


def test_the_page_shows_means_and_names_what_was_not_run(tmp_path):
    exact = Book(Tiny, tmp_path / "a.jsonl")
    for case in tiny.tinies(quick=False):
        if case.steps == 0:
            exact.add(case, made_up_fits(case))
    text = page.page(exact, [], Book(Training, tmp_path / "b.jsonl"))
    assert "| 8 | 1 | 4 | 0 | expand | 1.00 (0.50) | 1.00 (0.50) |" in text
    assert "| 8 | 1 | 4 | 200 | expand | - | - | - | - |" in text
    wanted = len(ladder.trainings(quick=False))
    assert f"**{wanted} of {wanted} runs were not made.**" in text
    assert "| 256 | 6 | 256 | 4,8" in text


def test_the_page_of_what_is_kept_measures_nothing(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr(command, "measure_tiny", refused)
    monkeypatch.setattr(command, "train", refused)
    given = argparse.Namespace(kept=True, quick=True, again=False, results=str(tmp_path))
    command.run(given, tmp_path / "page.md")
    assert "runs were not made" in (tmp_path / "page.md").read_text()


def book_of_ladder(path):
    """NadamW ends at 1.5 at best. Expand is there in 60, reduce in 30 steps at the rate of 1; nothing is at 3."""
    book = Book(Training, path)
    for case in ladder.trainings(quick=False):
        off = {0.3: 0.2, 1.0: 0.0, 3.0: math.nan}[case.rate] + 0.01 * SEEDS.index(case.seed) - 0.01
        curve = [[30, 3.0], [60, 2.0], [case.horizon, 1.5 + off]]
        if case.optimizer != "nadamw":
            # On each rung half of the steps of the one before.
            curve[0][0] = {"expand": 64, "reduce": 32}[case.optimizer] / 2 ** RUNGS.index(case.rung)
            curve[0][1] = 1.5 if case.rate == 1.0 else 3.0
        cost = {"nadamw": 0.1, "expand": 0.3, "reduce": 0.2}[case.optimizer]
        book.add(case, {"curve": curve, "seconds": cost, "version": "0"})
    return book


def test_steps_and_trend_by_hand(tmp_path):
    book = book_of_ladder(tmp_path / "kept.jsonl")
    assert trend.target(book, RUNGS[0]) == pytest.approx(1.5)
    expand = trend.outcome(book, RUNGS[0], "expand")
    assert (expand.rate, expand.steps, expand.cost) == (1.0, (64.0, 64.0, 64.0), (0.3, 0.3, 0.3))
    missed = trend.outcome(book, RUNGS[0], "nadamw")
    assert missed.steps == (ladder.STEPS, ladder.STEPS, math.inf)  # the target is a median
    lines = list(ladder_page.lines(book))
    assert "| 32 | 2 | 32 | 31,111 | reduce | 1 | 32 | 0.20 | 1.500 | 0.2 | 2.00 |" in lines
    assert not any("were not made" in line for line in lines)
    assert not any("(edge)" in line for line in lines)
    # With a quicker run at the largest rate the best one lies at the edge.
    for seed in SEEDS:
        quick = {"curve": [[8, 1.4], [80, 1.4]], "seconds": 0.2, "version": "0"}
        book.add(Training(*RUNGS[0], "reduce", 3.0, seed), quick)
    assert any("| reduce | 3 (edge) | 8 | 0.05 |" in line for line in ladder_page.lines(book))
    sizes = np.log10([ladder.parameters(rung) for rung in RUNGS])
    factor = 2 ** -np.polyfit(sizes, range(len(RUNGS)), 1)[0]
    (steps,) = [line for line in lines if "multiply the steps of expand" in line]
    assert f"by {factor:.2f} ({factor:.2f} to {factor:.2f}, 95 %" in steps
    (cost,) = [line for line in lines if "multiply the cost of a step of reduce" in line]
    assert "by 1.00 (1.00 to 1.00" in cost


def test_an_interval_holds_what_seeds_differ_by():
    factor, low, high = trend.slope({10_000: [0.4, 0.5, 0.6], 100_000: [0.2, 0.3, 0.4]})
    assert low < factor < high
    assert factor == pytest.approx((0.2 * 0.3 * 0.4 / (0.4 * 0.5 * 0.6)) ** (1 / 3))
    assert trend.slope({10_000: [0.4, 0.5]}) is None
    assert trend.reached([[10, 2.0], [20, math.nan], [30, 1.0]], 1.5) == 30
    assert trend.reached([[10, 2.0]], 1.5) == math.inf


def test_a_rung_trains():
    case = Training(*RUNGS[0], "reduce", 1.0, 5, steps=20)
    found = ladder.train(case)
    assert [step for step, _ in found["curve"]] == [case.horizon] == [10]
    assert found["curve"][-1][1] < math.log(bible.NUM_SYMBOLS)
    assert found["parameters"] == ladder.parameters(RUNGS[0])


@pytest.mark.parametrize("rung", RUNGS)
def test_rungs_see_equally_many_characters(rung):
    workload = RungWorkload(rung, ladder.STEPS)
    rng = np.array([5, 0])
    batch = workload.numpy_batch(rng, "train", 0, workload.batch_size)
    assert batch["inputs"].shape == (ladder.TOKENS // rung[2], rung[2])
    assert np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    count = -(-workload.num_validation_examples // workload.eval_batch_size)
    weights = [
        workload.numpy_batch(rng, "validation", i, workload.eval_batch_size)["weights"].sum() for i in range(count)
    ]
    assert sum(weights) == ladder.VALIDATED
    model = RungWorkload(rung, ladder.STEPS).build_model()
    assert sum(p.numel() for p in model.parameters()) == ladder.parameters(rung)


def test_the_ladder_is_paired_and_says_how_long_it_takes():
    runs = ladder.trainings(quick=False)
    assert len(runs) == len(set(runs)) == len(RUNGS) * len(SUBMISSIONS) * len(RATES) * len(SEEDS)
    assert set(ladder.trainings(quick=True)) < set(runs)
    assert ladder.expected_seconds([]) == 0
    by_rung = [ladder.expected_seconds([run for run in runs if run.rung == rung]) for rung in RUNGS]
    assert by_rung == sorted(by_rung)
    assert Training(*RUNGS[0], "reduce", 1.0, 5).horizon == ladder.STEPS / 2


def test_results_that_are_no_folder_or_cannot_be_read(tmp_path, capsys):
    file = tmp_path / "kept.jsonl"
    file.write_text("{}\n")
    given = ["size", f"--output={tmp_path / 'page.md'}", "--quick"]
    assert main([*given, f"--results={file}"]) == 2
    assert "of size it is a folder" in capsys.readouterr().err
    (tmp_path / command.LADDER).write_text('{"width": 32}\n')
    assert main([*given, f"--results={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{command.LADDER}, line 1 cannot be read" in error


def test_every_kind_of_layer_is_in_one_row():
    layers = tiny.case_of(SMALLEST).layers
    ends = [end for kind in tiny.KINDS.values() for end in kind]
    assert len(layers) == len(set(layers)) == len(ends) == 7
    assert list(exact_page.lines(Book(Tiny, command.RESULTS / "none.jsonl")))[3].count("|") == 6 + len(tiny.KINDS)
