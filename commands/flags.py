"""Flags in sets of their own, so that several runs fit into one process; absl's, as AlgoPerf's runner has them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from commands.errors import UserError, one_line


def new() -> flags.FlagValues:
    """A set that holds --help alone; absl's own --help and --flagfile belong to its global set."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", default=False, help="Show this help.", short_name="h", flag_values=values)
    return values


def parse(
    argv: Sequence[str],
    values: flags.FlagValues,
    program: str,
    required: Sequence[str] = (),
    *,
    synopsis: str = "--flag=value ...",
    epilog: str = "",
) -> None:
    """Parses the arguments after the program's name into `values`; with --help prints it and exits.

    Args:
        argv: the arguments.
        values: the set of flags.
        program: how the command is called.
        required: flags that must be given.
        synopsis: what follows the program in the line of its usage.
        epilog: what the help says before it lists the flags.

    Raises:
        UserError: an unknown flag, a malformed value, a missing required flag, a list that was emptied, or an
            argument that is no flag.
    """
    try:
        rest = values([program, *argv])[1:]
    except flags.Error as error:
        raise UserError(f"{one_line(error).rstrip('.')}. See {program} --help.") from None
    if values["help"].value:
        about = f"\n{epilog}\nFlags:" if epilog else ""
        print(f"usage: {program} {synopsis}\n{about}{values.get_help()}")
        sys.exit(0)
    if rest:
        raise UserError(f"Unexpected argument '{rest[0]}'; flags are written --name=value. See {program} --help.")
    for name in required:
        if not values[name].value:
            raise UserError(f"The flag --{name} is missing. See {program} --help.")
    for name, flag in values.flag_values_dict().items():
        if flag == [] and values[name].default:  # done with nothing, a command would say that all went well
            raise UserError(f"--{name}= names nothing; leave it out for the default. See {program} --help.")
