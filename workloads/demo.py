"""The demo: K-FAC-expand, K-FAC-reduce and NadamW race to a target on real data, in each framework, then a report.

    python -m workloads.demo --output_dir=runs/demo

Run again, it keeps finished runs and only writes the report anew.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from commands import errors
from commands.errors import tell
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry as submissions
from workloads import registry, study
from workloads.runner import experiment
from workloads.runner.jobs import CHECKOUT

SUBMISSIONS = ("nadamw", "kfac_expand", "kfac_reduce")
# No single point of NadamW is good on both workloads: it gets its best one on each, and the better trial counts.
TUNED = CHECKOUT / "tuning_search_spaces" / "nadamw_tuned.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""
    values = new()
    flags.DEFINE_string("output_dir", None, "Where to. Required.", flag_values=values)
    flags.DEFINE_list("framework", list(FRAMEWORKS), "Frameworks.", flag_values=values)
    flags.DEFINE_integer("jobs", 2, "Runs at a time, a core each.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "max_global_steps", None, "Default: each workload's step_hint.", lower_bound=1, flag_values=values
    )

    def command() -> int:
        parse(sys.argv[1:] if argv is None else argv, values, "python -m workloads.demo", ("output_dir",))
        output = Path(values.output_dir).expanduser().resolve()
        return demo(output, values.jobs, values.max_global_steps, values.framework)

    return errors.run(command, interrupted="interrupted; the same command goes on")


def demo(
    output: Path, parallel: int, max_steps: int | None = None, frameworks: Sequence[str] = tuple(FRAMEWORKS)
) -> int:
    """One study of each submission on each workload in each framework, then the report; returns the exit code.

    Raises:
        UserError: a package is missing, a framework unknown, or the folder cannot be written.
    """
    experiment.check_writable(output)
    workloads = list(registry.WORKLOADS)
    jobs = []
    for framework in frameworks:
        for name in workloads:
            registry.load(name, framework)  # missing packages show here, once, and not in every job
        there = submissions.names_in(framework)
        chosen = [name for name in SUBMISSIONS if name in there]
        jobs += study.jobs(output, chosen, workloads, framework, [1], {"nadamw": str(TUNED)}, [0, 1], max_steps)
        tell(f"==> Training {', '.join(chosen)} on {', '.join(workloads)} in {framework}")
    tell(f"==> {len(jobs)} runs, {parallel} at a time")
    failed = study.run(jobs, parallel)
    tell("==> Writing the report")
    report = output / "report"
    command = [sys.executable, "-m", "scoring", "report", str(output), f"--output_dir={report}"]
    finished = subprocess.run(command, cwd=CHECKOUT, check=False)
    if finished.returncode != 0:
        tell(f"error: the report could not be written ({' '.join(command[1:])})", sys.stderr)
        return 1
    tell(f"==> The report lies in {report}")
    if failed:
        tell(f"error: {len(failed)} of the runs failed: {', '.join(failed)}", sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
