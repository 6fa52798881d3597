"""`python -m submissions plan`: coverage, memory and flops of a K-FAC submission on a workload or a model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags

from algoperf_kfac.cost import Plan
from commands.errors import UserError
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry
from submissions.cli import plan_tables
from submissions.common.batch_sizes import SCORED, get_batch_size
from workloads.algoperf import WORKLOADS
from workloads.registry import WORKLOADS as EMBEDDED

PROGRAM = "python -m submissions plan"
EPILOG = """Examples:
  python -m submissions plan --workload=imagenet_vit --framework=pytorch
  python -m submissions plan --model=my_package.models:small --batch_size=64 --devices=1

AlgoPerf's workloads need AlgoPerf installed, the others do not. The model is run on PyTorch's meta device (JAX:
traced), with the shapes of the real batch and without data; where its code needs values, on a small real batch.

--model names a function without arguments. PyTorch: it returns the model and its inputs, a tensor, a tuple of
positional or a dict of keyword arguments. JAX: it returns the function to apply, the parameters, and a tuple of
further arguments.
"""


def _flags() -> flags.FlagValues:
    values = new()

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("workload", None, f"One of AlgoPerf's workloads ({', '.join(SCORED)}, ...) or {', '.join(EMBEDDED)}.")
    string("model", None, "Instead of a workload: package.module:function, see above.")
    string("framework", "pytorch", "pytorch or jax; with --all also both, separated by a comma.")
    string("submission", "kfac_reduce", "The submission whose layers and settings to plan for.")
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Global batch size. Default: the submission's; with --model that of the example inputs times the devices.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer("devices", 8, "Data-parallel devices; 8 in AlgoPerf.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("format", "text", ["text", "markdown"], "How to print.", flag_values=values)
    flags.DEFINE_bool("all", default=False, help="All eight of AlgoPerf's workloads.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Prints the plan.

    Raises:
        UserError: a flag does not fit, or something needed is not installed.
    """
    values = _flags()
    parse(argv, values, PROGRAM, epilog=EPILOG)
    if sum((bool(values.workload), bool(values.model), values.all)) != 1:
        raise UserError(f"give one of --workload, --model and --all. See {PROGRAM} --help.")
    frameworks = values.framework.split(",")
    for framework in frameworks:
        if framework not in FRAMEWORKS:
            raise UserError(f"unknown framework '{framework}'; known: {', '.join(FRAMEWORKS)}")
    if not values.all:
        if len(frameworks) > 1:
            raise UserError("several frameworks go with --all only")
        name = values.workload or values.model
        plan, note, batch_size = plan_for(values, name, frameworks[0])
        print(plan_tables.render(plan, name, batch_size, note, values.format), end="")
        return
    plans: dict[str, list[plan_tables.Named]] = {}
    for framework in frameworks:
        for name in SCORED:
            print(f"{framework}: {name} ...", file=sys.stderr, flush=True)
            plans.setdefault(FRAMEWORKS[framework], []).append((name, *plan_for(values, name, framework)))
    print(plan_tables.render_all(plans, _command(values), values.format), end="")


def plan_for(values: flags.FlagValues, name: str, framework: str) -> tuple[Plan, str, int]:
    """The plan for a workload or model, how it was seen, and the global batch size."""
    devices = values.devices
    batch_size = _batch_size(name, values)
    adapter, subject = _subject(values, name, framework, None if batch_size is None else batch_size // devices)
    seen = adapter.sight(subject, registry.kfac_config(values.submission, framework))
    return adapter.plan_of(seen, devices=devices), seen.note, batch_size or subject.batch_size * devices


def _batch_size(name: str, values: flags.FlagValues) -> int | None:
    """The global batch size; None for that of a model's example inputs."""
    size = values.batch_size
    if size is None and values.model:
        return None
    if size is None:
        size = _own_batch_size(name)
    if size % values.devices:
        raise UserError(f"the batch size {size} does not divide by {values.devices} devices; change --devices")
    return size


def _own_batch_size(name: str) -> int:
    """The submissions' for a workload; a variant without one has its base's, as in AlgoPerf's runner."""
    try:
        return get_batch_size(name)
    except ValueError as error:
        base = next((base for base in WORKLOADS if name.startswith(f"{base}_")), None)
        if base is None:
            raise UserError(f"{error}; or give --batch_size") from None
        return get_batch_size(base)


def _subject(values: flags.FlagValues, name: str, framework: str, batch_size: int | None) -> tuple[ModuleType, Any]:
    """The framework's adapter, and the model for it to see."""
    try:
        subjects = importlib.import_module(f"submissions.cli.{framework}_subjects")
        adapter = importlib.import_module(f"submissions.cli.{framework}_probe")
    except ModuleNotFoundError as error:
        raise UserError(
            f"--framework={framework} needs the module '{error.name}', which is not installed"
        ) from None
    if values.model:
        return adapter, subjects.custom(name, batch_size)
    assert batch_size is not None
    return adapter, (subjects.embedded if name in EMBEDDED else subjects.official)(name, batch_size)


def _command(values: flags.FlagValues) -> str:
    """The command line that gives the same output."""
    changed = [
        f"--{name}={values[name].value}"
        for name in ("framework", "submission", "devices")
        if values[name].value != values[name].default
    ]
    return " ".join([PROGRAM, "--all", "--format=markdown", *changed])
