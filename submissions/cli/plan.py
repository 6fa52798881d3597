"""`python -m submissions plan`: coverage, memory and flops of a K-FAC submission on a workload or a model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from algoperf_kfac.plan import Plan, make_plan
from submissions.cli import plan_tables
from submissions.cli.probe import Probe
from submissions.training_step.batch_sizes import get_batch_size
from workloads.errors import UserError
from workloads.registry import WORKLOADS as EMBEDDED
from workloads.runner.flags import parse

FRAMEWORKS = {"pytorch": "PyTorch", "jax": "JAX"}
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
OFFICIAL = (
    "criteo1tb",
    "fastmri",
    "imagenet_resnet",
    "imagenet_vit",
    "librispeech_conformer",
    "librispeech_deepspeech",
    "ogbg",
    "wmt",
)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    string("workload", None, f"One of AlgoPerf's workloads ({', '.join(OFFICIAL)}, ...) or {', '.join(EMBEDDED)}.")
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
    flags.DEFINE_bool("all", False, "All eight of AlgoPerf's workloads.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Prints the plan.

    Raises:
        UserError: a flag does not fit, or something needed is not installed.
    """
    values = _flags()
    if "--help" in argv or "-h" in argv:
        print(f"usage: {PROGRAM} --flag=value ...\n\n{EPILOG}\nFlags:\n{values.get_help()}")
        return
    parse(argv, values, PROGRAM, ())
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
        for name in OFFICIAL:
            print(f"{framework}: {name} ...", file=sys.stderr, flush=True)
            plans.setdefault(FRAMEWORKS[framework], []).append((name, *plan_for(values, name, framework)))
    print(plan_tables.render_all(plans, _command(values), values.format), end="")


def plan_for(values: Any, name: str, framework: str) -> tuple[Plan, str, int]:
    """The plan for a workload or model, how it was seen, and the global batch size."""
    devices = values.devices
    batch_size = _batch_size(name, values)
    seen, examples = _probe(values, name, framework, None if batch_size is None else batch_size // devices)
    plan = make_plan(
        seen.coverage,
        seen.loads,
        seen.config,
        devices=devices,
        activation_bytes=seen.activation_bytes,
        capture_bytes=seen.capture_bytes,
        gradient_copies=2 if framework == "pytorch" and devices > 1 else 1,
    )
    return plan, seen.note, batch_size or examples * devices


def _batch_size(name: str, values: Any) -> int | None:
    """The global batch size; None for that of a model's example inputs."""
    size = values.batch_size
    if size is None and values.model:
        return None
    if size is None:
        known = next((base for base in OFFICIAL if name.startswith(base)), name)
        try:
            size = get_batch_size(known)
        except ValueError as error:
            raise UserError(f"{error}; or give --batch_size") from None
    if size % values.devices:
        raise UserError(f"the batch size {size} does not divide by {values.devices} devices; change --devices")
    return size


def _probe(values: Any, name: str, framework: str, batch_size: int | None) -> tuple[Probe, int]:
    """See the model, with the framework's adapter; also the examples on a device."""
    try:
        subjects = importlib.import_module(f"submissions.cli.{framework}_subjects")
        adapter = importlib.import_module(f"submissions.cli.{framework}_probe")
    except ModuleNotFoundError as error:
        raise UserError(
            f"--framework={framework} needs the module '{error.name}', which is not installed"
        ) from None
    if values.model:
        subject = subjects.custom(name, batch_size)
        batch_size = subject.batch_size
    else:
        subject = (subjects.embedded if name in EMBEDDED else subjects.official)(name, batch_size)
    assert batch_size is not None
    return adapter.probe(subject, values.submission), batch_size


def _command(values: Any) -> str:
    """The command line that gives the same output."""
    changed = [
        f"--{name}={values[name].value}"
        for name in ("framework", "submission", "devices")
        if values[name].value != values[name].default
    ]
    return " ".join([PROGRAM, "--all", "--format=markdown", *changed])
