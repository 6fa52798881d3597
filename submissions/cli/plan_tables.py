"""Plans as text for a terminal, or as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from algoperf_kfac.cost import DEVICE_BYTES, LayerPlan, Memory, Plan
from algoperf_kfac.layers import FallbackSpec

Named = tuple[str, Plan, str, int]
Table = list[list[str]]
LAYER_HEAD = ["layer", "", "kind", "P_in", "P_out", "R", "bias", "approximation", "A", "B"]
OTHER_HEAD = ["other parameters", "", "entries", "treatment", "reason"]
SUMMARY_HEAD = ["workload", "covered", "layers", "K-FAC state", "NadamW peak", "peak", "fits 16 GB", "model"]
SUMMARY_HEAD += ["statistics", "refresh", "precond.", "sum"]
RIGHT = {"P_in", "P_out", "R", "entries", "size", *SUMMARY_HEAD[1:]}

# What XLA took of the JAX estimate, compiled for a CPU: growth or size of the temporary memory that
# `memory_analysis()` gives for the gradient of the outputs' sum, at batches of 2 to 8. There was no GPU to ask.
XLA_ON_CPU = {
    "imagenet_resnet": 1.1,
    "imagenet_vit": 1.7,
    "librispeech_conformer": 1.6,
    "librispeech_deepspeech": 1.5,
}
LEGEND = f"""\
Layers that differ in a number of their path alone share a row, with their count. R: positions that share the
weight, of one example, all calls of the layer together. A, B: sizes of the factors, or of their diagonal blocks.
Memory is that of one device, 1 GB = 10^9 bytes; it fits if the peak is at most {DEVICE_BYTES / 1e9:.0f} GB. The
peak holds parameters, gradients, all state of the optimizer and the largest of: activations with what a statistics
step holds beside them; the sums for A and B being averaged; the refresh of all layers; the update. "NadamW peak" is
that of the first-order reference: parameters, gradients, moments, and the larger of activations and update.
Activations are an estimate: float32, uncompiled, without the loss, and without what allocator and libraries take.
In PyTorch they are what autograd keeps, dropout and LSTMs as on a GPU; attention counts unfused unless the model
fuses it itself. In JAX they are the least from which what the derivative keeps follows element by element; XLA may
keep more. Flops are shares of the model's own forward and backward pass (its weighted operations alone, which
overstates the shares), averaged over the intervals; the work of a refresh is divided over the devices. They are not
seconds: decompositions run slower than products.
"""


def render(plan: Plan, name: str, batch_size: int, note: str, form: str, *, legend: bool = True) -> str:
    """One plan: summary, memory, flops, layers, other parameters."""
    title = f"{name}: batch {batch_size:,} on {_count(plan.devices, 'device')}" + (f" ({note})" if note else "")
    covered, total = plan.coverage.num_covered, plan.coverage.num_parameters
    config = plan.config
    intervals = f"statistics every {_count(config.factor_interval, 'step')}"
    if config.statistics_rows is not None:
        intervals += f" from at least {config.statistics_rows:,} rows of a call"
    intervals += f", refresh every {_count(config.refresh_interval, 'step')}"
    facts = [
        f"K-FAC covers {covered:,} of {total:,} parameters ({100 * plan.coverage.fraction:.1f} %), {intervals}.",
        f"A device needs {_size(plan.memory.peak)} at its peak, {_size(plan.memory.kfac_state)} of it K-FAC's "
        f"state: it {'fits' if plan.fits() else 'does NOT fit'} {DEVICE_BYTES / 1e9:.0f} GB. NadamW alone needs "
        f"{_size(plan.memory.first_order_peak)}.",
        f"K-FAC adds {_percent(plan.flops.total)} to the model's {_flops(plan.flops.model)} per step and device: "
        f"statistics {_percent(plan.flops.statistics)}, refresh {_percent(plan.flops.refresh)}, "
        f"preconditioning {_percent(plan.flops.preconditioning)}.",
    ]
    tables = [_memory(plan), _layers(plan)]
    if plan.coverage.fallbacks:
        tables.append(_others(plan.coverage.fallbacks))
    if form == "markdown":
        return "\n\n".join([f"## {title}", "\n".join(facts), *map(_markdown, tables)]) + "\n"
    rest = [LEGEND.rstrip()] if legend else []
    return "\n\n".join([title, "\n".join(facts), *map(_text, tables), *rest]) + "\n"


def render_all(plans: Mapping[str, Sequence[Named]], command: str, form: str) -> str:
    """A summary of several plans per framework, then each plan."""
    if form == "markdown":
        parts = [f"# Coverage, memory and cost on AlgoPerf's workloads\n\nMade by `{command}`.\n\n{LEGEND}"]
        for framework, group in plans.items():
            parts.append(f"{framework}:\n\n{_markdown(_summary(group))}\n")
            if framework == "JAX":
                parts.append(_caution(group))
    else:
        parts = [f"{framework}\n{_text(_summary(group))}\n" for framework, group in plans.items()]
    for framework, group in plans.items():
        for name, plan, note, batch_size in group:
            title = f"{name} in {framework}" if len(plans) > 1 else name
            parts.append(render(plan, title, batch_size, note, form, legend=False))
    if form == "text":
        parts.append(LEGEND)
    return "\n".join(parts)


def _caution(plans: Sequence[Named]) -> str:
    """What hangs on XLA keeping as little as the estimate says."""

    def too_much(peak: Callable[[Memory], float]) -> str:
        names = []
        for name, plan, _, _ in plans:
            more = (XLA_ON_CPU.get(name, 1.0) - 1) * plan.memory.activations
            if peak(plan.memory) <= DEVICE_BYTES < peak(plan.memory) + more:
                names.append(name)
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
    for name, plan, _, _ in plans:
        memory, flops = plan.memory, plan.flops
        rows.append(
            [
                name,
                f"{100 * plan.coverage.fraction:.2f} %",
                str(len(plan.layers)),
                _size(memory.kfac_state),
                _size(memory.first_order_peak),
                _size(memory.peak),
                "yes" if plan.fits() else "no",
                _flops(flops.model),
                *map(_percent, (flops.statistics, flops.refresh, flops.preconditioning, flops.total)),
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
        ("inverses" if plan.config.preconditioner == "inverse" else "eigenbases", memory.bases),
        ("operators", memory.operators),
        (f"step: activations, {kept}", memory.activations),
        ("step: what a statistics step holds beside them", memory.capture),
        ("step: sums for A and B", memory.accumulators),
        ("step: averaging them", memory.averaging),
        ("step: refresh", memory.refresh),
        ("step: update", memory.update),
        ("peak", memory.peak),
    ]
    return [["memory of a device", "size"], *([name, _size(size)] for name, size in rows if size)]


def _layers(plan: Plan) -> Table:
    groups: dict[tuple[str, ...], list[LayerPlan]] = {}
    key: tuple[str, ...]
    for layer in plan.layers:
        spec = layer.spec
        positions = "?" if layer.load is None else f"{layer.load.positions:,.10g}"
        kind = spec.kind if spec.groups == 1 else f"{spec.kind}, {spec.groups} groups"
        key = (
            _pattern(spec.name),
            kind,
            f"{spec.in_dim:,}",
            f"{spec.out_dim:,}",
            positions,
            "-" if spec.bias is None else "yes",
            spec.approximation,
            _blocks(spec.in_blocks),
            _blocks(spec.out_blocks),
        )
        groups.setdefault(key, []).append(layer)
    rows = [LAYER_HEAD]
    for key, members in groups.items():
        name = members[0].spec.name if len(members) == 1 else key[0]
        rows.append([name, _times(len(members)), *key[1:]])
    return rows


def _others(fallbacks: Sequence[FallbackSpec]) -> Table:
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for spec in fallbacks:
        groups.setdefault((_pattern(spec.name), spec.shape, spec.reason), []).append(spec.name)
    rows = [OTHER_HEAD]
    for (pattern, shape, reason), names in groups.items():
        name = names[0] if len(names) == 1 else pattern
        rows.append([name, _times(len(names)), f"{len(names) * math.prod(shape):,}", "NadamW", reason])
    return rows


def _pattern(name: str) -> str:
    """The path with its numbers left open."""
    return re.sub(r"\d+", "*", name)


def _times(count: int) -> str:
    return "" if count == 1 else f"x {count}"


def _count(number: int, noun: str) -> str:
    return f"{noun}" if number == 1 and noun == "step" else f"{number} {noun}{'' if number == 1 else 's'}"


def _blocks(blocks: tuple[int, ...]) -> str:
    return " + ".join(f"{size:,}" for size in blocks) if blocks else "identity"


def _size(size: float) -> str:
    unit, symbol = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:.2f} {symbol}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _flops(flops: float) -> str:
    unit, symbol = (1e12, "Tflop") if flops >= 1e12 else (1e9, "Gflop") if flops >= 1e8 else (1e6, "Mflop")
    return f"{flops / unit:.3g} {symbol}"


def _text(table: Table) -> str:
    table = _without_empty_columns(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [head in RIGHT for head in table[0]]
    lines = []
    for row in table:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())
    return "\n".join(lines)


def _markdown(table: Table) -> str:
    table = _without_empty_columns(table)
    rule = ["---:" if head in RIGHT else "---" for head in table[0]]
    rows = [[cell.replace("*", r"\*").replace("|", r"\|") for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _without_empty_columns(table: Table) -> Table:
    keep = [any(column) for column in zip(*table, strict=True)]
    return [[cell for cell, kept in zip(row, keep, strict=True) if kept] for row in table]
