"""The flags of `python -m workloads.run`, named as in AlgoPerf's runner."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from workloads.errors import UserError
from workloads.registry import WORKLOADS

FRAMEWORKS = ("pytorch", "jax")


def define() -> flags.FlagValues:
    """The flags with their defaults, in a set of their own, so that several runs fit into one process."""
    values = flags.FlagValues()
    # absl's --help and --flagfile belong to its global set only.
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    flags.DEFINE_string("workload", None, f"The workload: {', '.join(WORKLOADS)}. Required.", flag_values=values)
    flags.DEFINE_string("framework", None, f"The framework: {', '.join(FRAMEWORKS)}. Required.", flag_values=values)
    flags.DEFINE_string("submission_path", None, "The submission's Python file. Required.", flag_values=values)
    flags.DEFINE_string(
        "tuning_ruleset",
        "external",
        "external: the runner draws hyperparameters; self: the submission has its own, and 1.5 times the time.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tuning_search_space",
        None,
        "JSON file: {name: range or feasible points} or a list of points. Needed by the external ruleset.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_tuning_trials", 1, "How many points to train.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "hparam_start_index",
        None,
        "Train from this point on (counted from 0).",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "hparam_end_index", None, "Train up to before this point.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("experiment_dir", None, "The folder of all experiments. Required.", flag_values=values)
    flags.DEFINE_string("experiment_name", None, "The experiment's folder in it. Required.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Remove what an earlier run left there.", flag_values=values)
    flags.DEFINE_bool(
        "resume_last_run",
        False,
        "Go on where an earlier run was interrupted; finished trials are kept.",
        flag_values=values,
    )
    flags.DEFINE_bool("save_checkpoints", True, "Save a checkpoint at each evaluation.", flag_values=values)
    flags.DEFINE_bool(
        "save_intermediate_checkpoints",
        False,
        "Keep all checkpoints, not only the last two.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_global_steps",
        None,
        "Steps after which a trial ends. Default: the workload's step_hint.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "rng_seed", None, "Seed of every trial. Default: a random one, recorded.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Not needed: the data come from packages.", flag_values=values)
    flags.DEFINE_bool(
        "torch_compile", False, "Compile the model with torch.compile (PyTorch only).", flag_values=values
    )
    flags.DEFINE_bool(
        "stop_at_target",
        True,
        "End a trial once the validation target is reached. False: train up to the step limit.",
        flag_values=values,
    )
    return values


def parse(argv: Sequence[str], values: flags.FlagValues, program: str, required: Sequence[str]) -> None:
    """Parses the arguments after the program's name into `values`; with --help prints it and exits.

    Raises:
      UserError: an unknown flag, a malformed value, a missing required flag, or an argument that is no flag.
    """
    try:
        rest = values([program, *argv])[1:]
    except flags.Error as error:
        raise UserError(f"{_one_line(error)} See {program} --help.") from None
    if values.help:
        print(f"usage: {program} --flag=value ...\n{values.get_help()}")
        sys.exit(0)
    if rest:
        raise UserError(f"Unexpected argument '{rest[0]}'; flags are written --name=value. See {program} --help.")
    for name in required:
        if not values[name].value:
            raise UserError(f"The flag --{name} is missing. See {program} --help.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."
