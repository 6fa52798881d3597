"""Which layers data-parallel processes have in common: raw parameters become layers when they are used, which each
process does in its own order.

Everything here follows from what all processes know, so that all come to the same end, an error included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from algoperf_kfac.layers import LayerSpec
from algoperf_kfac.pytorch.views import overlap


@dataclasses.dataclass(frozen=True)
class Entry:
    """A layer as one process covers it.

    Attributes:
        spec: the layer.
        settled: whether there are statistics of it, so that its sizes stand.
        rounding: of this step's statistics (`Statistics.rounding`); None if there are none.
    """

    spec: LayerSpec
    settled: bool
    rounding: float | None


def common_layers(books: Sequence[Mapping[str, Entry]]) -> dict[str, LayerSpec]:
    """The layers that some process covers, in one order on all: those with statistics of this step come first.

    A process that has not used a layer so far covers it as the others do.

    Args:
        books: what each process covers, by name.

    Raises:
        RuntimeError: if they would add up statistics of different weights or sizes, or would have two layers for
            one weight.
    """
    chosen: dict[str, tuple[int, LayerSpec]] = {}
    known: dict[str, int] = {}
    for settled in (True, False):
        for rank, book in enumerate(books):
            for name, entry in book.items():
                if entry.settled is not settled:
                    continue
                known[name] = known.get(name, 0) + 1
                first, spec = chosen.setdefault(name, (rank, entry.spec))
                if settled and spec != entry.spec:
                    raise _disagreement(_differences(name, spec, entry.spec), first, rank)
    _check_apart(chosen, {name for name, count in known.items() if count < len(books)})
    seen = [name for book in books for name, entry in book.items() if entry.rounding is not None]
    rest = [name for book in books for name in book]
    return {name: chosen[name][1] for name in dict.fromkeys([*seen, *rest])}


def _check_apart(chosen: Mapping[str, tuple[int, LayerSpec]], joining: set[str]) -> None:
    """Raises RuntimeError if a layer that some processes do not have has a parameter of another."""
    by_parameter: dict[str, list[str]] = {}
    for name, (_, spec) in chosen.items():
        for parameter in (spec.weight, spec.bias):
            if parameter is not None:
                by_parameter.setdefault(parameter, []).append(name)
    for parameter, names in by_parameter.items():
        for name in (name for name in names if name in joining):
            rank, spec = chosen[name]
            for other in (other for other in names if other != name):
                other_rank, other_spec = chosen[other]
                if _share(spec, other_spec, parameter):
                    what = f"layer {name} and layer {other} both have {parameter}"
                    raise _disagreement(what, rank, other_rank)


def _share(one: LayerSpec, two: LayerSpec, parameter: str) -> bool:
    """Whether two layers have elements of a parameter in common."""
    if one.weight == two.weight == parameter:
        return overlap(one, two)
    if one.bias_start is None or two.bias_start is None:
        return True
    ends = [spec.bias_start + spec.groups * spec.out_dim for spec in (one, two) if spec.bias_start is not None]
    return max(one.bias_start, two.bias_start) < min(ends)


def _differences(name: str, one: LayerSpec, two: LayerSpec) -> str:
    values = ((f.name, getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(LayerSpec))
    return f"layer {name} has " + ", ".join(f"{field}={x!r} and {y!r}" for field, x, y in values if x != y)


def _disagreement(what: str, rank: int, other: int) -> RuntimeError:
    return RuntimeError(
        f"processes {rank} and {other} read a weight in different ways: {what}. All that share statistics must "
        "read it alike (in one operation, with the same bias) and continue from the same state; or leave its "
        "module out with exclude=[...]"
    )
