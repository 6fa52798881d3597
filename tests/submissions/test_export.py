"""An exported submission needs nothing of this repository, and trains as the one it was made from."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from commands.errors import UserError
from submissions.__main__ import main
from submissions.cli import export
from workloads import registry

CHECKOUT = Path(__file__).resolve().parents[2]
NAMES = ("kfac_expand", "kfac_reduce", "nadamw")
TRAINED = ("kfac_reduce", "nadamw")
# Trains modules in a process that cannot import this repository, then those of this repository; prints a line for
# each, its parameters after some steps.
ALONE = """
import importlib, itertools, os, sys, time
checkout, alone, ours = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{getattr(f, '__module__', '')}{f}"]
sys.path[:] = [p for p in sys.path if "__editable__" not in p and p != checkout]
for name in ("algoperf_kfac", "submissions"):
    assert importlib.util.find_spec(name) is None, name
sys.path.insert(0, os.getcwd())
"""
SETUP = {
    "pytorch": """
import torch

class Workload:
    step_hint = 20
    metrics_logger = None
    loss_type = None

    def model_fn(self, params, augmented_and_preprocessed_input_batch, model_state, mode, rng, update_batch_norm,
                 dropout_rate=0.0):
        return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        loss = torch.nn.functional.cross_entropy(logits_batch, label_batch, reduction="none")
        return {"summed": loss.sum(), "n_valid_examples": torch.tensor(len(loss)), "per_example": loss}

def rng(step):
    return [step, 0]

def start():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))
    x = torch.randn(32, 6)
    return Workload(), model, {"inputs": x, "targets": x[:, :4].argmax(1)}
""",
    "jax": """
import flax.linen as nn, jax, numpy as np, optax

class Workload:
    step_hint = 20
    metrics_logger = None
    loss_type = None
    module = nn.Sequential([nn.Dense(9), nn.tanh, nn.Dense(4)])

    def init_model_fn(self, rng):
        return self.module.init(rng, np.ones((1, 6), np.float32))["params"], {}

    def model_fn(self, params, augmented_and_preprocessed_input_batch, model_state, mode, rng, update_batch_norm,
                 dropout_rate=0.0):
        return self.module.apply({"params": params}, augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_batch, label_batch)
        return {"summed": loss.sum(), "n_valid_examples": len(loss), "per_example": loss}

def rng(step):
    return np.array([step, 0], np.uint32)

def start():
    workload = Workload()
    x = np.random.default_rng(0).standard_normal((32, 6), np.float32)
    return workload, workload.init_model_fn(rng(0))[0], {"inputs": x, "targets": x[:, :4].argmax(1)}
""",
}
TRAIN = """
def train(name):
    submission = importlib.import_module(name)
    workload, model, batch = start()
    time.perf_counter = lambda count=itertools.count(): next(count)  # a refresh budget follows the clock
    assert submission.get_batch_size("imagenet_vit") == 1024
    state = submission.init_optimizer_state(workload, model, {}, None, rng(1))
    losses = []
    for step in range(12):
        out, _ = workload.model_fn(model, batch, {}, None, None, False)
        losses.append(float(workload.loss_fn(batch["targets"], out)["summed"]))
        chosen = submission.data_selection(workload, iter([batch]), state, model, None, None, step, None)
        state, model, _ = submission.update_params(
            workload=workload, current_param_container=model, current_params_types=None, model_state={},
            hyperparameters=None, batch=chosen, loss_type=None, optimizer_state=state, eval_results=[],
            global_step=step, rng=rng(step), train_state={})
        state, model, _ = submission.prepare_for_eval(
            workload=workload, current_param_container=model, current_params_types=None, model_state={},
            hyperparameters=None, loss_type=None, optimizer_state=state, eval_results=[],
            global_step=step, rng=None)
    assert losses[-1] < 0.9 * losses[0], losses
    print([p.flatten().tolist() for p in leaves(model)])

for name in alone:
    train(name)
strays = [m.__name__ for m in list(sys.modules.values())
          if str(getattr(m, "__file__", None) or "").startswith(checkout + os.sep + "algoperf_kfac")
          or str(getattr(m, "__file__", None) or "").startswith(checkout + os.sep + "submissions")]
assert not strays, strays
assert all(os.getcwd() in m.__file__ for n, m in sys.modules.items() if ".algoperf_kfac" in n)
sys.path.insert(0, checkout)
for name in ours:
    train(name)
    assert sys.modules[name].__file__.startswith(checkout + os.sep), name
"""
LEAVES = {
    "pytorch": "leaves = lambda model: model.parameters()\n",
    "jax": "leaves = jax.tree.leaves\n",
}
# Where the working group runs submissions: the folder above the clone.
CLONE = Path("submissions_algorithms/submissions")
FOLDER = {"pytorch": "{}", "jax": "{}_jax"}  # of a submission, beside that of the other framework


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Submissions of both frameworks side by side: external ones alone, a self-tuning one in a clone."""
    root = tmp_path_factory.mktemp("exported")
    for framework, name in FOLDER.items():
        for submission in TRAINED:
            folder = root / "external_tuning" / name.format(submission)
            export.write(folder, contents_of(submission, framework, "external"))
        flags = [f"--framework={framework}", "--ruleset=self", f"--out={root / CLONE}"]
        assert main(["export", "kfac_reduce", *flags]) == 0
    return root


@pytest.fixture(scope="module", params=FOLDER)
def trained(exported: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """What training gave, by the names of submissions in one framework: all in one process, as its import takes
    longer than they do."""
    framework = request.param
    pytest.importorskip("torch" if framework == "pytorch" else "jax")
    name = FOLDER[framework]
    alone = {f"external {one}": f"external_tuning.{name.format(one)}.submission" for one in TRAINED}
    alone["self kfac_reduce"] = ".".join([*CLONE.parts, "self_tuning", name.format("kfac_reduce"), "submission"])
    ours = {one: f"submissions.{one}.{framework}.submission" for one in TRAINED}
    program = ALONE + SETUP[framework] + LEAVES[framework] + TRAIN
    modules = [",".join(found.values()) for found in (alone, ours)]
    run = subprocess.run(
        [sys.executable, "-I", "-c", program, str(CHECKOUT), *modules],
        cwd=exported,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return dict(zip([*alone, *ours], run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("submission", TRAINED)
def test_it_trains_alone_as_it_does_here(trained, submission):
    assert trained[f"external {submission}"] == trained[submission]


def test_it_trains_from_the_folder_above_the_clone(trained):
    """Self-tuning: without hyperparameters."""
    assert trained["self kfac_reduce"] == trained["kfac_reduce"]
    assert trained["kfac_reduce"] != trained["nadamw"]


def test_both_frameworks_lie_side_by_side_where_the_working_group_runs_them(tmp_path, capsys):
    """From the folder above the clone, as modules of it, self-tuning."""
    out = tmp_path / CLONE
    for framework, name in (("pytorch", "kfac_reduce"), ("jax", "kfac_reduce_jax")):
        flags = [f"--framework={framework}", "--ruleset=self", "--authors=A, B", f"--out={out}"]
        assert main(["export", "kfac_reduce", *flags]) == 0
        said = capsys.readouterr().out
        path = f"submissions_algorithms/submissions/self_tuning/{name}"
        assert f"Run it from {tmp_path}:" in said
        assert f"--submission_path={path}/submission.py" in said
        assert "--tuning_ruleset=self" in said
        assert "tuning_search_space" not in said
        block = pull_request(said)
        assert block["submission_folder"] == name
        assert block["framework"] == {"pytorch": "PyTorch", "jax": "JAX"}[framework]
        info = (out / "self_tuning" / name / "submission_info.yml").read_text()
        assert info.endswith(said[said.index("submission_name") : said.rindex("```")])


@functools.cache
def contents_of(submission: str, framework: str, ruleset: str) -> Mapping[str, str]:
    """What is exported, made once; that it is the same each time is asked of it below."""
    return MappingProxyType(export.contents(submission, framework, ruleset))


def pull_request(said: str) -> dict[str, str]:
    """What the check of pull requests reads of a text: lines of its YAML block, each up to a #."""
    lines = said.partition("```yaml\n")[2].partition("\n```")[0].splitlines()
    fields = dict(line.split("#")[0].strip().split(": ", 1) for line in lines)
    values = {key: json.loads(value) for key, value in fields.items()}
    assert all(values[key] for key in ("submission_name", "submission_folder", "authors", "ruleset"))
    return values


def test_a_name_of_ones_own(tmp_path, capsys):
    flags = ["--ruleset=self", "--name=my_kfac", f"--out={tmp_path}"]
    assert main(["export", "kfac_reduce", *flags]) == 0
    folder = tmp_path / "self_tuning" / "my_kfac"
    assert "--submission_path=self_tuning/my_kfac/submission.py" in capsys.readouterr().out
    assert "self_tuning/my_kfac/submission.py" in (folder / "README.md").read_text()
    before = folder_of({}, folder)
    assert main(["export", "kfac_reduce", "--framework=jax", *flags]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {folder} holds the export for PyTorch; give another --name or --out\n"
    assert folder_of({}, folder) == before
    assert main(["export", "kfac_reduce", *flags]) == 0


def test_a_search_space_of_ones_own(tmp_path, capsys):
    space = tmp_path / "space.json"
    space.write_text(json.dumps([{"learning_rate": 1e-3 * (i + 1)} for i in range(5)]))
    flags = ["kfac_reduce", f"--tuning_search_space={space}", f"--out={tmp_path}"]
    assert main(["export", *flags]) == 0
    written = tmp_path / "external_tuning" / "kfac_reduce" / "tuning_search_space.json"
    assert written.read_text() == space.read_text()
    capsys.readouterr()
    assert main(["export", *flags, "--ruleset=self"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the self-tuning ruleset has no search space" in err
    assert not (tmp_path / "self_tuning").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"{", "is not valid JSON"),
        (b'{"learning_rate": 1}', "'learning_rate' is no object"),
        (b"3", "must be a JSON object of ranges or a list of points"),
        (b'[{"a": 1}]', "lists 1 points; the external ruleset tries 5"),
    ],
)
def test_a_search_space_that_no_run_could_read(tmp_path, capsys, content, message):
    space, out = tmp_path / "space.json", tmp_path / "out"
    space.write_bytes(content)
    assert main(["export", "kfac_reduce", f"--tuning_search_space={space}", f"--out={out}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not out.exists()


def test_a_byte_order_mark_is_not_exported(tmp_path):
    space = tmp_path / "space.json"
    space.write_bytes(b'\xef\xbb\xbf{"learning_rate": {"feasible_points": [1]}}')
    assert main(["export", "kfac_reduce", f"--tuning_search_space={space}", f"--out={tmp_path}"]) == 0
    written = (tmp_path / "external_tuning" / "kfac_reduce" / "tuning_search_space.json").read_bytes()
    assert json.loads(written.decode("utf-8")) == {"learning_rate": {"feasible_points": [1]}}


def test_an_older_algoperf_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.algoperf, "is_older", lambda: True)
    assert main(["export", "kfac_reduce", "--ruleset=self", f"--out={tmp_path}"]) == 0
    assert "the one installed here is older. The folder fits both." in capsys.readouterr().out


@pytest.mark.parametrize("framework", ["pytorch", "jax"])
@pytest.mark.parametrize("submission", NAMES)
def test_every_import_is_relative_and_leads_somewhere(submission, framework):
    files = contents_of(submission, framework, "self")
    assert "def update_params" in "".join(files.values())
    for path, text in files.items():
        if not path.endswith(".py"):
            continue
        package = path.split("/")[:-1]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] not in ("algoperf_kfac", "submissions") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] not in ("algoperf_kfac", "submissions", "workloads"), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= len(package) + 1, path
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
                candidates = ["/".join(base) + ".py", "/".join([*base, "__init__.py"])]
                assert any(c in files for c in candidates), (path, candidates)
    other = {"pytorch": "jax", "jax": "torch"}[framework]
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for text in (t for p, t in files.items() if p.endswith(".py"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert other not in imported


@pytest.mark.parametrize("framework", ["pytorch", "jax"])
@pytest.mark.parametrize("submission", NAMES)
def test_no_embedded_workload_is_named(submission, framework):
    text = "".join(contents_of(submission, framework, "external").values())
    assert not [name for name in registry.WORKLOADS if name in text]


@pytest.mark.parametrize("ruleset", ["external", "self"])
@pytest.mark.parametrize("submission", NAMES)
def test_files_and_facts(submission, ruleset):
    files = export.contents(submission, "pytorch", ruleset, authors='A "B" C', affiliations="D")
    assert files == export.contents(submission, "pytorch", ruleset, authors='A "B" C', affiliations="D")
    assert {
        "__init__.py",
        "submission.py",
        "submission_info.yml",
        "requirements.txt",
        "README.md",
        "LICENSE",
    } <= set(files)
    assert ("tuning_search_space.json" in files) == (ruleset == "external")
    info = dict(
        line.split(": ", 1) for line in files["submission_info.yml"].splitlines() if not line.startswith("#")
    )
    info = {key: json.loads(value) for key, value in info.items()}
    assert info["authors"] == 'A "B" C'
    assert info["ruleset"] == {"external": "external", "self": "self-tuning"}[ruleset]
    assert info["submission_folder"] == submission, "AlgoPerf's repository puts the rest before it"
    assert all(line.startswith("#") for line in files["requirements.txt"].splitlines())
    if ruleset == "external" and submission != "nadamw":
        assert len(json.loads(files["tuning_search_space.json"])) == 5


def folder_of(files: dict[str, str], folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_writing(tmp_path):
    folder = tmp_path / "self_tuning" / "kfac_reduce"
    files = contents_of("kfac_reduce", "pytorch", "self")
    for _ in range(2):  # an earlier export is replaced, with what Python left in it
        export.write(folder, files)
        assert folder_of(files, folder) == files
        (folder / "old_module.py").write_text("")
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "x.pyc").write_text("")
    assert [p.name for p in folder.parent.iterdir()] == ["kfac_reduce"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which no export wrote"):
        export.write(folder, files)
    assert (folder / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "self_tuning" / "other"
    foreign.mkdir()
    export.write(foreign, files)  # empty: fine
    (foreign / "submission_info.yml").write_text("submission_name: other\n")
    with pytest.raises(UserError, match="not an earlier export"):
        export.write(foreign, files)
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(UserError, match="is a file"):
        export.write(taken, files)
    with pytest.raises(UserError, match="cannot write"):
        export.write(taken / "below", files)


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "kfac_reduce"
    files = contents_of("kfac_reduce", "pytorch", "self")
    export.write(folder, files)
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        export.write(folder, files | {"more.txt": ""})
    assert folder_of(files, folder) == files
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("framework", ["pytorch", "jax"])
@pytest.mark.parametrize("ruleset", ["external", "self"])
def test_the_official_checker_passes_it(tmp_path, ruleset, framework):
    """Set ALGOPERF_CHECKOUT to a checkout of AlgoPerf: its wheel does not hold the checker."""
    checker = Path(os.environ.get("ALGOPERF_CHECKOUT", "nowhere")) / "algorithms/submission_checker.py"
    if not checker.is_file():
        pytest.skip("ALGOPERF_CHECKOUT does not name a checkout of AlgoPerf")
    spec = importlib.util.spec_from_file_location("submission_checker", checker)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / f"{ruleset}_tuning" / "kfac_reduce"
    export.write(folder, contents_of("kfac_reduce", framework, ruleset))
    assert module.run_checks(str(tmp_path))
    (folder / "submission.py").unlink()
    assert not module.run_checks(str(tmp_path))


def test_command(tmp_path, capsys):
    assert main(["export", "kfac_reduce", "--ruleset=self", f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "Fill in the authors" in out
    assert "--submission_path=self_tuning/kfac_reduce/submission.py" in out
    assert (tmp_path / "self_tuning/kfac_reduce/submission.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kfac_reduce"], "--out is missing"),
        (["--out=x"], "name one submission"),
        (["a", "b", "--out=x"], "name one submission"),
        (["adam", "--out=x"], "there is no submission 'adam' in pytorch; known: adamw, heavy_ball, kfac_"),
        (["kfac_reduce", "--out=x", "--ruleset=both"], "ruleset"),
        (["kfac_reduce", "--out=x", "--name=My-KFAC"], "--name=My-KFAC: a name is of lower-case letters"),
        (["kfac_reduce", "--out=x", "--name=class"], "--name=class"),
        (["kfac_reduce", "--out=x", "--name="], "--name=: a name is"),
        (["kfac_reduce", "--out=x", "--authors=A #1"], "the authors hold a #"),
        (["kfac_reduce", "--out=x", "--tuning_search_space=none.json"], "none.json: there is no such file"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())
