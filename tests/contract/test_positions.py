"""Which positions count, to which example they belong, and which descriptions fit: counted in examples."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from tests.contract.frameworks import EVERY_STEP, NAMES, examples, module_of, positions, start
from tests.contract.models import called_twice, graphs, images, normal, perceptron

APPROXIMATIONS = ("expand", "reduce")
ONE_STEP = {**EVERY_STEP, "preconditioner": "inverse"}  # which is made faster
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)  # the third example has no position
WEIGHTS = MASK[:, :, None].astype(float)
LENGTH_FIRST = WEIGHTS.transpose(1, 0, 2)
SEQUENCES = [
    pytest.param(None, 1.0, 4, id="all"),
    pytest.param(MASK, 1.0, 3, id="mask"),
    pytest.param(positions(MASK.astype(float)), 1.0, 3, id="mask-of-numbers"),
    pytest.param(positions(MASK * np.array([0.5, 255.0, -1.0])), 1.0, 3, id="mask-of-weights"),
    pytest.param(positions(MASK[:, 0]), 1.0, 3, id="mask-of-examples"),
    pytest.param("gradient", WEIGHTS, 3, id="gradient"),
    pytest.param({"l*": "gradient"}, WEIGHTS, 3, id="gradient-by-name"),
    pytest.param(positions(MASK, readout="sum"), 1.0, 3, id="sum"),
    pytest.param(positions(segment_ids=np.array([0, 0, 1, 1]), num_segments=2), 1.0, 2, id="segments"),
    pytest.param(positions(segment_ids=np.array([0, 0, 2, 2]), num_segments=4), 1.0, 2, id="empty-segments"),
    pytest.param(
        positions(MASK, segment_ids=np.array([0, 0, 1, 2]), num_segments=3), 1.0, 2, id="segments-and-mask"
    ),
    pytest.param(
        positions("gradient", np.array([0, 0, 1, 2]), 3), WEIGHTS, 2, id="segments-and-gradient"
    ),
]  # fmt: skip


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize(("given", "weights", "count"), SEQUENCES)
def test_sequences(framework: str, approximation: str, given: Any, weights: Any, count: int) -> None:
    """Four examples of three positions; one without a position that counts is no example."""
    run = start(framework, perceptron((3, 4), normal(4, 3, 3)), approximation=approximation, **ONE_STEP)
    run.observe(weights, given, loss_normalizer=1.0)
    assert examples(run, "l0") == count


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("given", "count"),
    [
        pytest.param([np.ones((2, 3)), MASK, np.ones((4, 3))], 3, id="first-that-fits"),
        pytest.param({"*": np.ones((4, 3)), "l0": MASK, "?0": np.ones((4, 3))}, 3, id="the-name-itself"),
        pytest.param({"l?": MASK, "*": np.ones((4, 3))}, 3, id="the-pattern-that-says-most"),
        pytest.param({"*": np.ones((4, 3)), "l?": MASK}, 3, id="in-any-order"),
        pytest.param({"l0": [np.ones((2, 3)), MASK]}, 3, id="a-list-by-name"),
    ],
)
def test_which_mask_a_layer_takes(framework: str, given: Any, count: int) -> None:
    run = start(framework, perceptron((3, 4), normal(4, 3, 3)), **ONE_STEP)
    run.observe(1.0, given, loss_normalizer=1.0)
    assert examples(run, "l0") == count


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            np.ones((2, 3)),
            r"positions: a mask of shape \(2, 3\) fits no layer\. Their rows are: l0 \(4, 3\)\. A mask",
        ),
        ({"l0": [np.ones((2, 3)), np.ones(7)]}, r"positions\['l0'\]: a mask of shape \(2, 3\) and \(7,\) fits no"),
        ({"other*": MASK}, r"positions: no layer matches 'other\*'"),
        ({"l*": MASK, "?0": MASK}, r"positions: layer l0 matches .* and neither says more of its name: give 'l0'"),
    ],
)
def test_what_fits_nothing(framework: str, given: Any, message: str) -> None:
    """It was meant for something, and would be ignored."""
    run = start(framework, perceptron((3, 4), normal(4, 3, 3)), **ONE_STEP)
    with pytest.raises(ValueError, match=message):
        run.observe(1.0, given, loss_normalizer=1.0)


@pytest.mark.parametrize("framework", NAMES)
def test_a_mask_of_another_kind_of_array(framework: str) -> None:
    """One of numpy is read or refused; it is not taken for no mask."""
    run = start(framework, perceptron((3, 4), normal(4, 3, 3)), **ONE_STEP)
    with contextlib.suppress(TypeError, ValueError):
        run.observe(1.0, module_of(framework).Positions(mask=MASK))
        assert examples(run, "l0") == 3


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_mean_over_the_examples_that_count(framework: str, approximation: str) -> None:
    """Which is what the loss is taken for unless a normalizer says otherwise: B is that of the summed loss."""
    found = []
    for weights, normalizer in ((WEIGHTS / 3, None), (WEIGHTS, 5.0)):
        run = start(framework, perceptron((3, 4), normal(4, 3, 3)), approximation=approximation, **ONE_STEP)
        run.observe(weights, positions(MASK), normalizer)
        found.append(run.factors()["l0"])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("given", "weights", "count"),
    [
        (positions(batch_dim=1), 1.0, 4),
        (positions(MASK.T, batch_dim=1), 1.0, 3),
        (positions("gradient", batch_dim=1), LENGTH_FIRST, 3),
    ],
)
def test_the_length_first(framework: str, given: Any, weights: Any, count: int) -> None:
    run = start(framework, perceptron((3, 4), normal(3, 4, 3)), **ONE_STEP)
    run.observe(weights, given, loss_normalizer=1.0)
    assert examples(run, "l0") == count


# Six nodes and seven edges of three graphs.
NODES, EDGES = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 1, 2]
KINDS = [
    positions(segment_ids=np.array(ids), num_segments=3, readout="sum") for ids in (NODES, EDGES, [0, 1, 2])
]  # fmt: skip
BY_GRADIENT = [positions("gradient", np.array(ids), 3) for ids in (NODES, EDGES)]


def counts(run: Any) -> dict[str, float]:
    return {name: examples(run, name) for name in ("node", "edge", "head")}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize(
    ("given", "weights", "expected"),
    [
        pytest.param(KINDS, 1.0, {"node": 3, "edge": 3, "head": 3}, id="a-description-for-each"),
        pytest.param(KINDS[:2], 1.0, {"node": 3, "edge": 3, "head": 3}, id="a-row-per-graph"),
        pytest.param(BY_GRADIENT, [[1], [0], [1]], {"node": 2, "edge": 2, "head": 2}, id="gradient"),
    ],
)
def test_graphs(framework: str, approximation: str, given: Any, weights: Any, expected: dict[str, int]) -> None:
    run = start(framework, graphs(NODES, EDGES, 3), approximation=approximation, **ONE_STEP)
    run.observe(weights, given, loss_normalizer=1.0)
    assert counts(run) == expected


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"node": KINDS[0], "edge": KINDS[1]}, {"node": 3, "edge": 3, "head": 3}),
        ({"node": KINDS[0]}, {"node": 3, "edge": 7, "head": 3}),
    ],
    ids=["all", "nodes-alone"],
)
def test_graphs_by_name(framework: str, given: Any, expected: dict[str, int]) -> None:
    """What no name matches has an example in each row."""
    run = start(framework, graphs(NODES, EDGES, 3), **ONE_STEP)
    run.observe(1.0, given, loss_normalizer=1.0)
    assert counts(run) == expected


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_row_per_segment_that_the_loss_does_not_use(framework: str, approximation: str) -> None:
    """Behind the read-out the mask by gradients still decides: one of two graphs has no target."""
    run = start(framework, graphs([0, 0, 1], [0, 1, 1, 1], 2), approximation=approximation, **ONE_STEP)
    given = [positions("gradient", np.array(ids), 2) for ids in ([0, 0, 1], [0, 1, 1, 1])]
    run.observe([[1.0], [0.0]], given, loss_normalizer=1.0)
    assert counts(run) == {"node": 1, "edge": 1, "head": 1}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("wrapped", [lambda kinds: kinds, lambda kinds: {"*": kinds}], ids=["list", "by-pattern"])
def test_two_segmentations_that_fit(framework: str, wrapped: Any) -> None:
    """As many edges as nodes: nothing tells which is meant."""
    edges = EDGES[:6]
    kinds = [positions(segment_ids=np.array(ids), num_segments=3) for ids in (NODES, edges)]
    run = start(framework, graphs(NODES, edges, 3), **ONE_STEP)
    remedy = r"describe its positions by its name, .*positions=\{'node': \.\.\., \.\.\.\}"
    with pytest.raises(ValueError, match=rf"^layer node has 6 rows .* fits several .*: {remedy}"):
        run.observe(1.0, wrapped(kinds))


@pytest.mark.parametrize("framework", NAMES)
def test_two_segmentations_that_fit_are_told_apart_by_name(framework: str) -> None:
    edges = EDGES[:6]
    kinds = {
        name: positions(segment_ids=np.array(ids), num_segments=4)
        for name, ids in (("node", NODES), ("edge", edges))
    }
    run = start(framework, graphs(NODES, edges, 3), **ONE_STEP)
    run.observe(1.0, kinds, loss_normalizer=1.0)
    assert counts(run) == {"node": 3, "edge": 3, "head": 3}


@pytest.mark.parametrize("framework", NAMES)
def test_rows_that_no_segmentation_fits(framework: str) -> None:
    run = start(framework, graphs(NODES, EDGES, 3), **ONE_STEP)
    with pytest.raises(
        ValueError, match=r"^layer edge has 7 rows in dimension 0, neither those of segment_ids \(6\) nor one per"
    ):
        run.observe(1.0, [KINDS[0]])


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"l0": np.ones((4, 2))}, r"(?m)^layer l0: a mask of shape \(4, 2\) does not fit positions \(4, 3\)$"),
        ({"l0": [np.ones((4, 2))]}, r"(?m)^layer l0: a mask of shape \(4, 2\) does not fit positions \(4, 3\)$"),
        (
            {"l0": positions(segment_ids=np.array([0, 0, 1]), num_segments=2)},
            r"(?m)^layer l0: segment_ids of shape \(3,\) do not fit 4 rows in dimension 0$",
        ),
    ],
    ids=["mask", "list-of-one", "segments"],
)
def test_what_is_given_by_name_has_to_fit(framework: str, given: Any, message: str) -> None:
    run = start(framework, perceptron((3, 4), normal(4, 3, 3)), **ONE_STEP)
    with pytest.raises(ValueError, match=message):
        run.observe(1.0, given)


@pytest.mark.parametrize("framework", NAMES)
def test_a_convolution_has_its_examples_first(framework: str) -> None:
    """Whatever the other layers do: the same description serves a convolution and what comes behind it."""
    run = start(framework, images(), **ONE_STEP)
    run.observe([[1.0]] * 4 + [[0.0]], positions("gradient", batch_dim=1), loss_normalizer=1.0)
    assert {name: examples(run, name) for name in ("conv", "head")} == {"conv": 4, "head": 4}


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_calls_of_one_layer_are_positions(framework: str, approximation: str) -> None:
    """Of the same examples: two calls on six rows are six examples, as one call is."""
    run = start(framework, called_twice(), approximation=approximation, **ONE_STEP)
    run.observe(loss_normalizer=1.0)
    assert examples(run, "layer") == 6


@pytest.mark.parametrize("framework", NAMES)
def test_an_input_without_examples_is_one(framework: str) -> None:
    run = start(framework, perceptron((3, 2), normal(3)), **ONE_STEP)
    run.observe(loss_normalizer=1.0)
    assert examples(run, "l0") == 1


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"readout": "max"}, "^readout='max': allowed is 'mean' or 'sum'$"),
        ({"mask": "targets"}, "^mask='targets': allowed is .*'gradient'"),
        ({"segment_ids": np.zeros(3, int)}, "^segment_ids and num_segments go together$"),
        ({"num_segments": 3}, "^segment_ids and num_segments go together$"),
    ],
)
def test_descriptions_out_of_range(framework: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_of(framework).Positions(**arguments)
