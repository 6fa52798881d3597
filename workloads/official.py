"""Runs AlgoPerf's own runner with the embedded workloads in its registry.

    python -m workloads.official --workload=mnist_vit --framework=pytorch --experiment_dir=/tmp/runs \\
        --experiment_name=kfac_reduce --submission_path=submissions/kfac_reduce/pytorch/submission.py \\
        --tuning_search_space=tuning_search_spaces/kfac_reduce.json --num_tuning_trials=1

All flags, rules and files are AlgoPerf's (`python -m submission_runner --help`), with two differences, so that
steps-to-target means what it means in the embedded runner:

- AlgoPerf evaluates after so many seconds. These workloads are done in seconds, and answer the question "after
  how many seconds?" by 0 where the embedded runner evaluates (after the first batch, and after every
  `eval_period_steps`-th) and else by "never". Batches are counted, so a submission that draws several in a step is
  evaluated more often. The runner itself evaluates once more after the last step.
- `--max_global_steps` is the workload's `step_hint` where it is not given.

AlgoPerf goes on until the test target is reached too, and seeds differently: the same `--rng_seed` gives another
run.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence

from commands import errors
from commands.errors import UserError
from submissions.common.api import Batch, Tree
from workloads import registry
from workloads.algoperf import NOT_INSTALLED, OLDER, installed, is_older
from workloads.workload import Workload

PROGRAM = "python -m workloads.official"
NEVER = 1e18  # seconds
HELP = f"""usage: {PROGRAM} --workload=NAME [flags of AlgoPerf's runner]

Runs AlgoPerf's own runner with the embedded workloads ({", ".join(registry.WORKLOADS)}) in its registry.
Its flags: python -m submission_runner --help
Evaluations follow the workload's eval_period_steps; --max_global_steps is its step_hint by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs with the given arguments (default: the command line's); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.lstrip("-") in ("help", "h", "helpfull") for argument in arguments if argument[:1] == "-"):
        print(HELP if installed() else f"{HELP}\n{NOT_INSTALLED}")
        return 0
    return errors.run(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    if not installed():
        raise UserError(NOT_INSTALLED)
    if is_older():
        print(OLDER, file=sys.stderr)
    runner = load_runner()
    from absl import app, flags

    for name in ("workload", "framework", "submission_path", "experiment_dir", "experiment_name"):
        flags.mark_flag_as_required(name)

    def run(rest: list[str]) -> None:
        values: Tree = flags.FLAGS
        if values.workload in registry.WORKLOADS:
            workload = official_class(values.workload, values.framework)
            if values.max_global_steps is None:
                values.max_global_steps = workload.step_hint
        runner.main(rest)

    app.run(run, argv=[PROGRAM, *arguments])


def load_runner() -> types.ModuleType:
    """AlgoPerf's `submission_runner`, with the embedded workloads in its registry.

    Raises:
        UserError: a part of AlgoPerf's requirements is missing.
    """
    try:
        import submission_runner
    except ModuleNotFoundError as error:
        raise UserError(f"AlgoPerf needs the module '{error.name}'; {NOT_INSTALLED}") from None
    register(submission_runner)
    return submission_runner


def register(runner: types.ModuleType) -> None:
    """Adds the embedded workloads to the registry of AlgoPerf's runner.

    AlgoPerf finds a workload's class by a path below its own package. A module that exists in memory only stands
    there; its class is made when it is asked for, because it needs the workload's framework.
    """
    package = runner.BASE_WORKLOADS_DIR.replace("/", ".") + "embedded"
    for name, entry in registry.WORKLOADS.items():
        for framework in entry.frameworks:
            path = f"{package}.{name}_{framework}.workload"
            sys.modules[path] = _LazyModule(path, name, framework, entry.class_name)
        runner.WORKLOADS[name] = {"workload_path": f"embedded/{name}", "workload_class_name": entry.class_name}


class _LazyModule(types.ModuleType):
    """A module with one class, made at first use."""

    def __init__(self, path: str, name: str, framework: str, class_name: str) -> None:
        super().__init__(path)
        self._made = (name, framework)
        self._class_name = class_name

    def __dir__(self) -> list[str]:
        return [self._class_name]

    def __getattr__(self, attribute: str) -> type:
        if attribute != self._class_name:
            raise AttributeError(attribute)
        made = official_class(*self._made)
        setattr(self, attribute, made)
        return made


def official_class(name: str, framework: str) -> type[Workload]:
    """The embedded workload as a subclass of AlgoPerf's `spec.Workload`.

    Raises:
        UserError: no workload of that name, not in that framework, or the framework or the data are not installed.
    """
    from algoperf import spec

    embedded = type(registry.load(name, framework))

    class OfficialWorkload(embedded, spec.Workload):  # type: ignore[misc, valid-type]
        """See the module."""

        def __init__(self) -> None:
            super().__init__()
            self._eval_iters: dict[str, Iterator[Batch]] = {}
            self._train_batches = 0

        @property
        def eval_period_time_sec(self) -> float:
            """0 where an evaluation is due. It must not count: the runner's logs read it, too."""
            drawn = self._train_batches
            return 0 if drawn == 1 or drawn % self.eval_period_steps == 0 else NEVER

        def _build_input_queue(self, data_rng: Tree, split: str, *args: Tree, **kwargs: Tree) -> Iterator[Batch]:
            queue = super()._build_input_queue(data_rng, split, *args, **kwargs)
            if split != "train":
                return queue
            self._train_batches = 0
            return self._counted(queue)

        def _counted(self, queue: Iterator[Batch]) -> Iterator[Batch]:
            for batch in queue:
                self._train_batches += 1
                yield batch

    OfficialWorkload.__name__ = embedded.__name__
    return OfficialWorkload


if __name__ == "__main__":
    sys.exit(main())
