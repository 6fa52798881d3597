"""`python -m submissions export`: a submission as a folder that needs nothing of this repository."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from algoperf_kfac import __version__
from commands import atomic
from commands.errors import UserError
from commands.flags import new, parse
from commands.frameworks import FRAMEWORKS
from submissions import registry
from submissions.cli.vendoring import CHECKOUT, vendor
from submissions.common.description import Description, OptimizerConfig

PROGRAM = "python -m submissions export"
EPILOG = """Example:
  python -m submissions export kfac_reduce --framework=pytorch --ruleset=external --out=../leaderboard/submissions

--out is the folder `submissions` of a clone of github.com/mlcommons/submissions_algorithms, or any other. The
submission goes to OUT/external_tuning/NAME or OUT/self_tuning/NAME. An earlier export there is replaced, anything
else is not.
"""
FOLDERS = {"external": "external_tuning", "self": "self_tuning"}
RULESETS = {"external": "external", "self": "self-tuning"}  # as submission_info.yml spells them
NUM_POINTS = 5  # trials of the external ruleset
MARK = "# Made by `python -m submissions export`; a further export replaces this folder.\n"


def _flags() -> flags.FlagValues:
    values = new()
    flags.DEFINE_enum("framework", "pytorch", list(FRAMEWORKS), "The framework.", flag_values=values)
    flags.DEFINE_enum("ruleset", "external", list(FOLDERS), "The tuning ruleset.", flag_values=values)
    flags.DEFINE_string(
        "out", None, "The folder that gets external_tuning/ or self_tuning/. Required.", flag_values=values
    )
    flags.DEFINE_string("authors", "", "For submission_info.yml, separated by commas.", flag_values=values)
    flags.DEFINE_string("affiliations", "", "For submission_info.yml, separated by commas.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Writes the folder and says what to do with it.

    Raises:
        UserError: there is no such submission, or the folder holds something else.
    """
    values = _flags()
    names = [argument for argument in argv if not argument.startswith("-")]
    parse(
        [argument for argument in argv if argument.startswith("-")],
        values,
        PROGRAM,
        ("out",),
        synopsis="SUBMISSION --flag=value ...",
        epilog=EPILOG,
    )
    if len(names) != 1:
        raise UserError(
            f"name one submission, e.g. {PROGRAM} kfac_reduce --out=DIR; flags are written --name=value"
        )
    files = contents(names[0], values.framework, values.ruleset, values.authors, values.affiliations)
    folder = Path(values.out) / FOLDERS[values.ruleset] / names[0]
    write(folder, files)
    print(f"{folder}: {len(files)} files")
    if not values.authors:
        print("Fill in the authors in submission_info.yml, or export with --authors: the pull request needs them.")
    print(f"Run it from {values.out}:\n{_run(names[0], values.framework, values.ruleset)}")


def contents(
    submission: str, framework: str, ruleset: str, authors: str = "", affiliations: str = ""
) -> dict[str, str]:
    """The files of the folder, as text by relative path; the same for the same checkout.

    Raises:
        UserError: there is no such submission, or its search space is not one of the rules.
    """
    described = registry.describe(submission, framework)
    files = vendor(registry.module_name(submission, framework), "submission")
    info = {
        "submission_name": described.title,
        "submission_folder": f"submissions/{FOLDERS[ruleset]}/{submission}",
        "authors": authors,
        "affiliations": affiliations,
        "version": __version__,
        "ruleset": RULESETS[ruleset],
        "framework": FRAMEWORKS[framework],
        "description": described.text,
    }
    # JSON's strings are YAML's double-quoted ones.
    files["submission_info.yml"] = MARK + "".join(f"{key}: {json.dumps(value)}\n" for key, value in info.items())
    files["README.md"] = _readme(submission, framework, ruleset, described, files)
    files["requirements.txt"] = _requirements(framework, described)
    files["LICENSE"] = (CHECKOUT / "LICENSE").read_text(encoding="utf-8")
    if ruleset == "external":
        files["tuning_search_space.json"] = _search_space(submission)
    return dict(sorted(files.items()))


def _search_space(submission: str) -> str:
    spaces = CHECKOUT / "tuning_search_spaces"
    path = spaces / f"{submission}.json"
    if not path.is_file():
        path = spaces / "suite" / path.name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"{submission} has no search space: {path} is missing; use --ruleset=self") from None
    space = json.loads(text)
    if isinstance(space, list) and len(space) != NUM_POINTS:
        raise UserError(f"{path} lists {len(space)} points; the external ruleset tries {NUM_POINTS}")
    return text


def _requirements(framework: str, described: Description[OptimizerConfig]) -> str:
    own = {"pytorch": "torch", "jax": "jax, flax and optax"}[framework]
    beyond = "Needed beyond" if described.packages else "Nothing is needed beyond"
    return (
        f"# {beyond} what AlgoPerf installs itself, in the versions it pins:\n"
        f"#   {own}: the framework; the algorithm is written in it.\n"
        "#   algoperf: the enums of its API.\n"
    ) + "".join(f"{package.requirement}  # {package.reason}\n" for package in described.packages)


def _run(submission: str, framework: str, ruleset: str) -> str:
    path = f"{FOLDERS[ruleset]}/{submission}"
    lines = [
        f"  python -m submission_runner --framework={framework} --workload=WORKLOAD --data_dir=DATA",
        f"    --submission_path={path}/submission.py --experiment_dir=RUNS --experiment_name={submission}",
    ]
    if ruleset == "external":
        lines.append(f"    --tuning_search_space={path}/tuning_search_space.json --num_tuning_trials={NUM_POINTS}")
    else:
        lines.append("    --tuning_ruleset=self")
    return " \\\n".join(lines)


def _readme(
    submission: str, framework: str, ruleset: str, described: Description[OptimizerConfig], files: Mapping[str, str]
) -> str:
    folders = {
        submission: "what the algorithm says of itself, its own point with it",
        "common/kfac": "the algorithm: AlgoPerf's API around the library",
        "common": "loss, gradient, clipping, schedule, batch sizes",
        "algoperf_kfac": f"the library algoperf-kfac {__version__}, as far as it is needed",
    }
    rows = ["| `submission.py` | AlgoPerf's functions |"]
    rows += [
        f"| `{folder}/` | {what} |"
        for folder, what in folders.items()
        if any(name.startswith(f"{folder}/") for name in files)
    ]
    if ruleset == "external":
        rows.append("| `tuning_search_space.json` | the points of the external ruleset |")
    packages = ", ".join(f"`{package.requirement}`" for package in described.packages)
    needed = (
        f"Needed beyond AlgoPerf's own packages: {packages}"
        if packages
        else ("No other package is needed than AlgoPerf's own")
    )
    tuning = "five points" if ruleset == "external" else "no hyperparameters: the point is in the submission"
    return (
        f"# {described.title}\n\n{described.text}\n\n"
        f"AlgoPerf submission in {FRAMEWORKS[framework]}, {RULESETS[ruleset]} ruleset ({tuning}). {needed} "
        "(`requirements.txt`), and nothing depends on the workload but the batch size.\n\n"
        f"| | |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        f"From the folder that holds `{FOLDERS[ruleset]}`:\n\n```bash\n"
        f"{textwrap.dedent(_run(submission, framework, ruleset))}\n```\n\n"
        "Apache-2.0.\n"
    )


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Writes the folder as a whole, so that no export is ever half there.

    Raises:
        UserError: the folder holds something else than an earlier export, or cannot be written.
    """
    _check_ours(folder, files)
    try:
        atomic.write_folder(folder, files)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --out") from None


def _check_ours(folder: Path, files: Mapping[str, str]) -> None:
    """Raises UserError if a file there is not one this export would write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give another --out")
    there = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    info = folder / "submission_info.yml"
    ours = info.is_file() and info.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    if there and not ours:
        raise UserError(f"{folder} is not empty and not an earlier export; move it away or give another --out")
    foreign = sorted(str(path.relative_to(folder)) for path in there if str(path.relative_to(folder)) not in files)
    # Modules an earlier version vendored are no one's work; other files may be.
    foreign = [name for name in foreign if not name.endswith(".py") and name != "tuning_search_space.json"]
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which no export wrote; move it away or give another --out")
