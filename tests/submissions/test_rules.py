"""AlgoPerf's rules as far as code can be checked: nothing a submission does depends on which workload it is."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from algoperf_kfac import pace
from submissions.cli import vendoring
from submissions.common import batch_sizes
from workloads import registry

CHECKOUT = Path(__file__).resolve().parents[2]
SUBMISSIONS = ("kfac_expand", "kfac_reduce", "nadamw")
FRAMEWORKS = ("pytorch", "jax")
REFERENCES = [
    *((name, "pytorch") for name in ("adamw", "heavy_ball", "muon", "schedule_free_adamw", "shampoo", "soap")),
    ("adamw", "jax"),
]

# What may be asked of a workload: what the technical documentation hands to every submission.
ALLOWED = {
    "init_model_fn",
    "is_output_params",
    "loss_fn",
    "loss_type",
    "metrics_logger",
    "model_fn",
    "model_params_types",
    "max_allowed_runtime_sec",
    "step_hint",
}
NAMES = {
    *batch_sizes.SCORED,
    *batch_sizes.UNSCORED,
    *registry.WORKLOADS,
    "finewebedu_lm",
    "librispeech",
    "imagenet",
}
IDENTITY = {"__class__", "__qualname__", "__module__", "workload_name", "_workload_name"}
INSPECTORS = {"type", "isinstance", "getattr", "hasattr", "vars", "dir", "repr", "str", "id", "hash"}


def violations(source: str, *, may_name_workloads: bool = False) -> list[str]:
    """What in a module could tell one workload from another.

    Args:
        source: the module's text.
        may_name_workloads: whether it holds the batch sizes, the one thing that may be looked up by name.
    """
    tree = ast.parse(source)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    excused: set[int] = set()
    if may_name_workloads:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "get_batch_size":
                excused |= {id(inner) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            bare = node.value.lower().replace("_", "")
            named = [name for name in sorted(NAMES) if node.value == name or name.replace("_", "") in bare]
            if named and not may_name_workloads:
                found.append(f"line {line}: names {named[0]}")
        elif isinstance(node, ast.Attribute) and _is_workload(node.value) and node.attr not in ALLOWED:
            found.append(f"line {line}: reads workload.{node.attr}")
        elif isinstance(node, ast.Attribute) and node.attr in IDENTITY:
            found.append(f"line {line}: reads {node.attr}")
        elif isinstance(node, ast.Name | ast.arg) and id(node) not in excused:
            name = node.id if isinstance(node, ast.Name) else node.arg
            if name in IDENTITY:
                found.append(f"line {line}: uses {name}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in INSPECTORS:
            if any(_is_workload(argument) for argument in node.args) and not _reads_allowed(node):
                found.append(f"line {line}: {node.func.id}(workload)")
        elif isinstance(node, ast.FormattedValue) and _is_workload(node.value):
            found.append(f"line {line}: formats workload")
    return found


def _reads_allowed(call: ast.Call) -> bool:
    """Whether a call is getattr(workload, "name", ...) with an allowed name, an attribute with a default."""
    name = call.args[1] if len(call.args) > 1 else None
    by_name = isinstance(call.func, ast.Name) and call.func.id == "getattr"
    return by_name and isinstance(name, ast.Constant) and name.value in ALLOWED


def _is_workload(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id in ("workload", "_workload")) or (
        isinstance(node, ast.Attribute) and node.attr in ("workload", "_workload")
    )


def submitted() -> list[Path]:
    """Every file of the library, and every file of a submission."""
    paths = set((CHECKOUT / "algoperf_kfac").rglob("*.py"))
    tools = (CHECKOUT / "submissions" / "cli", CHECKOUT / "submissions" / "__main__.py")
    for path in (CHECKOUT / "submissions").rglob("*.py"):
        if not any(path.is_relative_to(tool) for tool in tools):
            paths.add(path)
    return sorted(paths)


@pytest.mark.parametrize("path", submitted(), ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_module_can_tell_workloads_apart(path):
    sizes = Path(batch_sizes.__file__).resolve()
    assert not violations(path.read_text(), may_name_workloads=path.resolve() == sizes)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("submission", SUBMISSIONS)
def test_what_is_exported_was_checked(submission, framework):
    checked = {path.read_text() for path in submitted()}
    for path in vendoring.sources(f"submissions.{submission}.{framework}.submission"):
        assert path.read_text() in checked, path


@pytest.mark.parametrize(
    "code",
    [
        "x = 'wmt'",
        "x = {'ogbg': 1}",
        "x = 'OgbgWorkload'",
        "x = 'librispeech_conformer_gelu'",
        "type(workload)",
        "type(self._workload).__name__",
        "isinstance(workload, Base)",
        "workload.__class__",
        "getattr(workload, name)",
        "getattr(workload, 'num_train_examples', 0)",
        "hasattr(workload, 'step_hint')",
        "x = f'{workload}'",
        "def f(workload_name): pass",
        "workload.num_train_examples",
        "self.workload.validation_target_value",
    ],
)
def test_the_check_finds(code):
    assert violations(code)


def test_the_check_lets_pass():
    assert not violations(
        '"""Like wmt."""\nworkload.model_fn(params)\ny = workload.step_hint, type(module).__name__'
    )
    assert violations("def f(workload_name): return 1", may_name_workloads=True)
    sizes = "def get_batch_size(workload_name): return {'wmt': 1}[workload_name]"
    assert not violations(sizes, may_name_workloads=True)
    assert violations(sizes)


class Toy:
    """Two layers with shared weights, in both frameworks; what differs between workloads is set from outside."""

    metrics_logger = None
    target_metric_name = "accuracy"
    num_train_examples = 10

    def __init__(self, framework: str, step_hint: int = 30) -> None:
        self.framework, self.step_hint = framework, step_hint
        kind = importlib.import_module("submissions.common.spec").LossType
        self.loss_type = kind.SOFTMAX_CROSS_ENTROPY

    @property
    def model_params_types(self):
        kind = importlib.import_module("submissions.common.spec").ParameterType.WEIGHT
        return dict.fromkeys(("0.weight", "2.weight") if self.framework == "pytorch" else ("a", "b"), kind)

    def is_output_params(self, param_key):
        return param_key in ("2.weight", "b")

    def init_model_fn(self, rng):
        return self.parameters(), None

    def parameters(self):
        rng = np.random.default_rng(0)
        arrays = {n: rng.standard_normal(s).astype("f") for n, s in (("a", (6, 9)), ("b", (9, 4)))}
        if self.framework == "jax":
            jnp = importlib.import_module("jax.numpy")
            return {name: jnp.asarray(a) for name, a in arrays.items()}
        torch = importlib.import_module("torch")
        layers = [torch.nn.Linear(*a.shape, bias=False) for a in arrays.values()]
        for layer, a in zip(layers, arrays.values(), strict=True):
            layer.weight.data = torch.tensor(a.T.copy())
        return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])

    def batch(self):
        rng = np.random.default_rng(1)
        batch = {"inputs": rng.standard_normal((16, 5, 6)).astype("f"), "targets": rng.integers(0, 4, 16)}
        if self.framework == "jax":
            return batch
        torch = importlib.import_module("torch")
        return {key: torch.tensor(value) for key, value in batch.items()}

    def model_fn(
        self,
        params,
        augmented_and_preprocessed_input_batch,
        model_state,
        mode,
        rng,
        update_batch_norm,
        dropout_rate=0.0,
    ):
        x = augmented_and_preprocessed_input_batch["inputs"]
        if self.framework == "pytorch":
            return params(x).mean(1), None
        jnp = importlib.import_module("jax.numpy")
        return (jnp.tanh(x @ params["a"]) @ params["b"]).mean(1), None

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        if self.framework == "pytorch":
            torch = importlib.import_module("torch")
            loss = torch.nn.functional.cross_entropy(logits_batch, label_batch, reduction="none")
            return {"summed": loss.sum(), "n_valid_examples": torch.tensor(len(loss)), "per_example": loss}
        optax = importlib.import_module("optax")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits_batch, label_batch)
        return {"summed": loss.sum(), "n_valid_examples": len(loss), "per_example": loss}


class OgbgWorkload(Toy):
    """The same problem under a name, with attributes, of another."""

    target_metric_name = "mean_average_precision"
    num_train_examples = 350_343
    validation_target_value = 0.28098
    max_allowed_runtime_sec = 12_011
    workload_name = "ogbg"
    __module__ = "algoperf.workloads.ogbg.ogbg_pytorch.workload"


def trajectory(submission: str, workload: Toy, steps: int = 8) -> list[bytes]:
    """The parameters after every step, bit for bit."""
    module = importlib.import_module(f"submissions.{submission}.{workload.framework}.submission")
    rng = np.array([1, 2], np.int32)
    if workload.framework == "jax":
        rng = importlib.import_module("jax").random.PRNGKey(3)
    else:
        importlib.import_module("torch").manual_seed(0)
    params = workload.parameters()
    state, model_state = module.init_optimizer_state(workload, params, None, None, rng), None
    history = []
    for step in range(steps):
        common = {
            "workload": workload,
            "current_param_container": params,
            "current_params_types": None,
            "model_state": model_state,
            "hyperparameters": None,
            "loss_type": workload.loss_type,
            "optimizer_state": state,
            "eval_results": [(0, {f"validation/{workload.target_metric_name}": 0.1})],
            "global_step": step,
            "rng": rng,
        }
        state, params, model_state = module.update_params(batch=workload.batch(), train_state={}, **common)
        leaves = params.values() if isinstance(params, dict) else [p.detach() for p in params.parameters()]
        history.append(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
    return history


@pytest.mark.parametrize(
    ("submission", "framework"), [*((name, fw) for fw in FRAMEWORKS for name in SUBMISSIONS), *REFERENCES]
)
def test_names_and_attributes_change_nothing(submission, framework, monkeypatch):
    pytest.importorskip({"pytorch": "torch", "jax": "jax"}[framework])
    monkeypatch.setattr(pace, "now", functools.partial(next, itertools.count()))  # what a clock says does matter
    plain = trajectory(submission, Toy(framework))
    assert plain == trajectory(submission, OgbgWorkload(framework))
    assert len(set(plain)) == len(plain)
    assert plain != trajectory(submission, Toy(framework, step_hint=60)), "the step hint may and does matter"


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("submission", SUBMISSIONS)
def test_the_contract(submission, framework):
    pytest.importorskip({"pytorch": "torch", "jax": "jax"}[framework])
    module = importlib.import_module(f"submissions.{submission}.{framework}.submission")
    for name in batch_sizes.SCORED:
        size = module.get_batch_size(name)
        assert size > 0
        assert size % 8 == 0, "divides over the 8 GPUs of the benchmark"
    with pytest.raises(ValueError, match="no batch size"):
        module.get_batch_size("wmt_post_ln")  # the runner then asks for wmt
    assert next(iter([1])) == module.data_selection(None, iter([1]), *[None] * 5, rng=None)
    triple = module.prepare_for_eval(*[SimpleNamespace()] * 3, 5, None, None, "state", [], 0, None)
    assert triple[0] == "state"
    assert triple[2] == 5
    assert not hasattr(module, "get_eval_batch_size"), "the size of evaluation batches is the benchmark's"
