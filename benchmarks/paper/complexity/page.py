"""The page of complexity: slopes, where the approximations cross, memory, and the error of the cost model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from algoperf_kfac.crossover import Rates
from benchmarks.paper.complexity import model, slopes
from benchmarks.paper.complexity.layers import FRAMEWORKS, Sweep, layers_of
from benchmarks.paper.complexity.records import Results, key_of
from benchmarks.paper.complexity.worker import CURVES, ROWS
from commands.errors import UserError

TITLES = {"pytorch": "PyTorch", "jax": "JAX"}
GOAL = 0.15  # a slope is as the paper says within so much
SOON = 2e-3  # seconds

HEAD = f"""# What A and B cost: the paper's orders, measured

Written by `python -m benchmarks.paper complexity` from [the kept results](../results/complexity.jsonl), with what
is missing of them measured first. Claim: K-FAC-expand forms A in O(N R P²), K-FAC-reduce in O(N P (P + R)), B
alike (arXiv 2311.00636, section 3).

One layer with a bias, float32, one thread, through the library's own statistics step; N examples, R positions, P
features of the factor (channels times kernel, and the bias), k the kernel's extent. Seconds are of the processor,
medians of at least three rounds in which all curves take turns. *Part* is expand from as few whole examples as have
{ROWS:,} rows, but two (`statistics_rows`). The *bare product* is XᵀX of N R random rows of the factor's width: what
expand cannot go below. Theory counts multiply-adds by the orders above on the same sizes.
"""
SLOPES = f"""## Slopes

Exponents of CPU time in what grows, by least squares in log-log scale, over the three largest sizes; in brackets
over all sizes, the smallest of which take little more than starting their operations does. **Bold**: within {GOAL}
of theory.
"""
SLOPES_READING = f"""
Of all slopes of A and B, those within {GOAL} of theory, and of the others two plain reasons why not: the bare
product itself is not as theory says (small matrices run at a fraction of the speed of large ones), or even the
largest layer takes less than {1e3 * SOON:.0f} ms (starting the operations is what is seen):
"""
CROSSING = """## Where reduce is the faster

Seconds of A and B together by reduce, over those by expand; below 1 reduce is the faster. In brackets the whole
statistics step (forward pass, weight's gradient, A, B, and what watching costs) over that without statistics:
expand, reduce.
"""
MEMORY = """## Memory

Most bytes that forming A and B takes beyond what was there, in MB, at the largest R of each kind of layer, and
their slopes in R over the three largest sizes. PyTorch: of its allocator, where A and B follow each other. JAX:
temporary and returned arrays of one program for both, by XLA's `memory_analysis()`.
"""
MODEL = f"""## A cost model with two constants

`algoperf_kfac/crossover.py`: products run at so many flops a second, and what has to be gone through entry by entry
(sums over positions, patches of convolutions) at so many bytes a second. The constants are fitted to linear layers
of which expand takes {1e3 * model.FITTED:.0f} ms at least, and to nothing else. Patches count as six passes and
reordering as four, numbers read off 2-d convolutions in PyTorch, which are so not quite unseen. *Error* is that of
the seconds that reduce saves, relative to those measured, where they are
{1e3 * model.LEAST:.0f} ms at least; *right* counts all layers of which the model names the faster approximation.
A *third* constant, how fast patches are laid out, is taken from one 2-d convolution (16 x 16, 32 channels, k = 3).
`python -m submissions plan` says for any model which is faster once a device is calibrated, by the two constants
that a calibration measures.
"""
READING = """## What the kept results say

- Reduce is the faster in every layer with R = 64 or more, in both frameworks. At R = 1 nothing is summed and both
  do the same work; they cross below R = 4 in JAX, and in PyTorch between 1 and 16, the latest on graphs.
- Expand follows the bare product, of linear layers and graphs in both frameworks, of convolutions in PyTorch; B of
  convolutions, whose products are small, does not follow its order. In JAX A of convolutions takes more and grows
  faster: patches are laid out by a convolution with an identity kernel, and rows copied to put the bias's ones
  beside them. The memory table shows both.
- Reduce has its order where there is enough to do: in narrow layers, which it sums (slopes in R), and in layers
  that share nothing, which it multiplies (slopes in P). Elsewhere at these sizes starting its operations is longer.
- Expand from a part of the rows goes with N and R only until it has its rows, or two examples.
- A statistics step of PyTorch takes a millisecond or more beyond A and B for watching operations; on small layers
  that is most of it.
- Memory: in PyTorch reduce sums graphs through a copy of all nodes, and holds more than expand there.
- The cost model names the faster approximation nearly always, but where both are alike. Its goal of 25 % is missed
  in both frameworks: in PyTorch on 1-d convolutions, whose patches cost less, and depthwise ones, whose products
  are too small; in JAX on whatever copies. The third constant helps in JAX.
"""


def page(sweeps: Sequence[Sweep], results: Results) -> str:
    """The whole page; what no result is kept of is a dash."""
    frameworks = [f for f in FRAMEWORKS if any(key_of(f, layer) in results for layer in layers_of(tuple(sweeps)))]
    if not frameworks:
        raise UserError("nothing is measured yet: run python -m benchmarks.paper complexity")
    parts = [HEAD, _origin(results), "![Seconds of A against positions](../figures/complexity.png)", SLOPES]
    for framework in frameworks:
        for part in ("A", "B"):
            parts += [f"{TITLES[framework]}, {part}:", _table(list(_slopes(sweeps, framework, results, part)))]
    parts += [SLOPES_READING, _count(sweeps, frameworks, results), CROSSING]
    for framework in frameworks:
        parts += [f"{TITLES[framework]}:", _table(list(_crossing(sweeps, framework, results)))]
    parts += [MEMORY, _table(list(_memory(sweeps, frameworks, results))), MODEL]
    for framework in frameworks:
        parts.append(_model(sweeps, framework, results))
    parts.append(READING)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _origin(results: Results) -> str:
    devices = sorted({result["device"] for result in results.values()})
    versions = sorted({result["version"] for result in results.values()})
    took = sum(result["took"] for result in results.values())
    return (
        f"Measured with version {', '.join(versions)} on {'; '.join(devices)}, in {took:.0f} s of CPU time, while "
        "other programs were running."
    )


def _slopes(sweeps: Sequence[Sweep], framework: str, results: Results, part: str) -> Iterator[list[str]]:
    yield ["layer", "axis", "from", "to", "bare product"] + [
        f"{curve}, {what}" for curve in CURVES for what in ("theory", "measured")
    ]
    for sweep in sweeps:
        sizes = list(sweep.layers)
        cells = [sweep.name, sweep.axis, str(sizes[0]), str(sizes[-1])]
        cells.append(_both(slopes.measured(sweep, framework, results, "seconds", "product", part)))
        for curve in CURVES:
            expected, found = _pair(sweep, framework, results, curve, part)
            cells += [
                _number(expected),
                "-" if found is None else _both(_seconds(sweep, framework, results, curve, part)),
            ]
            if expected is not None and found is not None and abs(found - expected) <= GOAL:
                cells[-1] = f"**{cells[-1]}**"
        yield cells


def _seconds(sweep: Sweep, framework: str, results: Results, curve: str, part: str) -> dict[float, float]:
    return slopes.measured(sweep, framework, results, "seconds", curve, part)


def _pair(
    sweep: Sweep, framework: str, results: Results, curve: str, part: str
) -> tuple[float | None, float | None]:
    """The slope by theory, and the one measured, over the largest of the sizes that were measured."""
    found = slopes.tail(_seconds(sweep, framework, results, curve, part))
    if len(found) < 2:
        return None, None
    expected = slopes.theory(sweep, curve, part, ROWS)
    return slopes.slope({size: expected[int(size)] for size in found}), slopes.slope(found)


def _count(sweeps: Sequence[Sweep], frameworks: Sequence[str], results: Results) -> str:
    rows = [["", "slopes", "as theory says", "bare product is not", "others: too short", "neither"]]
    for framework in frameworks:
        for curve in CURVES:
            found = [_verdict(sweep, framework, results, curve, part) for sweep in sweeps for part in ("A", "B")]
            known = [verdict for verdict in found if verdict]
            counts = [known.count(verdict) for verdict in ("theory", "product", "short", "open")]
            rows.append([f"{TITLES[framework]}, {curve}", str(len(known)), *map(str, counts)])
    return _table(rows)


def _verdict(sweep: Sweep, framework: str, results: Results, curve: str, part: str) -> str:
    """ "theory" where the slope is as that says, else why not: "product", "short" or "open"; empty if unknown."""
    expected, found = _pair(sweep, framework, results, curve, part)
    if expected is None or found is None:
        return ""
    if abs(found - expected) <= GOAL:
        return "theory"
    product = slopes.tail(slopes.measured(sweep, framework, results, "seconds", "product", part))
    by_order = slopes.theory(sweep, "expand", part, ROWS)
    own, order = slopes.slope(product), slopes.slope({size: by_order[int(size)] for size in product})
    if curve != "reduce" and own is not None and order is not None and abs(own - order) > GOAL:
        return "product"
    seconds = _seconds(sweep, framework, results, curve, part)
    return "short" if seconds[max(seconds)] < SOON else "open"


def _crossing(sweeps: Sequence[Sweep], framework: str, results: Results) -> Iterator[list[str]]:
    along = [sweep for sweep in sweeps if sweep.axis == "R"]
    sizes = sorted({size for sweep in along for size in sweep.layers})
    yield ["layer", *(f"R = {size:,}" for size in sizes)]
    for sweep in along:
        ratios: dict[float, str] = {}
        for size, layer in sweep.layers.items():
            result = results.get(key_of(framework, layer))
            if result is not None:
                seconds = result["seconds"]
                plain = seconds["plain"]["step"]
                ratio = seconds["reduce"]["both"] / seconds["expand"]["both"]
                steps = ", ".join(f"{seconds[curve]['step'] / plain:.1f}" for curve in ("expand", "reduce"))
                ratios[size] = f"{ratio:.2f} ({steps})"
        yield [sweep.name, *(ratios.get(size, "") for size in sizes)]


def _memory(sweeps: Sequence[Sweep], frameworks: Sequence[str], results: Results) -> Iterator[list[str]]:
    yield ["layer", "framework", "R", *CURVES, "plain step", *(f"slope, {curve}" for curve in CURVES)]
    for sweep in sweeps:
        for framework in frameworks if sweep.axis == "R" else ():
            series = {curve: slopes.measured(sweep, framework, results, "bytes", curve, "both") for curve in CURVES}
            size = max(series["expand"], default=None)
            if size is None:
                continue
            plain = slopes.measured(sweep, framework, results, "bytes", "plain", "step")[size]
            sized = [f"{found[size] / 1e6:.1f}" if size in found else "-" for found in series.values()]
            slope = [_number(slopes.slope(slopes.tail(found))) for found in series.values()]
            yield [sweep.name, TITLES[framework], f"{size:,}", *sized, f"{plain / 1e6:.1f}", *slope]


def _model(sweeps: Sequence[Sweep], framework: str, results: Results) -> str:
    layers = layers_of(tuple(sweeps))
    try:
        rates = model.fit(framework, results, layers)
    except UserError:
        return f"{TITLES[framework]}: too few linear layers are measured."
    third = model.with_patches(framework, results, rates)
    fitted = [layer for layer in layers if layer.kind == model.FITTED_KIND]
    unseen = model.unseen(sweeps)
    every = [layer for found in unseen.values() for layer in found]
    rows = [["layers", "measured", "right", "with an error", "within 25 %", "median", "worst"]]
    rows[0] += ["with the third: within 25 %", "median", "worst"]
    for name, group in {"linear (fitted)": fitted, **unseen, "**all that it was not fitted to**": every}.items():
        found = model.errors(framework, results, group, rates)
        cells = [name, str(found.layers), str(found.right), str(len(found.large)), *_cells(found)]
        better = None if third is None else model.errors(framework, results, group, third)
        rows.append(cells + (["-"] * 3 if better is None else _cells(better)))
    return f"{TITLES[framework]}: {_rates(third or rates)}.\n\n{_table(rows)}"


def _rates(rates: Rates) -> str:
    text = (
        f"products {rates.flops_per_second / 1e9:.0f} Gflop/s, sums over positions "
        f"{rates.bytes_per_second / 1e9:.1f} GB/s"
    )
    if rates.patch_bytes_per_second is None:
        return text
    passes = rates.bytes_per_second / rates.patch_bytes_per_second
    return f"{text}, third constant {rates.patch_bytes_per_second / 1e9:.2f} GB/s of patches ({passes:.0f} passes)"


def _cells(found: model.Errors) -> list[str]:
    """Number within a quarter, median and worst error."""
    median = "-" if found.median is None else f"{found.median:.0%}"
    worst = "-" if found.worst is None else f"{found.worst:+.0%}"
    return [str(found.within), median, worst]


def _both(values: dict[float, float]) -> str:
    """The slope over the largest sizes, and in brackets over all."""
    largest, every = slopes.slope(slopes.tail(values)), slopes.slope(values)
    return "-" if largest is None else f"{_number(largest)} ({_number(every)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])
