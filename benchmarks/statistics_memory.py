"""Memory of a JAX step with statistics beside that of the gradient alone, by XLA's own figures, and by the plan.

    python -m benchmarks.statistics_memory --workloads=bible_lm,mnist_vit
    python -m benchmarks.statistics_memory --workloads=wmt,imagenet_vit,finewebedu_lm --devices=4

Programs are compiled and not run, for the CPU, where `memory_analysis()` gives the size of their temporaries. The
loss is a cross-entropy of the outputs, whatever the workload's own is. Workloads are
this repository's or, where AlgoPerf is installed, its own, with the batch of one of so many devices. "Growth" is
what the temporaries grow by with statistics, and "plan" what the plan expects of it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.jax.capture import value_grad_and_statistics
from algoperf_kfac.jax.discovery import discover
from algoperf_kfac.jax.probe import Subject, plan_of, sight
from commands import errors
from commands.arguments import Parser
from commands.atomic import write_text
from commands.errors import UserError, tell
from submissions import registry as submissions
from submissions.cli import jax_subjects
from submissions.common.api import Tree
from submissions.common.batch_sizes import SCORED
from workloads import registry

HEAD = [
    "workload",
    "examples",
    "submission",
    "gradient MiB",
    "with statistics MiB",
    "growth",
    "growth MiB",
    "plan MiB",
]
# LLVM's passes take most of the time, and come behind everything that decides about memory.
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MIB = 2**20


def main() -> int:
    """Runs with the command line's arguments; returns the exit code."""
    parser = Parser("python -m benchmarks.statistics_memory", __doc__)
    parser.add_argument("--workloads", default="bible_lm,mnist_vit", help="comma-separated names")
    parser.add_argument("--submissions", default="kfac_expand,kfac_reduce", help="comma-separated names")
    parser.add_argument("--devices", type=int, default=1, help="that share a batch")
    parser.add_argument("--batch_size", type=int, help="of all devices; default: the workload's")
    parser.add_argument("--out", help="a file for the table, too")
    return errors.run(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    tell("\n".join(lines))
    for name in args.workloads.split(","):
        subject = subject_of(name, args.batch_size, args.devices)
        gradient = temporaries(jax.value_and_grad(_loss_of(subject)), subject)
        for submission in args.submissions.split(","):
            config = config_of(submission)
            with_statistics = temporaries(_statistics_step(subject, config), subject)
            plan = plan_of(sight(subject, config)).memory
            growth = with_statistics - gradient
            numbers = [gradient / MIB, with_statistics / MIB, growth / MIB, plan.capture / MIB]
            cells = [f"{number:,.0f}" for number in numbers]
            cells.insert(2, f"{growth / gradient:+.1%}")
            lines.append(f"| {' | '.join([name, str(subject.batch_size), submission, *cells])} |")
            tell(lines[-1])
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")


def subject_of(name: str, batch_size: int | None, devices: int) -> Subject:
    """A workload with the batch of one of the devices.

    Raises:
        UserError: there is none of this name, or its batch cannot be divided.
    """
    own = name in registry.WORKLOADS
    if batch_size is None:
        batch_size = registry.load(name, "jax").batch_size if own else SCORED.get(name)
    if batch_size is None:
        raise UserError(f"workload '{name}' has no batch size of its own: give --batch_size")
    if batch_size % devices:
        raise UserError(f"a batch of {batch_size} cannot be divided over {devices} devices")
    return (jax_subjects.embedded if own else jax_subjects.official)(name, batch_size // devices)


def config_of(submission: str) -> KFACConfig:
    """The point that a submission trains with by itself."""
    defaults = submissions.describe(submission, "jax").defaults
    fields = {name: value for name, value in defaults.items() if name in KFACConfig.__dataclass_fields__}
    return KFACConfig.updated(None, fields)


def temporaries(function: Tree, subject: Subject) -> int:
    """Bytes that the compiled function holds beside its arguments and results."""
    compiled = jax.jit(function).lower(subject.params, *subject.args).compile(QUICKLY)
    memory: Tree = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def _loss(outputs: Tree, *_: Tree) -> jax.Array:
    """Cross-entropy of the likeliest classes; XLA would fold labels that are constants, which takes minutes."""
    floats = [o for o in jax.tree.leaves(outputs) if jnp.issubdtype(o.dtype, jnp.floating) and o.ndim]
    losses = [optax.softmax_cross_entropy_with_integer_labels(o, o.argmax(-1)).mean() for o in floats]
    return jnp.stack(losses).sum()


def _loss_of(subject: Subject) -> Tree:
    return lambda params, *args: _loss(subject.apply(params, *args))


def _statistics_step(subject: Subject, config: KFACConfig) -> Tree:
    layers = discover(subject.apply, subject.params, *subject.args, config=config)
    step = value_grad_and_statistics(subject.apply, _loss, layers, config)
    return lambda *given: step(*given, positions="gradient")


if __name__ == "__main__":
    sys.exit(main())
