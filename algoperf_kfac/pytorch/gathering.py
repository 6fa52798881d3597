"""What a capture came to: the statistics of what was observed, and what is to be said of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import Tensor

from algoperf_kfac.errors import MissingStatisticsError
from algoperf_kfac.layers import (
    INPUTS,
    OUTPUT_GRADIENTS,
    TRANSFORMED_INPUTS,
    LayerSpec,
    also_read_by,
    unrecorded,
)
from algoperf_kfac.positions import check_fits
from algoperf_kfac.pytorch.checks import compare
from algoperf_kfac.pytorch.kinds import AnyRecorder
from algoperf_kfac.pytorch.observer import TRANSFORMED, Observer
from algoperf_kfac.pytorch.options import Options
from algoperf_kfac.pytorch.recorder import Recorder
from algoperf_kfac.pytorch.sights import Sight
from algoperf_kfac.pytorch.statistics import Scalar, Statistics
from algoperf_kfac.pytorch.taps import Incomplete, Tap, Taps

# A backward pass, and no layer before it.
UNSEEN = (
    "Run the forward and the backward pass inside capture(). Nothing is seen of a model that runs in another "
    "thread, as a torch.jit program, or with other tensors in place of its parameters (functional_call, a copy)"
)
# Calls without a part in the loss that were summed with others.
UNUSED = (
    'Run calls whose outputs have no part in the loss under torch.no_grad(), take approximation="reduce", which '
    "keeps less of each call, or leave the layer out with exclude=[...]"
)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What a capture came to.

    Attributes:
        statistics: by layer.
        missing: layers without, and what they missed.
        wrong: layers whose statistics would not be the whole of them, and why.
        backward: whether there was a backward pass.
        rows: examples that each layer with statistics was taken to see.
        calls: how often the first of these was called on the same examples, as far as it was taken to be.
        penalised: whether penalties read the weights of all layers with statistics, so that there is no comparing.
        scaled: whether the caller said what the loss was divided by.
        loss_gradient: what the mean of a loss function got in the latest backward pass, None if unknown.
        sum_gradient: what the sum of one got, where none was a mean.
        inner_sizes: what a mean over all elements may be multiplied by to be one over examples.
        errors: by layer, how far what was captured is from the weight's gradient, relative to it; of a checked
            capture.
        readers: by identity of a parameter: the operation without a rule in which it met data.
        strangers: parameters with a gradient that operations with a rule read, and the optimizer does not have.
        hint: why layers have no statistics, as far as that is known, and what to do.
        second: by layer whose second dimension alone is as long as what the loss function took: both sizes.
        more_rows: a layer, its rows and the fewer ones of the loss function, where no layer sees as few.
        in_parts: layers whose calls have the rows of the loss function together: how many calls, and rows.
        sights: of a capture that ran uncompiled, what compiled graphs need to know of each use of its layers.
        obstacles: why compiled graphs could not have taken all of it.
    """

    statistics: dict[str, Statistics]
    missing: dict[str, str]
    wrong: dict[str, str]
    backward: bool
    rows: dict[str, int]
    calls: int
    penalised: bool
    scaled: bool
    loss_gradient: Tensor | None
    sum_gradient: Tensor | None
    inner_sizes: set[int]
    errors: dict[str, float]
    readers: dict[int, str]
    strangers: list[Tensor]
    hint: str
    second: dict[str, tuple[int, int]]
    more_rows: tuple[str, int, int] | None
    in_parts: dict[str, tuple[int, int]]
    sights: dict[str, tuple[Sight, ...]]
    obstacles: list[str]


def gather(observer: Observer, options: Options, normalizer: Scalar | None) -> Gathered:
    """What the passes that an observer saw came to.

    Args:
        observer: after the passes.
        options: of the capture.
        normalizer: what the caller says that the summed loss was divided by.

    Raises:
        MissingStatisticsError: the backward passes of a sampled or exact Fisher were left out.
        ValueError: positions fit no layer.
    """
    layers, taps, kind = observer.layers, options.taps, options.config.fisher
    observer.settle()
    if taps is None:
        calls = {name: rows for name, rows in observer.scale.calls.items() if name in layers.covered}
        check_fits(options.positions, calls, layers.names())
    else:
        _take(observer, taps)
    missing, wrong = _incomplete(observer)
    _check_passes(observer, kind, missing.values())
    counted = {n: r for n, r in observer.recorders.items() if n not in missing and n not in wrong}
    for name, recorder in counted.items():
        observer.scale.take_parts(name, recorder)
        recorder.note_loss(observer.scale.gradient)
        recorder.end_group()
    products = {name: recorder.product for name, recorder in counted.items()}
    penalties, hidden = observer.penalties.gradients, observer.uses.penalised
    errors, too_far = compare(layers.covered, products, observer.gradients, penalties, hidden)
    counted = {name: recorder for name, recorder in counted.items() if name not in too_far}
    factor = observer.scale.factor(counted, options.config, normalizer)
    by_loss = normalizer is None and kind == "empirical"
    sights, obstacles = ({}, []) if taps is not None else _sights(observer, kind, counted)
    rows = observer.scale.rows(counted, layers.covered)
    return Gathered(
        statistics={name: recorder.statistics(factor, by_loss=by_loss) for name, recorder in counted.items()},
        missing=missing,
        wrong=wrong | too_far,
        backward=observer.passes.seen,
        rows=rows,
        calls=max((observer.scale.calls_on_the_same(name) for name in list(rows)[:1]), default=1),
        penalised=bool(counted)
        and all(id(layers.covered[name].weight) in observer.uses.penalised for name in counted),
        scaled=normalizer is not None,
        loss_gradient=observer.scale.gradient if kind == "empirical" else None,
        sum_gradient=observer.scale.summed if kind == "empirical" and observer.scale.gradient is None else None,
        inner_sizes=observer.scale.inner_sizes,
        errors=errors,
        readers=observer.uses.missed,
        strangers=observer.strangers,
        hint=_hint(observer, missing),
        second=observer.scale.batch_second(counted),
        more_rows=observer.scale.more_rows(counted),
        in_parts=observer.scale.in_parts(counted),
        sights=sights,
        obstacles=obstacles,
    )


def _take(observer: Observer, taps: Taps) -> None:
    """What compiled graphs took, beside what ran uncompiled.

    Backends that run a graph as Python (backend="eager") show its operations once more: the tap is the whole.
    """
    ran_uncompiled = observer.recorders
    observer.recorders = {}
    by_layer: dict[str, list[Tap]] = {}
    for tap in taps.taps:
        by_layer.setdefault(tap.spec.name, []).append(tap)
    shown = {name: ran_uncompiled[name].uses for name in by_layer if name in ran_uncompiled}
    beside = {
        tap.number: _beside(tap, use, taps)
        for name, uses in shown.items()
        for tap, use in zip(by_layer[name], uses, strict=True)
    }
    judged = taps.judged(beside)
    for name, own in by_layer.items():
        if not any(tap.number in judged for tap in own):
            continue
        recorder = observer.layers.recorder(own[0].spec, own[0].dtype, one_pass=True, checks=False)
        observer.passes.seen = True  # torch 2.9 may not ask the mode on the step that compiles
        observer.scale.calls[name] = [tap.sight.rows for tap in own]
        complete = True
        for tap, use, other in zip(own, recorder.uses, shown.get(name, [None] * len(own)), strict=True):
            if tap.number in judged:
                tap.take(use, judged[tap.number], taps.masks)
            elif other is not None:
                complete = _add(use, other) and complete
        ran_uncompiled.pop(name, None)
        if complete and recorder.is_complete:
            observer.recorders[name] = recorder
        else:  # it misses statistics
            taps.arrivals.append(Incomplete(name))
    observer.recorders |= ran_uncompiled


def _beside(tap: Tap, use: Recorder, taps: Taps) -> int:
    """Calls of a use of a layer that ran outside of graphs, and do not add up with those in graphs.

    Args:
        tap: of the use.
        use: saw all that ran as Python.
        taps: all of them.
    """
    calls = max(0, use.seen - tap.shown)
    if not calls or tap.join(use, taps.masks):
        return 0
    return calls if tap.sight.calls == 1 else calls + tap.sight.calls


def _add(use: Recorder, other: Recorder) -> bool:
    """Add to a use of a layer what ran uncompiled of it, if anything; whether that is the whole of it."""
    if not other.rows and not other.calls:
        return True
    if not other.is_complete:
        return False
    other.end_group()
    if other.sums.a is None or other.sums.b is None:
        return False
    sums = other.sums
    use.sums.add(other.sums.a, other.sums.b, sums.a_count, sums.examples, sums.vanished, sums.rows)
    use.rounding = max(use.rounding, other.rounding)
    return True


def _incomplete(observer: Observer) -> tuple[dict[str, str], dict[str, str]]:
    """Covered layers without statistics, and what they missed; and those whose statistics are not all, and why."""
    missing: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for spec in (layer.spec for layer in observer.layers.covered.values()):
        use = _missed_use(observer, spec)
        recorder = observer.recorders.get(spec.name)
        if recorder is None:
            if use is not None:
                wrong[spec.name] = unrecorded(use)
            else:
                missing[spec.name] = TRANSFORMED_INPUTS if spec.name in observer.transformed else INPUTS
        elif spec.name in observer.transformed:
            wrong[spec.name] = also_read_by("a call inside torch.func (grad, vmap, ...)")
        elif use is not None:
            wrong[spec.name] = also_read_by(use)
        elif recorder.missed:
            missing[spec.name] = recorder.missed
    return missing, wrong


def _hint(observer: Observer, missing: Mapping[str, str]) -> str:
    """What is to be said of layers without statistics, where it is not what is always said."""
    if not observer.recorders:
        return observer.hint or (UNSEEN if observer.passes.seen else "")
    lost = set(missing.values()) - {INPUTS}
    if TRANSFORMED_INPUTS in lost:
        return TRANSFORMED
    return UNUSED if lost and OUTPUT_GRADIENTS not in lost else ""


def _missed_use(observer: Observer, spec: LayerSpec) -> str | None:
    """An operation that reads the weight or bias of a layer and is not recorded."""
    names = (spec.weight, spec.bias) if spec.bias is not None else (spec.weight,)
    uses = (observer.uses.missed.get(id(observer.layers.params[name])) for name in names)
    return next((use for use in uses if use is not None), None)


def _check_passes(observer: Observer, kind: str, missed: Collection[str]) -> None:
    """Raises MissingStatisticsError if output gradients are missing as nobody asked for a Fisher's."""
    left_out = kind != "empirical" and observer.passes.seen and not observer.passes.of_fisher
    if left_out and OUTPUT_GRADIENTS in missed:
        raise MissingStatisticsError(
            f"fisher={kind!r} needs capture.backward_fisher(outputs, loss_type) between the forward pass and "
            "loss.backward()"
        )


def _sights(
    observer: Observer, kind: str, recorders: Mapping[str, AnyRecorder]
) -> tuple[dict[str, tuple[Sight, ...]], list[str]]:
    """What compiled graphs have to know of layers, the one that sees the batch first; and what forbids them."""
    if kind != "empirical":
        return {}, [f"fisher={kind!r}"]
    ordered = {name: recorders[name] for name in observer.scale.by_batch(recorders)}
    return observer.sights.of(ordered, observer.layers.covered, observer.uses.readers)
