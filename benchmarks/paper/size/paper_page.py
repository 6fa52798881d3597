"""Of the page: published models on paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.paper.size.costs import BUDGET, FORMS, TOKENS, Sized
from submissions.registry import describe

EXPAND, REDUCE = (describe(name, "pytorch").defaults for name in ("kfac_expand", "kfac_reduce"))

HEAD = f"""\
**A calculation; nothing of it was measured.** It is the library's `plan` of models of these shapes on PyTorch's
meta device, and an A100 of assumed speed (`submissions/cli/assumed.py`). Layers, widths, heads, contexts and
batches are those of GPT-2 (Radford et al. 2019, table 2 and section 2.3; heads as released) and GPT-3 (Brown et
al. 2020, arXiv 2005.14165, table 2.1; 13B with a width of 5,120, not the printed 5,140). One block is planned
and repeated, which gives the plan of the whole (asserted on GPT-2 124M).

So many GPUs that each has {TOKENS:,} tokens of a step, data parallel: each has the whole model and all factors,
forms statistics of its own tokens, and refreshes and directions of its share of the layers, as the library does
in PyTorch. A GPU of 40 GB does not hold the larger of these models, with NadamW neither. Everything
is float32; the output layer is the table of symbols. Not counted are what GPUs send each other, and attention's
products in the model's flops: with a context of R and a width of d they are R / (6 d) of what is counted of a
block, 22 % at 124M and 3 % at 175B, so that shares are upper bounds.

Points are those of the submissions: directions by polar factors of three Newton-Schulz steps, factors in blocks
of at most 4,096 (a bias makes 4,097 of 4,096 inputs). *expand* takes all rows of a batch, *part* at least 1,024
on each GPU and no fewer than a layer's largest block has sides, as it is shipped, *reduce* all sequences, of
which there are fewer. Statistics come every {EXPAND["factor_interval"]} steps
with *expand* and *part*, every {REDUCE["factor_interval"]} with *reduce*. The first ten steps, which all take
statistics and refresh, are not counted.
"""
FLOPS = """\
Flops in percent of the model's step, on a GPU: of one statistics step, of a refresh of all layers (on the GPU
with the most work), of the directions of all layers, of the polar factors in them, and of the directions
on the GPU with the most of them (every step).
"""
SECONDS = f"""\
Seconds on a GPU: of the model's step, of one statistics step, of a refresh of all layers, of a step's
directions (the last two on the GPU with the most work); and the interval in steps at which refreshes take no
more than {100 * BUDGET:.0f} % of the time (a multiple of the shipped one,
{EXPAND["refresh_interval"]} with *expand* and *part*, {REDUCE["refresh_interval"]} with *reduce*).
"""
STEPS = """\
A step at that interval, in seconds of the model's own; as the library is, and with all directions formed on
every GPU (`share_directions=False`).
"""
READING = """\
- **What reduce saves falls with size.** A statistics step of expand from all rows takes 81 % of the model's
  flops at 124M and 15 % at 175B, where blocks keep its products narrow; from the shipped rows a fifth to a half;
  reduce's at most 0.12 % (in seconds up to 9 %, as it reads what it sums). Beside expand from a part of the
  rows little is left to save: a step takes the same within 0.04 of the model's.
- **Directions grow, for both alike**: from 21 to 218 % of the model's flops, about as the width over the tokens
  of a GPU, most of it the polar factors. Formed on every GPU they make a step 1.4 of the model's at 124M and 3.2
  at 175B, with any statistics, and half the tokens on a GPU would make them twice as much. That is why they are
  dealt to the GPUs, as refreshes are: a step is then 1.02 to 1.16 of the model's with part and reduce, and what
  is sent for it is not counted. At the small end the table of symbols, which is one layer, keeps a GPU busy.
- **Refreshes do not**: 72 steps apart they are within a tenth of the time at 124M, at the shipped interval of
  expand from 2.7B on, at that of reduce from 6.7B: more GPUs share them, and blocks keep decompositions at 4,096
  rows while the model's step grows.
- **Memory per parameter falls** from 4.8 numbers in factors and bases to 0.9, for the same reason: from 6.7B on
  every block's layers are cut, at 175B into up to 13 blocks. How many steps that costs is not known here; nor
  what 1,024 to 4,096 rows, or reduce's 488 to 1,562, are worth for factors of as many rows. Nothing of this says
  that either trains such a model in fewer steps.
"""


def lines(sizes: Sequence[Sized]) -> Iterator[str]:
    yield "## Published models, on paper"
    yield ""
    yield HEAD
    yield from table(
        "model | parameters | GPUs | sequences a step | covered layers | of them with a factor in blocks | "
        "largest factor | NadamW's moments, GB | factors, GB | bases, GB | factors and bases, per parameter",
        (
            [
                *(one.shape.name, f"{one.parameters:,}", f"{one.gpus}", f"{one.sequences:,}", f"{one.layers}"),
                *(f"{one.split}", _blocks(one.blocks), *map(_gigabytes, (one.moments, one.factors, one.bases))),
                f"{2 * (one.factors + one.bases) / one.moments:.2f}",
            ]
            for one in sizes
        ),
    )
    yield FLOPS
    yield from table(
        f"model | its step, Tflop | {_each('statistics')} | refresh | directions | polar factors in them | dealt",
        (
            [
                *(one.shape.name, f"{one.model / 1e12:,.4g}"),
                *(_percent(one.costs[form].statistics) for form in FORMS),
                *map(_percent, (any_form.refresh, any_form.directions, any_form.polar, any_form.dealt)),
            ]
            for one in sizes
            for any_form in [one.costs["expand"]]
        ),
    )
    yield SECONDS
    yield from table(
        f"model | its step | {_each('statistics')} | refresh | directions | {_each('interval')}",
        (
            [
                *(one.shape.name, f"{any_form.seconds[0]:.3g}"),
                *(f"{one.costs[form].seconds[1]:.2g}" for form in FORMS),
                *(f"{any_form.seconds[2]:.3g}", f"{any_form.seconds[3]:.3g}"),
                *(f"{one.costs[form].interval}" for form in FORMS),
            ]
            for one in sizes
            for any_form in [one.costs["expand"]]
        ),
    )
    yield STEPS
    yield from table(
        f"model | {_each('as it is')} | {_each('alone')}",
        (
            [
                one.shape.name,
                *(f"{one.costs[form].step:.2f}" for form in FORMS),
                *(f"{one.costs[form].step_alone:.2f}" for form in FORMS),
            ]
            for one in sizes
        ),
    )
    yield READING


def _each(what: str) -> str:
    return " | ".join(f"{what}, {form}" for form in FORMS)


def table(head: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|---" * (1 + head.count(" | ")) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _blocks(blocks: tuple[int, ...]) -> str:
    return f"{blocks[0]:,}" if len(blocks) == 1 else f"{len(blocks)} of {blocks[0]:,}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
