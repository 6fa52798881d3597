"""What a new scaling and a new kind of layer take: a file per framework, and for the kind its place in a list.

The toys in `rooms/` are put into a copy of the library as somebody would add them. Nothing else of it is touched,
and training, checkpoints, the plan and coverage know them.
"""

from __future__ import annotations

import difflib
import filecmp
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import algoperf_kfac
from tests.contract.frameworks import NAMES
from tests.contract.test_plan import MLP, planned, trained

LIBRARY = Path(algoperf_kfac.__file__).parent
ROOMS = Path(__file__).parent / "rooms"
TOYS = {
    "pytorch": ["scalings/smoothed.py", "kinds/bilinear.py"],
    "jax": ["scalings/smoothed.py", "kinds/scale.py"],
}
# The line of the list, and the import that it takes.
LISTED = {
    "pytorch": ["from algoperf_kfac.pytorch.kinds.bilinear import Bilinear", "    Bilinear,"],
    "jax": ["from algoperf_kfac.jax.kinds.scale import Scale", "    Scale(),"],
}


@pytest.fixture
def extended(framework: str, tmp_path: Path) -> Path:
    """A folder with a copy of the library that has the toys of a framework."""
    copy = tmp_path / "algoperf_kfac"
    shutil.copytree(LIBRARY, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in TOYS[framework]:
        shutil.copy(ROOMS / framework / file, copy / framework / file)
    kinds = copy / framework / "kinds" / "__init__.py"
    imported, listed = LISTED[framework]
    lines = kinds.read_text().splitlines()
    lines.insert(next(i for i, line in enumerate(lines) if line.startswith("from algoperf_kfac")), imported)
    lines.insert(next(i for i, line in enumerate(lines) if line.startswith("KINDS")) + 1, listed)
    kinds.write_text("\n".join(lines) + "\n")
    return tmp_path


def differences(compared: filecmp.dircmp[str], folder: str = "") -> list[str]:
    """Files that are in one of two folders only, or not the same."""
    found = [f"{folder}{name}" for name in (*compared.left_only, *compared.right_only, *compared.diff_files)]
    for name, inner in compared.subdirs.items():
        found += differences(inner, f"{folder}{name}/")
    return found


@pytest.mark.parametrize("framework", NAMES)
def test_a_scaling_and_a_kind(framework: str, extended: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(LIBRARY.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.contract.rooms.use_{framework}", str(extended)],
        cwd=extended,  # the first place where modules are looked for
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    listed = f"{framework}/kinds/__init__.py"
    compared = filecmp.dircmp(LIBRARY, extended / "algoperf_kfac", ignore=["__pycache__"])
    assert sorted(differences(compared)) == sorted(
        f"{framework}/{file}" for file in (*TOYS[framework], "kinds/__init__.py")
    )
    files = [(folder / listed).read_text().splitlines() for folder in (LIBRARY, extended / "algoperf_kfac")]
    changed = [line for line in difflib.ndiff(*files) if line[0] in "+-"]
    assert changed == [f"+ {line}" for line in LISTED[framework]]


@pytest.mark.parametrize("framework", NAMES)
def test_a_scaling_given_as_a_class(framework: str) -> None:
    """Without a file in the library: the same scaling, trained with and planned for."""
    scaling = importlib.import_module(f"tests.contract.rooms.{framework}.scalings.smoothed").Scaling
    run = trained(framework, MLP, scaling=scaling, drift_tolerance=0.1)
    stated = planned(framework, MLP, scaling=scaling, drift_tolerance=0.1).memory.kfac_state
    assert stated == pytest.approx(run.kfac_bytes(), rel=0.02)
    before = run.parameters()
    run.step()
    assert all((p != q).any() for p, q in zip(before, run.parameters(), strict=True))


@pytest.mark.parametrize("framework", NAMES)
def test_a_kind_that_a_framework_has_no_layers_of(framework: str) -> None:
    """Files of the rooms that declare no such kind, or are the other framework's."""
    for kind in ("tied_table", *(["recurrent"] if framework == "jax" else ["experts"])):
        with pytest.raises(ValueError, match=f"approximation: no layer is of the kind '{kind}', only .*'linear'"):
            trained(framework, MLP, approximation={kind: "reduce"})


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="smoothed"):
        algoperf_kfac.KFACConfig(scaling="smoothed")
