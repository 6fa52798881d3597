"""`python -m submissions plan`: coverage, memory and flops of a K-FAC submission on a workload or a model."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags

from algoperf_kfac.config import DECOMPOSITIONS, KFACConfig
from algoperf_kfac.cost import DEVICE_BYTES, DEVICES
from algoperf_kfac.seconds import Speed
from commands.errors import UserError
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry
from submissions.cli import assumed, calibration, plan_tables
from submissions.cli.named_plan import Named, Room
from submissions.common.batch_sizes import SCORED, get_batch_size
from workloads import algoperf
from workloads.algoperf import BUDGETS, WORKLOADS
from workloads.registry import WORKLOADS as EMBEDDED

PROGRAM = "python -m submissions plan"
EPILOG = """Examples:
  python -m submissions plan --workload=imagenet_vit --framework=pytorch
  python -m submissions plan --model=my_package.models:small --batch_size=64 --devices=1
  python -m submissions plan --calibrate --framework=pytorch,jax

AlgoPerf's workloads need AlgoPerf installed, the others do not. The model is run on PyTorch's meta device (JAX:
traced), with the shapes of the real batch and without data; where its code needs values, on a small real batch.

--model names a function without arguments. PyTorch: it returns the model and its inputs, a tensor, a tuple of
positional or a dict of keyword arguments. JAX: it returns the function to apply, the parameters, and a tuple of
further arguments.

--calibrate measures this machine's device, for half a minute or two, and keeps the result in the user's cache; from
then on plans say seconds, too. With a workload or a model it goes on to its plan. --assume takes a device's speed
from published figures instead (submissions/cli/assumed.py), where the device is not at hand.

With seconds, plans say what refresh_budget, the share of the time that refreshes may take, makes of their interval.
"""
# Of a device's memory: what AlgoPerf's runner leaves JAX on the largest model.
USABLE = {"pytorch": 1.0, "jax": 0.8}


def new_flags() -> flags.FlagValues:
    """The command's flags, not parsed yet."""
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
    flags.DEFINE_integer(
        "devices", DEVICES, f"Data-parallel devices; {DEVICES} in AlgoPerf 1.0.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "device_gb", DEVICE_BYTES / 1e9, "Memory of a device in 10^9 bytes.", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_float(
        "usable",
        None,
        "Share of it that the framework may use. Default: 1 for PyTorch, 0.8 for JAX, as in AlgoPerf's runner.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "calibrate", default=False, help="Measure this machine's speed first; see above.", flag_values=values
    )
    flags.DEFINE_enum(
        "assume", None, sorted(assumed.DEVICES), "A device of an assumed speed; see above.", flag_values=values
    )
    flags.DEFINE_float(
        "refresh_budget",
        None,
        "Share of the time that refreshes may take. Default: the submission's in self-tuning.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "decomposition",
        None,
        list(DECOMPOSITIONS),
        "How bases are refreshed. Default: as in the submission.",
        flag_values=values,
    )
    flags.DEFINE_bool("seconds", default=True, help="Say seconds, where they are known.", flag_values=values)
    flags.DEFINE_enum("format", "text", ["text", "markdown"], "How to print.", flag_values=values)
    flags.DEFINE_bool("all", default=False, help=f"All of AlgoPerf's {len(SCORED)} workloads.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Prints the plan.

    Raises:
        UserError: a flag does not fit, or something needed is not installed.
    """
    values = new_flags()
    parse(argv, values, PROGRAM, epilog=EPILOG)
    asked = sum((bool(values.workload), bool(values.model), values.all))
    if asked != 1 and not (values.calibrate and not asked):
        raise UserError(f"give one of --workload, --model and --all, or --calibrate. See {PROGRAM} --help.")
    if values.assume and (values.calibrate or not values.seconds):
        raise UserError("--assume stands in place of a calibration: leave --calibrate and --noseconds out")
    frameworks = values.framework.split(",")
    for framework in frameworks:
        if framework not in FRAMEWORKS:
            raise UserError(f"unknown framework '{framework}'; known: {', '.join(FRAMEWORKS)}")
    if len(frameworks) > 1 and not values.all and asked:
        raise UserError("several frameworks go with --all and --calibrate only")
    if values.calibrate:
        for framework in frameworks:
            _calibrate(framework)
    if not asked:
        return
    if not values.all:
        named = plan_for(values, values.workload or values.model, frameworks[0])
        if values.workload and values.workload not in EMBEDDED and algoperf.is_older():
            print(algoperf.OLDER, file=sys.stderr)
        print(plan_tables.render(named, values.format), end="")
        if values.seconds and named.speed is None:
            print(f"\n{plan_tables.NO_SECONDS}")
        return
    if algoperf.is_older():
        print(algoperf.OLDER, file=sys.stderr)
    plans: dict[str, list[Named]] = {}
    for framework in frameworks:
        for name in (name for name in SCORED if name in algoperf.here()):
            print(f"{framework}: {name} ...", file=sys.stderr, flush=True)
            plans.setdefault(FRAMEWORKS[framework], []).append(plan_for(values, name, framework))
    print(plan_tables.render_all(plans, _command(values), values.format), end="")


def _calibrate(framework: str) -> None:
    """Measures, keeps and shows."""
    print(f"{framework}: measuring ...", file=sys.stderr, flush=True)
    speed = calibration.measure(framework)
    file = calibration.keep(framework, speed)
    print(plan_tables.render_speed(speed))
    print(f"Kept in {file}.\n")


def plan_for(values: flags.FlagValues, name: str, framework: str) -> Named:
    """The plan for a workload or model, and what it is compared with."""
    devices = values.devices
    batch_size = _batch_size(name, values)
    adapter, subject = _subject(values, name, framework, None if batch_size is None else batch_size // devices)
    seen = adapter.sight(subject, _config(values, framework))
    share = USABLE[framework] if values.usable is None else values.usable
    return Named(
        name,
        adapter.plan_of(seen, devices=devices),
        seen.note,
        batch_size or subject.batch_size * devices,
        Room(1e9 * values.device_gb, share),
        _speed(values, framework),
        BUDGETS.get(name),
    )


def _config(values: flags.FlagValues, framework: str) -> KFACConfig:
    config = registry.kfac_config(values.submission, framework)
    given = {name: values[name].value for name in ("refresh_budget", "decomposition")}
    try:
        return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from None


def _speed(values: flags.FlagValues, framework: str) -> Speed | None:
    if not values.seconds:
        return None
    return assumed.DEVICES[values.assume]() if values.assume else calibration.known(framework)


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
        for name in (
            "framework",
            "submission",
            "devices",
            "device_gb",
            "usable",
            "assume",
            "refresh_budget",
            "decomposition",
        )
        if values[name].value != values[name].default
    ] + ([] if values.seconds else ["--noseconds"])
    return " ".join([PROGRAM, "--all", "--format=markdown", *changed])
