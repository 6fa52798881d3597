"""Every example runs to its end, in a process of its own, and shows what it says; those of packages that are absent
say how to get them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = {"huggingface_trainer": "transformers", "accelerate_loop": "accelerate", "lightning_module": "lightning"}
NAMES = sorted(path.stem for path in (CHECKOUT / "examples").glob("[a-z]*.py"))
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")


def run(name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # A warning of the library is a failure of its example.
        [sys.executable, "-m", f"examples.{name}"],
        cwd=CHECKOUT,
        env={**os.environ, **dict.fromkeys(THREADS, "1"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def missing(name: str) -> str | None:
    """The package an example needs, if it is absent."""
    package = PACKAGES.get(name)
    return package if package is not None and importlib.util.find_spec(package) is None else None


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name):
    if missing(name):
        pytest.skip(f"{name} needs {missing(name)}")
    done = run(name)
    assert done.returncode == 0, done.stderr
    assert "K-FAC covers" in done.stdout or name == "accumulation"
    assert "UserWarning: K-FAC" not in done.stderr


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_an_absent_package_is_named_with_the_way_to_get_it(name, tmp_path):
    hidden = tmp_path / PACKAGES[name]
    hidden.mkdir()
    (hidden / "__init__.py").write_text(f"raise ModuleNotFoundError(name={PACKAGES[name]!r})")
    done = run(name, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"'{PACKAGES[name]}' is not installed. Run: pip install -e '.[torch,examples]'\n"


def test_the_ten_lines_are_those_of_the_readme():
    code = (CHECKOUT / "examples/ten_lines.py").read_text().split('"""\n\n', 1)[1]
    assert f"```python\n{code}```" in (CHECKOUT / "README.md").read_text()


def test_each_says_how_to_run_it():
    for name in NAMES:
        assert f"python -m examples.{name}" in (CHECKOUT / f"examples/{name}.py").read_text()
