"""`python -m benchmarks.paper complexity`: layers, slopes, the fit of the cost model, what is kept and shown."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from algoperf_kfac.crossover import Rates
from benchmarks.paper.__main__ import main
from benchmarks.paper.complexity import (
    figure,
    jax_layer,
    layers,
    measure,
    model,
    page,
    pytorch_layer,
    records,
    slopes,
)
from benchmarks.paper.complexity.layers import FRAMEWORKS, GRID, QUICK, Layer, layers_of
from benchmarks.paper.complexity.worker import CURVES, ROWS
from commands.errors import UserError

SMALL = (
    Layer("linear", 3, 5, 4, 6),
    Layer("graph", 3, 5, 4, 6),
    Layer("conv", 2, 7, 4, 6, dims=1, kernel=5),
    Layer("conv", 2, 5, 3, 2, dims=2, kernel=3, stride=2),
    Layer("conv", 2, 3, 2, 2, dims=3, kernel=3),
    Layer("conv", 2, 4, 6, 6, dims=2, kernel=3, groups=6),
    Layer("conv_transpose", 2, 4, 3, 2, dims=2, kernel=3, stride=2),
)
RATES = Rates(5e10, 8e9)


def names(layer):
    return f"{layer.kind}{layer.dims or ''}-{layer.stride}-{layer.groups}"


def made_up(layer, framework, rates=RATES, scale=1.0):
    """A result whose seconds are those of the model, its curves those of the orders."""
    seconds = {a: scale * rates.seconds(model.work(layer, a)) for a in ("expand", "reduce")}
    adds = {
        (curve, part): slopes._adds(layer, curve, part, ROWS) for curve in CURVES for part in ("A", "B", "both")
    }
    tables = {
        curve: {part: 1e-9 * adds[curve, part] for part in ("A", "B", "both")} | {"step": 1.0} for curve in CURVES
    }
    for approximation, value in seconds.items():
        tables[approximation]["both"] = value
    products = {part: 1e-9 * adds["expand", part] for part in ("A", "B")}
    return {
        "framework": framework,
        "layer": layers.as_dict(layer),
        "seconds": {**tables, "plain": {"step": 0.5}, "product": products, "product of N rows": products},
        "bytes": {
            **{curve: dict.fromkeys(("A", "B", "both", "step"), 1e6) for curve in CURVES},
            "plain": {"step": 1e6},
        },
        "rows": ROWS,
        "took": 1.0,
        "version": "0",
        "device": "made up",
    }


def keyed(results):
    return {records.key(result): result for result in results}


ALL = keyed(made_up(layer, framework) for layer in layers_of(GRID) for framework in FRAMEWORKS)


# ---- layers ----


@pytest.mark.parametrize("layer", SMALL, ids=names)
def test_both_frameworks_build_the_layer_that_is_described(layer):
    module = pytorch_layer.build(layer)
    x = torch.randn(layer.input_shape)
    out = module(x)
    assert tuple(out.shape) == layer.output_shape
    assert tuple(module.weight.shape) == layer.weight_shape
    assert layer.rows == layer.examples * layer.positions == out.numel() // layer.outputs
    if layer.groups > 1 and layer.kind == "conv_transpose":
        return
    params = {"w": jnp.asarray(module.weight.detach().numpy()), "b": jnp.asarray(module.bias.detach().numpy())}
    same = jax_layer.apply_of(layer)(params, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(same, out.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", SMALL, ids=names)
def test_the_factors_are_as_wide_as_the_library_makes_them(layer):
    spec = model.spec_of(layer)
    assert (spec.factor_in_dim, spec.out_dim, spec.groups) == (layer.in_dim, layer.out_dim, layer.groups)
    from algoperf_kfac.pytorch import KFAC

    (known,) = KFAC(pytorch_layer.build(layer)).coverage().layers
    assert (known.in_blocks, known.out_blocks) == (spec.in_blocks, spec.out_blocks)


def test_sweeps_grow_along_their_axis_alone():
    assert len({sweep.key for sweep in GRID}) == len(GRID)
    for sweep in GRID:
        sizes = list(sweep.layers)
        assert sizes == sorted(set(sizes))
        if sweep.axis == "R":
            assert sizes == [layer.positions for layer in sweep.layers.values()]
            assert len({(one.examples, one.in_dim, one.out_dim) for one in sweep.layers.values()}) == 1
    assert set(layers_of(QUICK)) <= set(layers_of(GRID))
    assert len(layers_of(GRID)) < sum(len(sweep.layers) for sweep in GRID)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("layer", [SMALL[0], SMALL[1], SMALL[3], SMALL[6]], ids=names)
def test_every_part_of_a_layer_is_measured(layer, framework):
    """Not how long it takes, but that each part does something, and that memory is what it must be at least."""
    adapter = {"pytorch": pytorch_layer, "jax": jax_layer}[framework]
    curves = {name: CURVES[name] for name in ("expand", "reduce")}
    found = adapter.measure(layer, curves)
    assert set(found["seconds"]) == {*curves, "plain", "product", "product of N rows"}
    for curve in curves:
        assert set(found["seconds"][curve]) == set(found["bytes"][curve]) == {"A", "B", "both", "step"}
        # Each factor is there in the end.
        assert found["bytes"][curve]["A"] >= 4 * layer.groups * layer.in_dim**2
        assert found["bytes"][curve]["B"] >= 4 * layer.groups * layer.out_dim**2
    assert all(value > 0 for parts in found["seconds"].values() for value in parts.values())


def test_expand_holds_the_patches_of_a_convolution_and_reduce_does_not():
    layer = Layer("conv", 4, 12, 8, 4, dims=2, kernel=3)
    patches = 4 * layer.rows * (layer.in_dim - 1)
    for adapter in (pytorch_layer, jax_layer):
        found = adapter.measure(layer, {name: CURVES[name] for name in ("expand", "reduce")})["bytes"]
        assert found["expand"]["A"] >= patches > 2 * found["reduce"]["A"]


# ---- slopes ----


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 2.0])
def test_slopes_of_powers_are_their_exponents(exponent):
    assert slopes.slope({size: 3.7 * size**exponent for size in (1, 4, 16, 100)}) == pytest.approx(
        exponent, abs=1e-12
    )


def test_slopes_need_two_positive_sizes():
    assert slopes.slope({}) is None
    assert slopes.slope({4: 1.0}) is None
    with pytest.raises(ValueError, match="positive sizes and values"):
        slopes.slope({1: 1.0, 2: 0.0})


def test_the_tail_is_the_largest_sizes():
    assert slopes.tail({4096: 4.0, 1: 1.0, 64: 3.0, 16: 2.0}) == {16: 2.0, 64: 3.0, 4096: 4.0}


def test_theory_by_hand():
    """4 examples of 64 positions, A 9 x 9 and B 3 x 3."""
    layer = Layer("linear", 4, 64, 8, 3)
    sweep = layers.Sweep("linear", "R", {64: layer})
    for curve, part, adds in (
        ("expand", "A", 4 * 64 * 81),
        ("expand", "both", 4 * 64 * (81 + 9)),
        ("reduce", "A", 4 * 9 * (9 + 64)),
        ("reduce", "B", 4 * 3 * (3 + 64)),
        (
            "part",
            "A",
            4 * 64 * 81,
        ),  # 100 rows: of four examples, all positions, as 2 divides 64
    ):
        assert slopes.theory(sweep, curve, part, 100) == {64: adds}


def test_orders_of_the_paper_as_slopes():
    linear = {sweep.axis: sweep for sweep in GRID if sweep.name == "linear"}
    assert slopes.slope(slopes.theory(linear["R"], "expand", "A", ROWS)) == pytest.approx(1)
    assert slopes.slope(slopes.theory(linear["N"], "reduce", "A", ROWS)) == pytest.approx(1)
    assert slopes.slope(slopes.theory(linear["P"], "expand", "B", ROWS)) == pytest.approx(2)
    assert 1 < slopes.slope(slopes.theory(linear["P"], "reduce", "B", ROWS)) < 2
    assert 0 < slopes.slope(slopes.theory(linear["R"], "reduce", "B", ROWS)) < 1


# ---- the cost model ----


def test_constants_are_found_again_from_linear_layers_alone():
    """Whatever the others say."""
    results = keyed(
        made_up(layer, "jax", scale=1.0 if layer.kind == "linear" else 9.0) for layer in layers_of(GRID)
    )
    found = model.fit("jax", results, layers_of(GRID))
    assert found.flops_per_second == pytest.approx(RATES.flops_per_second)
    assert found.bytes_per_second == pytest.approx(RATES.bytes_per_second)


def test_the_third_constant_makes_its_convolution_right():
    rates = Rates(RATES.flops_per_second, RATES.bytes_per_second, 1e9)
    results = keyed([made_up(layers.CONV2, "jax", rates=rates)])
    found = model.with_patches("jax", results, RATES)
    assert found.patch_bytes_per_second == pytest.approx(1e9)
    assert model.with_patches("pytorch", results, RATES) is None
    fast = keyed([made_up(layers.CONV2, "jax", scale=0.1)])
    assert model.with_patches("jax", fast, RATES) is None


def test_errors_of_the_model_by_hand():
    layer = layers.CONV2
    exact, late = (keyed([made_up(layer, "jax", scale=scale)]) for scale in (1.0, 2.0))
    found = model.errors("jax", exact, [layer], RATES)
    assert (found.layers, found.right, found.within) == (1, 1, 1)
    assert found.worst == pytest.approx(0, abs=1e-12)
    found = model.errors("jax", late, [layer], RATES)
    assert (found.right, found.within) == (1, 0)
    assert found.worst == pytest.approx(-0.5)
    assert found.median == pytest.approx(0.5)
    assert model.errors("pytorch", exact, [layer], RATES).layers == 0


def test_layers_that_the_model_has_seen_are_not_among_the_unseen():
    unseen = [layer for found in model.unseen(GRID).values() for layer in found]
    assert len(unseen) == len(set(unseen))
    assert {layer.kind for layer in unseen} == {"graph", "conv", "conv_transpose"}
    assert set(unseen) | {layer for layer in layers_of(GRID) if layer.kind == "linear"} == set(layers_of(GRID))


def test_too_few_results_have_no_constants():
    with pytest.raises(UserError, match="two linear layers at least have to be measured in jax"):
        model.fit("jax", {}, layers_of(GRID))


# ---- what is kept ----


def measurer(seen, stop_after=None):
    def measured(framework, wanted):
        for number, layer in enumerate(wanted):
            if number == stop_after:
                raise KeyboardInterrupt
            seen.append((framework, layer))
            yield made_up(layer, framework)

    return measured


def test_an_interrupted_sweep_goes_on(tmp_path, capsys):
    kept, seen = tmp_path / "kept.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        measure.run(QUICK, ["pytorch"], kept, measure=measurer(seen, stop_after=2))
    assert len(kept.read_text().splitlines()) == len(seen) == 2
    measure.run(QUICK, ["pytorch"], kept, measure=measurer(seen))
    wanted = layers_of(QUICK)
    assert [layer for _, layer in seen] == wanted
    assert f"{len(wanted) - 2} layers to measure, about" in capsys.readouterr().out
    measure.run(QUICK, ["pytorch"], kept, measure=measurer(seen))
    assert len(seen) == len(wanted)
    measure.run(QUICK, ["pytorch"], kept, again=True, measure=measurer(seen))
    assert len(seen) == 2 * len(wanted)
    assert len(records.read(kept)) == len(wanted)


def test_results_of_frameworks_and_sizes_are_told_apart(tmp_path):
    layer, kept = SMALL[0], tmp_path / "kept.jsonl"
    other = dataclasses.replace(layer, size=6)
    records.add([made_up(layer, "jax"), made_up(layer, "pytorch"), made_up(other, "jax")], kept)
    assert len(records.read(kept)) == 3
    assert records.missing([layer, other], "pytorch", records.read(kept)) == [other]


def test_a_process_measures_and_answers(tmp_path):
    """The real one, on the smallest of layers."""
    (found,) = measure.in_process("pytorch", [SMALL[0]])
    assert found["layer"] == layers.as_dict(SMALL[0])
    assert set(CURVES) < set(found["seconds"])
    json.dumps(found)


def test_a_process_that_fails_is_one_line():
    with pytest.raises(UserError, match="measuring in pytorch failed"):
        list(measure.in_process("pytorch", [dataclasses.replace(SMALL[2], groups=3)]))


# ---- page and command ----


def test_made_up_results_are_as_the_paper_says():
    text = page.page(GRID, ALL)
    for curve in CURVES:
        (row,) = [row for row in text.splitlines() if row.startswith(f"| PyTorch, {curve} |")]
        count, as_theory, *others = (int(cell) for cell in row.strip("| ").split("|")[1:])
        assert count == as_theory == 2 * len(GRID)
        assert others == [0, 0, 0]
    assert "products 50 Gflop/s, sums over positions 8.0 GB/s" in text
    (line, _) = [row for row in text.splitlines() if row.startswith("| **all that it was not fitted to**")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == cells[2]
    assert cells[3] == cells[4]
    assert cells[5] == "0%"
    assert cells[7:9] == [cells[3], "0%"]


def test_reasons_of_slopes_that_are_not_as_theory_says():
    """Of a sweep over R of B: as it is; with flat seconds of expand, short and long; with a flat bare product."""

    def verdict(**changed):
        results = {}
        for key, result in ALL.items():
            seconds = {curve: dict(parts) for curve, parts in result["seconds"].items()}
            for curve, value in changed.items():
                seconds[curve]["B"] = value
            results[key] = {**result, "seconds": seconds}
        return page._verdict(GRID[0], "jax", results, "expand", "B")

    assert verdict() == "theory"
    assert verdict(expand=1e-3) == "short"
    assert verdict(expand=5e-3) == "open"
    assert verdict(expand=5e-3, product=1e-3) == "product"
    assert page._verdict(GRID[0], "jax", {}, "expand", "B") == ""


def test_what_is_missing_is_a_dash():
    some = keyed(made_up(layer, "pytorch") for layer in layers_of(QUICK))
    text = page.page(GRID, some)
    assert "JAX, A:" not in text
    (line,) = [row for row in text.splitlines() if row.startswith("| graph | R |")][:1]
    assert line.count(" - ") >= 4
    with pytest.raises(UserError, match="nothing is measured yet"):
        page.page(GRID, {})


def test_the_figure_is_the_same_for_the_same_results():
    drawn = figure.draw(GRID, FRAMEWORKS, ALL)
    assert drawn[:4] == b"\x89PNG"
    assert drawn == figure.draw(GRID, FRAMEWORKS, ALL)


def test_the_command_writes_page_and_figure_from_what_is_kept(tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    records.add(ALL.values(), kept)
    assert main(["complexity", f"--results={kept}", f"--output={tmp_path / 'page.md'}"]) == 0
    assert "==> 0 layers to measure, about 0 s of CPU time" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == page.page(GRID, ALL)
    assert (tmp_path / "page.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simplicity"], r"choose from '?exactness'?, '?complexity'?, '?update'?, '?peers'?"),
        (
            ["complexity", "--layers=linear,lstm"],
            "no kind of layer 'lstm' here. Known: linear, narrow linear, unshared linear, graph",
        ),
        (["complexity", "--framework=numpy"], "no framework 'numpy' here. Known: pytorch, jax"),
        (["complexity", "--results=BROKEN"], "line 1 cannot be read: JSONDecodeError"),
        (["update", "--memory_gb=0"], "--memory_gb=0: must be positive"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    import re

    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    code = main([argument.replace("BROKEN", str(broken)) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_every_kind_of_layer_can_be_named():
    names = list(dict.fromkeys(sweep.name for sweep in GRID))
    assert layers.chosen(",".join(names), quick=False) == GRID
    assert {sweep.name for sweep in layers.chosen("graph", quick=False)} == {"graph"}
