"""Equal architectures have equal layers, field by field; what is expected is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.frameworks import EVERY_STEP, NAMES, Run, fields, start
from tests.contract.models import convolutional, perceptron, recurrent, tied


def layer(
    kind: str, groups: int, in_dim: int, out_dim: int, ins: tuple[int, ...], outs: tuple[int, ...], **more: Any
) -> dict[str, Any]:
    common = {"approximation": "expand", "bias": True, "size": groups * in_dim * out_dim}
    return {
        "kind": kind,
        "groups": groups,
        "in_dim": in_dim,
        "out_dim": out_dim,
        "in_blocks": ins,
        "out_blocks": outs,
        **common,
        **more,
    }


def found(run: Run) -> dict[str, dict[str, Any]]:
    specs = [fields(spec) for spec in run.coverage().layers]
    return {spec.pop("name"): spec for spec in specs}


@pytest.mark.parametrize("framework", NAMES)
def test_convolutions(framework: str) -> None:
    """P_in is input channels of a group times kernel positions; A has the bias as one dimension more."""
    assert found(start(framework, convolutional())) == {
        "conv": layer("conv", 1, 18, 4, (19,), (4,)),
        "grouped": layer("conv", 2, 8, 2, (9,), (2,)),
        "depthwise": layer("conv", 4, 2, 2, (3,), (2,)),
        "up": layer("conv_transpose", 1, 32, 5, (33,), (5,)),
        "head": layer("linear", 1, 5, 2, (5,), (2,), bias=False),
    }


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(
    ("form", "blocks"),
    [
        ("block", {"conv": ((7, 6, 6), (4,)), "up": ((7, 7, 7, 6, 6), (5,))}),
        ("one_sided", {"conv": ((), (4,)), "up": ((), (5,))}),
    ],
)
def test_large_factors(framework: str, form: str, blocks: dict[str, Any]) -> None:
    """Above max_factor_dim a factor is cut into near-equal blocks, the larger first, or is the identity."""
    specs = found(start(framework, convolutional(), max_factor_dim=7, large_factor=form))
    cut = {name: (spec["in_blocks"], spec["out_blocks"]) for name, spec in specs.items()}
    assert cut["conv"] == blocks["conv"]
    assert cut["up"] == blocks["up"]
    assert cut["grouped"] == ({"block": (5, 4), "one_sided": ()}[form], (2,))
    assert cut["depthwise"] == ((3,), (2,))


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize(("form", "out_blocks"), [("block", (5, 4, 4)), ("one_sided", ())])
def test_large_outputs(framework: str, form: str, out_blocks: tuple[int, ...]) -> None:
    model = perceptron((4, 13))
    (spec,) = start(framework, model, max_factor_dim=5, large_factor=form).coverage().layers
    assert (spec.in_blocks, spec.out_blocks) == ((5,), out_blocks)


@pytest.mark.parametrize("framework", NAMES)
def test_approximation_by_kind(framework: str) -> None:
    choice = {"conv": "reduce", "conv_transpose": "reduce"}
    specs = found(start(framework, convolutional(), approximation=choice))
    assert {name: spec["approximation"] for name, spec in specs.items()} == {
        "conv": "reduce", "grouped": "reduce", "depthwise": "reduce", "up": "reduce", "head": "expand",
    }  # fmt: skip


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("choice", ["expand", "reduce", {"linear": "reduce"}, {"conv": "reduce"}])
def test_a_tied_table(framework: str, choice: Any) -> None:
    """It is as linear as the output layer that it is; the vocabulary's side is the identity."""
    run = start(framework, tied(), approximation=choice, **EVERY_STEP)
    run.observe()
    expected = choice if isinstance(choice, str) else choice.get("linear", "expand")
    assert found(run) == {
        "table": layer("embedding", 1, 4, 9, (4,), (), bias=False, approximation=expected),
        "hidden": layer("linear", 1, 4, 4, (5,), (4,), approximation=expected),
    }


@pytest.mark.parametrize("framework", NAMES)
def test_an_lstm(framework: str) -> None:
    """Every weight of it is a linear layer, however the framework cuts the gates: nothing takes the fallback."""
    run = start(framework, recurrent())
    assert run.coverage().fallbacks == ()
    specs = run.coverage().layers
    assert {spec.kind for spec in specs} == {"linear"}
    assert {spec.in_dim for spec in specs} == {2, 3}
    gates = [spec for spec in specs if not spec.name.endswith("head")]
    assert sum(spec.in_dim * spec.out_dim for spec in gates) == 4 * 3 * (2 + 3)
