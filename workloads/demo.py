"""The demo: both K-FACs, SOAP, Muon and NadamW race to a target on two workloads, in each framework, then a report.

    python -m workloads.demo --output_dir=runs/demo

The workloads are the first and the last of the suite. Each submission runs the best point that the suite found for
it on the workload (docs/results/suite/chosen.json), one trial in one study. Run again, it keeps finished runs and
only writes the report anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from commands import atomic, errors
from commands.errors import UserError, tell
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry as submissions
from workloads import registry, study
from workloads.runner import experiment, jobs
from workloads.runner.jobs import CHECKOUT, Job
from workloads.studies import archives, facts

SUBMISSIONS = ("nadamw", "kfac_expand", "kfac_reduce", "soap", "muon")
TUNED = CHECKOUT / "docs" / "results" / "suite"


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
    order = facts.in_order(registry.BASES)
    workloads = [order[0], order[-1]]
    todo = []
    for framework in frameworks:
        here = [name for name in workloads if framework in registry.WORKLOADS[name].frameworks]
        for name in here:
            registry.load(name, framework)  # missing packages show here, once, and not in every job
        chosen = _runnable(framework)
        todo += [_job(output, name, workload, framework, max_steps) for workload in here for name in chosen]
        tell(f"==> Training {', '.join(chosen)} on {', '.join(here)} in {framework}")
    tell(f"==> {len(todo)} runs, {parallel} at a time")
    failed = jobs.run(todo, parallel)
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


def _runnable(framework: str) -> list[str]:
    """The submissions that exist in a framework and have their packages; says which are left out."""
    there = submissions.names_in(framework)
    found = []
    for name in SUBMISSIONS:
        if name in there:
            try:
                submissions.load(name, framework)
            except UserError as error:
                tell(f"note: {name} does not run in {framework}. {error}")
            else:
                found.append(name)
    return found


def _job(output: Path, submission: str, workload: str, framework: str, max_steps: int | None) -> Job:
    """The trial of a submission's best point, or of its own point where none was found."""
    settings: dict[str, object] = {"max_global_steps": max_steps, "stop_at_target": True, "clock": "wall"}
    name = f"{submission}/study_1/{workload}_{framework}/trial_1"
    record = archives.chosen_records(TUNED).get(workload, {}).get(submission)
    space = None
    if record is None:
        tell(f"note: no point of {submission} was tuned on {workload}: it runs its own")
    else:
        space = output / ".points" / f"{workload}_{submission}.json"
        space.parent.mkdir(exist_ok=True)
        atomic.write_text(space, json.dumps(archives.chosen_points(record)[:1], indent=2))
    train = jobs.command(
        workload, framework, submission, output, "study_1", study.study_seed(1), settings, space=space
    )
    return Job(name, (output / name,), train, jobs.log_of(output, name), settings)


if __name__ == "__main__":
    sys.exit(main())
