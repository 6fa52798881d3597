"""The command `plan`, and the plans committed in docs/coverage.md."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from algoperf_kfac.config import KFACConfig
from submissions.__main__ import main
from submissions.cli import plan_tables
from submissions.cli.named_plan import Named, Room
from submissions.common.batch_sizes import SCORED, get_batch_size
from tests.submissions.planned import Net, inputs, make_plan
from tests.submissions.test_plan import one_layer
from workloads import algoperf

CHECKOUT = Path(__file__).resolve().parents[2]


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_an_embedded_workload(capsys):
    code, out, _ = command(capsys, "plan", "--workload=mnist_vit", "--devices=2")
    assert code == 0
    assert out.startswith("mnist_vit: batch 128 on 2 devices\n")
    assert "K-FAC covers 153,034 of 153,930 parameters (99.4 %)" in out
    row = next(line for line in out.splitlines() if line.startswith("blocks.*.attention.query"))
    assert " ".join(row.split()) == "blocks.*.attention.query x 3 linear 64 64 16 yes mixed 65 64"
    assert "normalisation (LayerNorm)" in out
    code, markdown, _ = command(capsys, "plan", "--workload=mnist_vit", "--devices=2", "--format=markdown")
    assert markdown.startswith("## mnist_vit")
    assert r"| blocks.\*.attention.query | x 3 | linear | 64 | 64 | 16 | yes | mixed | 65 | 64 |" in markdown


def test_an_embedded_workload_of_graphs(capsys):
    """Rows of nodes and edges are positions of their graphs, 104 with the padding."""
    code, out, _ = command(capsys, "plan", "--workload=molecules_gnn", "--devices=1")
    assert code == 0
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "edge_embedding linear 3 48 52.92307692 yes mixed 4 48" in rows  # 5,504 edges
    assert "decoder linear 48 1 1 yes mixed 49 1" in rows


OLD_WORKLOADS = """import torch

WORKLOADS = {"mnist": {"workload_path": "mnist/mnist", "workload_class_name": "MnistWorkload"}}
BASE_WORKLOADS_DIR = "algoperf/workloads/"


class MnistWorkload:
    model_params_types = {}

    def init_model_fn(self, rng):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10)), None

    def model_fn(self, params, batch, *args, **kwargs):
        return params(batch["inputs"]), None


def import_workload(workload_path, workload_class_name, return_class):
    return MnistWorkload
"""


@pytest.fixture
def older_algoperf(tmp_path, monkeypatch):
    """A stand-in for an AlgoPerf before 1.0: its runner and its workloads, of which one is there."""
    folder = tmp_path / "algoperf" / "workloads"
    folder.mkdir(parents=True)
    for file in (tmp_path / "submission_runner.py", folder.parent / "__init__.py", folder / "__init__.py"):
        file.touch()
    (folder / "workloads.py").write_text(OLD_WORKLOADS)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("algoperf", "submission_runner")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "algoperf"]:
        del sys.modules[name]


@pytest.mark.usefixtures("older_algoperf")
def test_an_algoperf_before_1_0_plans_and_says_that_it_is_older(capsys):
    code, out, err = command(capsys, "plan", "--workload=mnist", "--devices=2")
    assert code == 0
    assert out.startswith("mnist: batch ")
    assert "K-FAC covers 7,850 of 7,850 parameters" in out
    assert err == f"{algoperf.OLDER}\n"
    code, out, err = command(capsys, "plan", "--workload=finewebedu_lm")
    assert (code, out, err) == (2, "", f"error: unknown workload 'finewebedu_lm'. {algoperf.OLDER}\n")
    code, out, err = command(capsys, "plan", "--workload=mnist_vit", "--devices=2")  # needs no AlgoPerf
    assert (code, err) == (0, "")


def example_model():
    return Net(), inputs(2)


def test_a_model_of_the_users(capsys):
    flags = ("plan", f"--model={__name__}:example_model", "--devices=1", "--submission=kfac_expand")
    code, out, _ = command(capsys, *flags)
    assert code == 0
    assert "raw " in out
    code, larger, _ = command(capsys, *flags, "--batch_size=6")
    assert code == 0

    def flops(text):
        return float(text.partition("to the model's ")[2].split()[0])

    assert flops(larger) == pytest.approx(3 * flops(out), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, ""),
        ({"statistics_rows": 2048}, " from at least 2,048 rows of a call"),
        (
            {"statistics_rows": 2048, "statistics_rows_by_side": True},
            " from at least 2,048 rows of a call (no fewer than a layer's largest block has sides)",
        ),
        ({"statistics_rows_by_side": True}, ""),  # of no number there is no more
    ],
)
def test_the_head_says_which_rows_statistics_take(options, rows):
    config = KFACConfig(factor_interval=2, refresh_interval=6, **options)
    named = Named("one", make_plan(one_layer(), {}, config), "", 8, Room(4e10, 1.0))
    assert f", statistics every 2 steps{rows}, refresh every 6 steps." in plan_tables.render(named, "text")


def flat_example():
    return nn.Linear(6, 4), torch.zeros(12, 6)


def test_without_a_batch_size_the_example_inputs_say_it(capsys):
    out = command(capsys, "plan", f"--model={__name__}:flat_example", "--devices=2")[1]
    assert out.startswith(f"{__name__}:flat_example: batch 24 on 2 devices\n")
    assert "NadamW alone needs" in out


def flax_example():
    fnn, jax, jnp = (importlib.import_module(name) for name in ("flax.linen", "jax", "jax.numpy"))
    model, x = fnn.Sequential([fnn.Dense(6), fnn.relu, fnn.Dense(3)]), jnp.zeros((12, 5))
    return model.apply, jax.eval_shape(model.init, jax.random.PRNGKey(0), x), (x,)


def test_a_flax_model_of_the_users(capsys):
    pytest.importorskip("flax")
    flags = ("plan", f"--model={__name__}:flax_example", "--framework=jax", "--devices=1")
    code, out, _ = command(capsys, *flags)
    assert code == 0
    assert out.startswith(f"{__name__}:flax_example: batch 12 on 1 device\n")
    assert "K-FAC covers 57 of 57 parameters" in out


def raises():
    raise RuntimeError("first line\nsecond line")


def model_alone():
    return nn.Linear(2, 2)


def misfit():
    return nn.Linear(2, 2), torch.zeros(3, 5)


def misfit_in_jax():
    jnp = importlib.import_module("jax.numpy")
    return (lambda p, x: x @ p), jnp.zeros((3, 3)), (jnp.zeros((2, 4)),)


@pytest.mark.parametrize(
    ("function", "framework", "message"),
    [
        ("raises", "pytorch", "the model cannot be made: RuntimeError: first line"),
        ("raises", "jax", "the model cannot be made: RuntimeError: first line"),
        ("model_alone", "pytorch", "must be a function that returns (model, example inputs)"),
        ("model_alone", "jax", "must be a function that returns (apply function, parameters, tuple of arguments)"),
        ("misfit", "pytorch", "runs neither on the meta device (RuntimeError"),
        ("misfit_in_jax", "jax", "the model cannot be traced (TypeError"),
    ],
)
def test_mistakes_in_a_model_get_one_line(capsys, function, framework, message):
    if framework == "jax":
        pytest.importorskip("jax")
    code, out, err = command(capsys, "plan", f"--model={__name__}:{function}", f"--framework={framework}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --workload, --model and --all"),
        (("--workload=mnist_vit", "--all"), "give one of"),
        (("--workload=unheard_of",), "no batch size for workload 'unheard_of'"),
        (("--workload=unheard_of", "--batch_size=8"), "unheard_of"),
        (("--workload=mnist_vit", "--batch_size=9"), "the batch size 9 does not divide by 4 devices"),
        (("--workload=mnist_vit", "--framework=theano"), "unknown framework 'theano'"),
        (("--workload=mnist_vit", "--submission=adam"), "there is no submission 'adam'"),
        (("--workload=mnist_vit", "--submission=nadamw"), "nadamw is no K-FAC submission"),
        (("--workload=mnist_vit", "--colour=red"), "colour"),
        (("--model=no_such_module:f",), "no_such_module"),
        (("--model=math:pi",), "--model=math:pi is no function"),
        (("extra", "--workload=mnist_vit"), "Unexpected argument 'extra'"),
    ],
)
def test_mistakes_get_one_line(capsys, arguments, message):
    code, out, err = command(capsys, "plan", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_help(capsys):
    assert command(capsys, "--help")[1].count("plan") == 1
    assert "--workload" in command(capsys, "plan", "--help")[1]
    code, _, err = command(capsys, "score")
    assert code == 2
    assert "unknown command 'score'; known: plan, export" in err


def coverage_tables(page: str) -> dict[str, dict[str, dict[str, str]]]:
    """Framework -> workload -> column -> cell, from the summaries."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for framework in ("PyTorch", "JAX"):
        lines = page.partition(f"\n{framework}:\n\n")[2].partition("\n\n")[0].splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        tables[framework] = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    return tables


def test_committed_coverage_is_consistent():
    """Its summaries say what its sections say, of all workloads, at the submissions' batch sizes."""
    page = (CHECKOUT / "docs/coverage.md").read_text()
    for framework, table in coverage_tables(page).items():
        assert tuple(table) == tuple(SCORED)
        for workload, row in table.items():
            section = page.partition(f"\n## {workload} in {framework}: ")[2].partition("\n## ")[0]
            assert section.startswith(f"batch {get_batch_size(workload):,} on 4 devices")
            assert f"A device needs {row['peak']} at its peak, {row['K-FAC state']} of it K-FAC's state" in section
            assert f"NadamW alone needs {row['NadamW peak']}." in section
            assert f"| peak | {row['peak']} |" in section
            assert f"K-FAC adds {row['sum']} to the model's {row['model']} per step" in section
            value, unit = row["peak"].split()
            assert unit == "GB"
            room = 0.8 * 40 if framework == "JAX" else 40
            assert row["fits"] == ("yes" if float(value) <= room else "no")
            counts = re.findall(
                r"^\| [^|]+ \|(?: x (\d+) \||  \|)? (?:linear|conv|embedding)", section, re.MULTILINE
            )
            assert sum(int(count or 1) for count in counts) == int(row["layers"])


def test_committed_coverage_is_current():
    """docs/coverage.md is what its command prints; the models are AlgoPerf's."""
    pytest.importorskip("algoperf.workloads.workloads", reason="AlgoPerf is not installed")
    page = (CHECKOUT / "docs/coverage.md").read_text()
    arguments = page.partition("Made by `python -m submissions ")[2].partition("`")[0].split()
    assert arguments[:2] == ["plan", "--all"]
    made = subprocess.run(
        [sys.executable, "-m", "submissions", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert made.stdout == page
