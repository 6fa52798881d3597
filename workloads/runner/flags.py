"""The flags of `python -m workloads.run`, named as in AlgoPerf's runner."""

from __future__ import annotations

from absl import flags

from commands.flags import new
from commands.frameworks import FRAMEWORKS
from workloads.registry import WORKLOADS

CLOCKS = ("wall", "cpu")


def define_clock(values: flags.FlagValues) -> None:
    """The flag that says what the times of a trial are."""
    flags.DEFINE_enum(
        "clock",
        CLOCKS[0],
        CLOCKS,
        "What times are: seconds on the wall, or this process's own CPU seconds, which other work on the machine "
        "hardly changes; where all is computed by one process on the CPU.",
        flag_values=values,
    )


def define() -> flags.FlagValues:
    """The flags with their defaults."""
    values = new()
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
    flags.DEFINE_bool("overwrite", default=False, help="Remove what an earlier run left there.", flag_values=values)
    flags.DEFINE_bool(
        "resume_last_run",
        default=False,
        help="Go on where an earlier run was interrupted; finished trials are kept.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "save_checkpoints", default=True, help="Save a checkpoint at each evaluation.", flag_values=values
    )
    flags.DEFINE_bool(
        "save_intermediate_checkpoints",
        default=False,
        help="Keep all checkpoints, not only the last two.",
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
        "torch_compile",
        default=False,
        help="Compile the model with torch.compile (PyTorch only).",
        flag_values=values,
    )
    define_clock(values)
    flags.DEFINE_bool(
        "stop_at_target",
        default=True,
        help="End a trial once the validation target is reached. False: train up to the step limit.",
        flag_values=values,
    )
    return values
