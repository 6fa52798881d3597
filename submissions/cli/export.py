"""`python -m submissions export`: a submission as a folder that needs nothing of this repository."""

from __future__ import annotations

import json
import keyword
import re
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
from workloads import algoperf
from workloads.runner import tuning

PROGRAM = "python -m submissions export"
EPILOG = """Examples:
  python -m submissions export kfac_reduce --ruleset=self --out=../submissions_algorithms/submissions
  python -m submissions export kfac_reduce --framework=jax --ruleset=external --name=my_kfac --out=DIR

--out is the folder `submissions` of a clone of github.com/mlcommons/submissions_algorithms, or any other. The
submission goes to OUT/external_tuning/NAME or OUT/self_tuning/NAME. An earlier export of the same framework there
is replaced, anything else is not.
"""
FOLDERS = {"external": "external_tuning", "self": "self_tuning"}
RULESETS = {"external": "external", "self": "self-tuning"}  # as submission_info.yml spells them
NUM_POINTS = 5  # trials of the external ruleset
INFO = "submission_info.yml"
CLONE = "submissions_algorithms"  # the repository that submissions are handed in to
MARK = "# Made by `python -m submissions export`; a further export replaces this folder.\n"


def _flags() -> flags.FlagValues:
    values = new()
    flags.DEFINE_enum("framework", "pytorch", list(FRAMEWORKS), "The framework.", flag_values=values)
    flags.DEFINE_enum("ruleset", "external", list(FOLDERS), "The tuning ruleset.", flag_values=values)
    flags.DEFINE_string(
        "out", None, "The folder that gets external_tuning/ or self_tuning/. Required.", flag_values=values
    )
    flags.DEFINE_string(
        "name", None, "Its folder. Default: SUBMISSION for PyTorch, SUBMISSION_jax for JAX.", flag_values=values
    )
    flags.DEFINE_string(
        "tuning_search_space",
        None,
        "File of the search space, external ruleset only. Default: tuning_search_spaces/SUBMISSION.json.",
        flag_values=values,
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
    name = names[0] if values.framework == "pytorch" else f"{names[0]}_{values.framework}"
    name = _checked_name(name if values.name is None else values.name)
    files = contents(
        names[0],
        values.framework,
        values.ruleset,
        values.authors,
        values.affiliations,
        name=name,
        search_space=values.tuning_search_space,
    )
    folder = Path(values.out) / FOLDERS[values.ruleset] / name
    write(folder, files)
    print(f"{folder}: {len(files)} files")
    if algoperf.is_older():
        print("Submissions are run on AlgoPerf 1.0 now; the one installed here is older. The folder fits both.")
    if not values.authors:
        print("Fill in the authors in submission_info.yml, or export with --authors: the pull request needs them.")
    start, path = _place(Path(values.out))
    print(f"Run it from {start}:\n{_run(name, values.framework, values.ruleset, path)}")
    print("In the pull request, with [submission] in its title:\n")
    print(f"```yaml\n{files[INFO].removeprefix(MARK)}```")


def _checked_name(name: str) -> str:
    """A folder's name that AlgoPerf's runner can import."""
    if re.fullmatch("[a-z][a-z0-9_]*", name) is None or keyword.iskeyword(name):
        raise UserError(f"--name={name}: a name is of lower-case letters, digits and _, and begins with a letter")
    return name


def _place(out: Path) -> tuple[Path, str]:
    """Where to start the runner, and the path of `out` from there.

    The working group starts it in the folder above the clone, so that the submission is a module of the clone.
    """
    whole = out.resolve()
    if whole.name == "submissions" and whole.parent.name == CLONE:
        return whole.parents[1], f"{CLONE}/submissions/"
    return out, ""


def contents(
    submission: str,
    framework: str,
    ruleset: str,
    authors: str = "",
    affiliations: str = "",
    *,
    name: str | None = None,
    search_space: str | None = None,
) -> dict[str, str]:
    """The files of the folder, as text by relative path; the same for the same checkout.

    Args:
        submission: its name here.
        framework: "pytorch" or "jax".
        ruleset: "external" or "self".
        authors, affiliations: separated by commas.
        name: of the folder; the submission's if None.
        search_space: file of the external ruleset's; the submission's own if None.

    Raises:
        UserError: there is no such submission, or its search space is not one of the rules.
    """
    if ruleset == "self" and search_space is not None:
        raise UserError(
            f"--tuning_search_space={search_space}: the self-tuning ruleset has no search space, the point is in "
            "the submission; leave it out, or use --ruleset=external"
        )
    name = submission if name is None else name
    described = registry.describe(submission, framework)
    files = vendor(registry.module_name(submission, framework), "submission")
    info = {
        "submission_name": described.title + (" (JAX)" if framework == "jax" else ""),
        "submission_folder": name,  # within submissions/external_tuning or submissions/self_tuning
        "authors": authors,
        "affiliations": affiliations,
        "version": __version__,
        "ruleset": RULESETS[ruleset],
        "framework": FRAMEWORKS[framework],
        "description": described.text,
    }
    for key, value in info.items():
        if "#" in value:
            raise UserError(f"the {key} hold a #, from which on the check of pull requests drops a line: {value}")
    # JSON's strings are YAML's double-quoted ones.
    files[INFO] = MARK + "".join(f"{key}: {json.dumps(value)}\n" for key, value in info.items())
    files["README.md"] = _readme(submission, name, framework, ruleset, described, files)
    files["requirements.txt"] = _requirements(framework, described)
    files["LICENSE"] = (CHECKOUT / "LICENSE").read_text(encoding="utf-8")
    if ruleset == "external":
        files["tuning_search_space.json"] = _search_space(submission, search_space)
    return dict(sorted(files.items()))


def _search_space(submission: str, given: str | None) -> str:
    spaces = CHECKOUT / "tuning_search_spaces"
    path = spaces / f"{submission}.json" if given is None else Path(given)
    if not path.is_file() and given is None:
        path = spaces / "suite" / path.name
    if not path.is_file():
        if given is not None:
            raise UserError(f"--tuning_search_space={given}: there is no such file")
        raise UserError(f"{submission} has no search space: {path} is missing; use --ruleset=self")
    space = tuning.read_space(str(path))  # as it is read for trials
    if isinstance(space, list) and len(space) != NUM_POINTS:
        raise UserError(f"{path} lists {len(space)} points; the external ruleset tries {NUM_POINTS}")
    return path.read_text(encoding="utf-8-sig")


def _requirements(framework: str, described: Description[OptimizerConfig]) -> str:
    own = {"pytorch": "torch", "jax": "jax, flax and optax"}[framework]
    beyond = "Needed beyond" if described.packages else "Nothing is needed beyond"
    return (
        f"# {beyond} what AlgoPerf installs itself, in the versions it pins:\n"
        f"#   {own}: the framework; the algorithm is written in it.\n"
        "#   algoperf: the enums of its API.\n"
    ) + "".join(f"{package.requirement}  # {package.reason}\n" for package in described.packages)


def _run(name: str, framework: str, ruleset: str, before: str = "") -> str:
    path = f"{before}{FOLDERS[ruleset]}/{name}"
    lines = [
        f"  python -m submission_runner --framework={framework} --workload=WORKLOAD --data_dir=DATA",
        f"    --submission_path={path}/submission.py --experiment_dir=RUNS --experiment_name={name}",
    ]
    if ruleset == "external":
        lines.append(f"    --tuning_search_space={path}/tuning_search_space.json --num_tuning_trials={NUM_POINTS}")
    else:
        lines.append("    --tuning_ruleset=self")
    return " \\\n".join(lines)


def _readme(
    submission: str,
    name: str,
    framework: str,
    ruleset: str,
    described: Description[OptimizerConfig],
    files: Mapping[str, str],
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
        if any(path.startswith(f"{folder}/") for path in files)
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
        f"{textwrap.dedent(_run(name, framework, ruleset))}\n```\n\n"
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
    info = folder / INFO
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    if there and not text.startswith(MARK):
        raise UserError(f"{folder} is not empty and not an earlier export; move it away or give another --out")
    of, new = (re.findall("^framework: (.*)$", each, re.MULTILINE) for each in (text, files[INFO]))
    if of and of != new:
        raise UserError(f"{folder} holds the export for {json.loads(of[0])}; give another --name or --out")
    foreign = sorted(str(path.relative_to(folder)) for path in there if str(path.relative_to(folder)) not in files)
    # Modules an earlier version vendored are no one's work; other files may be.
    foreign = [name for name in foreign if not name.endswith(".py") and name != "tuning_search_space.json"]
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which no export wrote; move it away or give another --out")
