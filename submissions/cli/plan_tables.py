"""Plans as text for a terminal, or as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from algoperf_kfac.cost import LayerPlan, Memory, Plan
from algoperf_kfac.crossover import Rates, compare
from algoperf_kfac.layers import FallbackSpec
from algoperf_kfac.seconds import Speed, refresh_in_turns
from submissions.cli.named_plan import Named, Room
from submissions.cli.plan_text import (
    Table,
    block_sizes,
    counted,
    in_bytes,
    in_flops,
    markdown,
    percent,
    plain,
    times,
    without_numbers,
)
from workloads.algoperf import SELF_TUNING

LAYER_HEAD = ["layer", "", "kind", "P_in", "P_out", "R", "bias", "approximation", "A", "B"]
OTHER_HEAD = ["other parameters", "", "entries", "treatment", "reason"]
SUMMARY_HEAD = ["workload", "covered", "layers", "K-FAC state", "NadamW peak", "peak", "fits", "model"]
SUMMARY_HEAD += ["statistics", "refresh", "precond.", "sum"]
BUDGET_HEAD = ["workload", "budget s", "step hint", "allowed s per step", "self-tuning s", "K-FAC s per step"]
BLOCKS = (2048, 1024)  # what max_factor_dim might be instead
PACE_HEAD = ["workload", "all refreshed s", "interval", "share", "interval by the budget", "share then"]
PACE_HEAD += [*(f"blocks of {size:,}" for size in BLOCKS), "K-FAC s per step then", "allowed s"]
COST_HEAD = ["K-FAC adds, per step", "of the model's flops", "seconds"]
RIGHT = {"P_in", "P_out", "R", "entries", "size", *SUMMARY_HEAD[1:], *BUDGET_HEAD[1:], *PACE_HEAD[1:]} | {
    *COST_HEAD[1:]
}

# What XLA took of the JAX estimate, compiled for a CPU: growth or size of the temporary memory that
# `memory_analysis()` gives for the gradient of the outputs' sum, at batches of 2 to 8. There was no GPU to ask.
XLA_ON_CPU = {
    "imagenet_resnet": 1.1,
    "imagenet_vit": 1.7,
    "librispeech_conformer": 1.6,
    "librispeech_deepspeech": 1.5,
}
NO_SECONDS = "Seconds are not known here: python -m submissions plan --calibrate measures this machine once."
LEGEND = """\
Layers that differ in a number of their path alone share a row, with their count. R: positions that share the
weight, of one example, all calls of the layer together. A, B: sizes of the factors, or of their diagonal blocks.
Memory is that of one device, 1 GB = 10^9 bytes; it fits if the peak is at most what the framework may use. The
peak holds parameters, gradients, all state of the optimizer and the largest of: activations with what a statistics
step holds beside them and the loss; the sums for A and B being averaged; the refresh of all layers; the update.
"NadamW peak" is that of the first-order reference: parameters, gradients, moments, and the larger of activations
with the loss and update. The loss takes three times the model's outputs: those, what it keeps of them, and their
gradient.
Activations are an estimate: float32, and without what allocator and libraries take.
In PyTorch they are what autograd keeps, dropout and LSTMs as on a GPU; attention counts unfused unless the model
fuses it itself. Of workloads that AlgoPerf's runner compiles, and that are one graph (fastmri is not), they are
what the graph of the forward pass hands to that of the backward pass, as the installed torch divides them.
In JAX they are the least from which what the derivative keeps follows element by element; XLA may keep more.
Flops are shares of the model's own forward and backward pass (its weighted operations alone, which
overstates the shares), averaged over the intervals; the work of a refresh is divided over the devices, and so is
that of directions ("precond."), in JAX where at least as many layers as devices are equal. They are not seconds:
decompositions run slower than products. Seconds, where they stand, come from measured times of square matrices on
the device that is named; operations are taken one after the other, nothing overlaps with the model.
Expand against reduce is told by two of them, the rate of products and that of sums over positions
(algoperf_kfac/crossover.py); docs/generated/complexity.md has the errors of that, on one processor.
A refresh budget takes the seconds that AlgoPerf allows a step for those of a step without refreshes: training
measures them instead.
"""


def drawn(table: Table, form: str) -> str:
    """A table of this page as "text" or as "markdown"."""
    return (markdown if form == "markdown" else plain)(table, RIGHT)


def render(named: Named, form: str, *, legend: bool = True) -> str:
    """One plan: summary, memory, flops, layers, other parameters."""
    name, plan, note, batch_size = named.name, named.plan, named.note, named.batch_size
    title = f"{name}: batch {batch_size:,} on {counted(plan.devices, 'device')}" + (f" ({note})" if note else "")
    covered, total = plan.coverage.num_covered, plan.coverage.num_parameters
    config = plan.config
    intervals = f"statistics every {counted(config.factor_interval, 'step')}"
    if config.statistics_rows is not None:
        intervals += f" from at least {config.statistics_rows:,} rows of a call"
        if config.statistics_rows_by_side:
            intervals += " (no fewer than a layer's largest block has sides)"
    intervals += f", refresh every {counted(config.refresh_interval, 'step')}"
    facts = [
        f"K-FAC covers {covered:,} of {total:,} parameters ({100 * plan.coverage.fraction:.1f} %), {intervals}.",
        f"A device needs {in_bytes(plan.memory.peak)} at its peak, {in_bytes(plan.memory.kfac_state)} of it "
        f"K-FAC's state: {_verdict(plan, named.room)}. "
        f"NadamW alone needs {in_bytes(plan.memory.first_order_peak)}.",
        f"K-FAC adds {percent(plan.flops.total)} to the model's {in_flops(plan.flops.model)} per step and device: "
        f"statistics {percent(plan.flops.statistics)}, refresh {percent(plan.flops.refresh)}, "
        f"preconditioning {percent(plan.flops.preconditioning)}.",
        *_in_seconds(named),
    ]
    tables = [*([_costs(named)] if named.seconds else []), _memory(plan), _layers(plan)]
    if plan.coverage.fallbacks:
        tables.append(_others(plan.coverage.fallbacks))
    if form == "markdown":
        return "\n\n".join([f"## {title}", "\n".join(facts), *(drawn(table, form) for table in tables)]) + "\n"
    rest = [LEGEND.rstrip()] if legend else []
    return "\n\n".join([title, "\n".join(facts), *(drawn(table, form) for table in tables), *rest]) + "\n"


def _verdict(plan: Plan, room: Room) -> str:
    """Whether it fits; and if not, what to change, in one line."""
    if plan.fits(room.usable):
        return f"it fits {room}"
    return f"it does NOT fit {room}: take more --devices, a smaller --batch_size or less max_factor_dim"


def _in_seconds(named: Named) -> list[str]:
    """Sentences on seconds: K-FAC's, and those that are allowed."""
    lines, seconds = [], named.seconds
    if seconds is not None and named.speed is not None:
        lines.append(f"By the calibration of {named.speed.device} these are {seconds.total:.3g} s a step.")
        lines += _of_approximations(named, named.speed)
        lines += _of_budget(named, named.speed)
    if named.budget is not None:
        budget = named.budget
        lines.append(
            f"AlgoPerf 1.0 allows {budget.per_step:.3g} s a step for the {budget.step_hint:,} steps of its hint "
            f"({SELF_TUNING * budget.per_step:.3g} s in self-tuning), the model's own work included."
        )
    return lines


def _of_approximations(named: Named, speed: Speed) -> list[str]:
    """Sentences on which approximation forms its statistics faster."""
    plan, found = named.plan, compare(named.plan, Rates.of(speed))
    known = sum(layer.load is not None for layer in plan.layers)
    if not known:
        return []
    winner, loser = ("reduce", "expand") if found.saved > 0 else ("expand", "reduce")
    text = (
        f"By two constants, flops and bytes, A and B take {found.expand:.3g} s a step with K-FAC-expand, "
        f"{found.reduce:.3g} s with K-FAC-reduce: {winner} saves {abs(found.saved):.3g} s a step over {loser}"
    )
    split = (
        f", and is the faster in {found.reduced if winner == 'reduce' else known - found.reduced} of {known} layers"
    )
    if found.best < min(found.expand, found.reduce):
        split += f" (each layer in its faster one: {found.best:.3g} s)"
    return [f"{text}{split}."]


def _of_budget(named: Named, speed: Speed) -> list[str]:
    """A sentence on the refresh interval under a budget."""
    config, found = named.plan.config, named.paced()
    share = config.refresh_budget
    if share is None:
        return []
    refresh = refresh_in_turns(named.plan, speed)
    text = f"All layers are refreshed in {refresh:.3g} s"
    every = f"every {counted(config.refresh_interval, 'step')}"
    if found is None:
        enough = refresh * (1 - share) / (share * config.refresh_interval)
        return [f"{text}: {every} that is within {percent(share)} of the time where a step takes {enough:.3g} s."]
    return [
        f"{text}: {percent(found.share)} of the time {every}. A refresh_budget of {percent(share)} makes it "
        f"every {counted(found.interval, 'step')}, and what K-FAC adds {named.seconds_then:.3g} s a step."
    ]


def _costs(named: Named) -> Table:
    """Flops beside seconds."""
    flops, seconds = named.plan.flops, named.seconds
    assert seconds is not None
    rows = [
        ("statistics", flops.statistics, seconds.statistics),
        ("refresh", flops.refresh, seconds.refresh),
        ("products with the gradient", flops.preconditioning, seconds.preconditioning),
        ("sum", flops.total, seconds.total),
    ]
    return [COST_HEAD, *([name, percent(share), f"{taken:.3g}"] for name, share, taken in rows)]


def _budgets(plans: Sequence[Named]) -> Table:
    """What AlgoPerf allows, and what K-FAC takes of it where that is known."""
    rows = [BUDGET_HEAD]
    for named in plans:
        if named.budget is not None:
            budget, seconds = named.budget, named.seconds
            allowed = budget.per_step
            row = [named.name, f"{budget.seconds:,}", f"{budget.step_hint:,}", f"{allowed:.3f}"]
            row += [f"{SELF_TUNING * allowed:.3f}", "" if seconds is None else f"{seconds.total:.3g}"]
            rows.append(row)
    return rows


def intervals(plans: Sequence[Named]) -> Table:
    """What a refresh budget makes of the interval; empty where it is not known."""
    rows = [PACE_HEAD]
    for named in plans:
        found, then = named.paced(), named.seconds_then
        if found is None or then is None or named.budget is None:
            continue
        smaller = [other.interval for size in BLOCKS if (other := named.paced(size)) is not None]
        rows.append(
            [
                *(named.name, f"{found.refresh:.3g}", f"{named.plan.config.refresh_interval:,}"),
                *(percent(found.share), f"{found.interval:,}", percent(found.share_then)),
                *(f"{interval:,}" for interval in smaller),
                *(f"{then:.3g}", f"{named.budget.per_step:.3f}"),
            ]
        )
    return rows if len(rows) > 1 else []


def render_speed(speed: Speed) -> str:
    """A calibration as a table, in milliseconds by size."""
    head = ["matrices", "product ms", "eigendecomposition ms", "orthogonal iteration ms", "inverse ms"]
    rows = [head]
    for size in sorted(speed.products):
        tables = (speed.products, speed.decompositions, speed.iterations, speed.inverses)
        rows.append([f"{size:,}", *(f"{1e3 * table[size]:.3g}" for table in tables)])
    return f"{speed.device}: a sum reads {speed.bytes_per_second / 1e9:.3g} GB/s\n\n{plain(rows)}"


def render_all(plans: Mapping[str, Sequence[Named]], command: str, form: str) -> str:
    """A summary of several plans per framework, then each plan."""
    if form == "markdown":
        parts = [f"# Coverage, memory and cost on AlgoPerf's workloads\n\nMade by `{command}`.\n\n{LEGEND}"]
        for framework, group in plans.items():
            parts.append(f"{framework}:\n\n{drawn(_summary(group), form)}\n")
            parts.append(f"{_room_of(group)}\n")
            if framework == "JAX":
                parts.append(_caution(group))
    else:
        parts = [
            f"{framework}\n{drawn(_summary(group), form)}\n{_room_of(group)}\n"
            for framework, group in plans.items()
        ]
    parts += _allowed(plans, form)
    for framework, group in plans.items():
        for named in group:
            title = f"{named.name} in {framework}" if len(plans) > 1 else named.name
            parts.append(render(dataclasses.replace(named, name=title), form, legend=False))
    if form == "text":
        parts.append(LEGEND)
    return "\n".join(parts)


def _room_of(group: Sequence[Named]) -> str:
    return f"A device has {group[0].room}." if group else ""


def _allowed(plans: Mapping[str, Sequence[Named]], form: str) -> list[str]:
    """What AlgoPerf allows a step; once, where no device was measured: it is the same in both frameworks."""
    groups = list(plans.items())
    measured = any(named.speed is not None for _, group in groups for named in group)
    parts = []
    for framework, group in groups if measured else groups[:1]:
        device = f", in {framework} on {group[0].speed.device}" if group and group[0].speed is not None else ""
        parts.append(f"What AlgoPerf 1.0 allows a step{device}:\n\n{drawn(_budgets(group), form)}\n")
        at_budget = intervals(group)
        if at_budget:
            share = percent(group[0].plan.config.refresh_budget or 0.0)
            parts.append(f"Refreshes that take at most {share} of the time{device}:\n\n{drawn(at_budget, form)}\n")
    return parts


def _caution(plans: Sequence[Named]) -> str:
    """What hangs on XLA keeping as little as the estimate says."""

    def too_much(peak: Callable[[Memory], float]) -> str:
        names = []
        for named in plans:
            memory = named.plan.memory
            more = (XLA_ON_CPU.get(named.name, 1.0) - 1) * memory.activations
            if peak(memory) <= named.room.usable < peak(memory) + more:
                names.append(named.name)
        return ", ".join(names) or "none"

    measured = ", ".join(f"{factor} times ({name})" for name, factor in XLA_ON_CPU.items())
    return (
        "Compiled for a CPU, XLA took more than these activations, with copies in other layouts and gaps:\n"
        f"{measured}.\n"
        "The others were not compiled, and none for a GPU. By those figures these would not fit,\n"
        f"with K-FAC: {too_much(lambda m: m.peak)}; "
        f"with NadamW alone: {too_much(lambda m: m.first_order_peak)}.\n"
    )


def _summary(plans: Sequence[Named]) -> Table:
    rows = [SUMMARY_HEAD]
    for named in plans:
        plan = named.plan
        memory, flops = plan.memory, plan.flops
        rows.append(
            [
                named.name,
                f"{100 * plan.coverage.fraction:.2f} %",
                str(len(plan.layers)),
                in_bytes(memory.kfac_state),
                in_bytes(memory.first_order_peak),
                in_bytes(memory.peak),
                "yes" if plan.fits(named.room.usable) else "no",
                in_flops(flops.model),
                *map(percent, (flops.statistics, flops.refresh, flops.preconditioning, flops.total)),
            ]
        )
    return rows


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    kept = "kept for the backward pass" if plan.measured_activations else "inputs and outputs of the layers"
    rows = [
        ("parameters", memory.parameters),
        (
            "gradients" + (", and buckets to send them" if memory.gradients > memory.parameters else ""),
            memory.gradients,
        ),
        ("NadamW moments", memory.moments),
        ("factors A and B", memory.factors),
        ("eigenbases and eigenvalues", memory.bases),
        ("operators", memory.operators),
        (f"step: activations, {kept}", memory.activations),
        ("step: outputs, what the loss keeps of them, their gradient", memory.loss),
        ("step: what a statistics step holds beside them", memory.capture),
        ("step: sums for A and B", memory.accumulators),
        ("step: averaging them", memory.averaging),
        ("step: refresh", memory.refresh),
        ("step: update", memory.update),
        ("peak", memory.peak),
    ]
    return [["memory of a device", "size"], *([name, in_bytes(size)] for name, size in rows if size)]


def _layers(plan: Plan) -> Table:
    groups: dict[tuple[str, ...], list[LayerPlan]] = {}
    key: tuple[str, ...]
    for layer in plan.layers:
        spec = layer.spec
        positions = "?" if layer.load is None else f"{layer.load.positions:,.10g}"
        kind = spec.kind if spec.groups == 1 else f"{spec.kind}, {spec.groups} groups"
        key = (
            without_numbers(spec.name),
            kind,
            f"{spec.in_dim:,}",
            f"{spec.out_dim:,}",
            positions,
            "-" if spec.bias is None else "yes",
            spec.approximation,
            block_sizes(spec.in_blocks),
            block_sizes(spec.out_blocks),
        )
        groups.setdefault(key, []).append(layer)
    rows = [LAYER_HEAD]
    for key, members in groups.items():
        name = members[0].spec.name if len(members) == 1 else key[0]
        rows.append([name, times(len(members)), *key[1:]])
    return rows


def _others(fallbacks: Sequence[FallbackSpec]) -> Table:
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for spec in fallbacks:
        groups.setdefault((without_numbers(spec.name), spec.shape, spec.reason), []).append(spec.name)
    rows = [OTHER_HEAD]
    for (pattern, shape, reason), names in groups.items():
        name = names[0] if len(names) == 1 else pattern
        rows.append([name, times(len(names)), f"{len(names) * math.prod(shape):,}", "NadamW", reason])
    return rows
