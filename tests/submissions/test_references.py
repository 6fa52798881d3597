"""The reference submissions in PyTorch, and the adapter they are made with."""

from __future__ import annotations

import copy
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from commands.errors import UserError
from submissions import registry
from submissions.cli import export
from submissions.common import packages
from submissions.common.description import describe
from submissions.common.from_torch import Several, from_torch
from submissions.common.hyperparameters import POSITIVE, TrainingConfig, names_of
from submissions.common.packages import MissingPackage, Package
from submissions.common.parameters import Parameters, parameters_of
from submissions.common.schedule import constant_after_warmup
from submissions.common.spec import LossType, ParameterType
from submissions.shampoo.pytorch.optimizer import Shampoo, blocks, inverse_root, merged
from tests.workloads.helpers import arguments, copied_checkout
from workloads import study
from workloads.runner import submission as loader
from workloads.runner import tuning

CHECKOUT = Path(__file__).resolve().parents[2]
SUITE = CHECKOUT / "tuning_search_spaces/suite"
NAMES = ("adamw", "heavy_ball", "muon", "nesterov", "schedule_free_adamw", "shampoo", "soap")


class Toy:
    """Symbols to classes: a table, a convolution, batch norm, a hidden layer and an output layer."""

    step_hint = 40
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    metrics_logger = None
    model_params_types = {"tables.0": ParameterType.EMBEDDING}  # noqa: RUF012

    def model(self):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {
                "symbols": nn.Embedding(11, 6),
                "convolution": nn.Conv1d(6, 8, 3),
                "norm": nn.BatchNorm1d(8),
                "hidden": nn.Linear(8, 7),
                "head": nn.Linear(7, 4),
                "tables": nn.ParameterList([nn.Parameter(torch.randn(11, 6))]),
            }
        )
        model.token = nn.Parameter(torch.zeros(1, 5, 6))
        return model

    def batch(self, step):
        generator = torch.Generator().manual_seed(step % 4)
        inputs = torch.randint(0, 11, (24, 5), generator=generator)
        return {"inputs": inputs, "targets": inputs.sum(1) // 14}

    def is_output_params(self, name):
        return name.startswith("head.") or None  # as where AlgoPerf's own have no answer

    def model_fn(
        self,
        params,
        augmented_and_preprocessed_input_batch,
        model_state,
        mode,
        rng,
        update_batch_norm,
        dropout_rate=0,
    ):
        inputs = augmented_and_preprocessed_input_batch["inputs"]
        x = params["symbols"](inputs) + params["tables"][0][inputs] + params.token
        x = params["norm"](params["convolution"](x.transpose(1, 2))).relu().mean(2)
        return params["head"](params["hidden"](x).relu()), model_state

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        loss = nn.functional.cross_entropy(logits_batch, label_batch, reduction="none")
        return {"summed": loss.sum(), "n_valid_examples": torch.tensor(len(loss)), "per_example": loss}


def start(submission, point=None):
    model = Toy().model()
    return model, submission.init_optimizer_state(Toy(), model, None, point, [0, 0])


def train(submission, model, state, steps, first=0, point=None, evaluate_every=3):
    """Steps with evaluations between them; returns the losses at the parameters evaluated at."""
    losses = []
    common = {
        "workload": Toy(),
        "current_param_container": model,
        "current_params_types": None,
        "model_state": None,
        "hyperparameters": point,
        "loss_type": None,
        "optimizer_state": state,
        "eval_results": [],
        "rng": [0, 0],
    }
    for step in range(first, first + steps):
        submission.update_params(batch=Toy().batch(step), global_step=step, **common)
        if (step + 1) % evaluate_every == 0:
            submission.prepare_for_eval(global_step=step, **common)
            model.eval()
            with torch.no_grad():
                batch = Toy().batch(0)
                losses.append(
                    nn.functional.cross_entropy(Toy().model_fn(model, batch, *[None] * 4)[0], batch["targets"])
                )
    return losses


def load(name):
    return importlib.import_module(f"submissions.{name}.pytorch.submission")


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_resumes_bit_for_bit(name):
    submission = load(name)
    model, state = start(submission)
    losses = train(submission, model, state, 15)
    assert losses[-1] < losses[0] - 0.05
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), **{key: value.state_dict() for key, value in state.items()}}, saved)
    losses = train(submission, model, state, 15, first=15)
    other, other_state = start(submission)
    saved.seek(0)
    content = torch.load(saved, weights_only=True)
    other.load_state_dict(content.pop("model"))
    for key, value in other_state.items():
        value.load_state_dict(content[key])
    assert train(submission, other, other_state, 15, first=15) == losses
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_its_hyperparameters_are_checked(name):
    submission = load(name)
    assert loader.load(submission.__file__).get_batch_size("mnist_vit") == 128
    for point, message in [
        ({"learning_rate": 0.0}, "learning_rate=0.0: allowed is a number > 0"),
        ({"one_minus_beta1": 1.5}, "one_minus_beta1=1.5: allowed is"),
        ({"horizon_factor": -1}, "horizon_factor=-1"),
        ({"dampning": 1e-3}, "unknown hyperparameter 'dampning': known are"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(submission, point)


@pytest.mark.parametrize("path", sorted(SUITE.glob("*.json")), ids=lambda path: path.stem)
def test_spaces_of_the_suite_leave_the_same_freedom(path):
    space = json.loads(path.read_text())
    assert space["horizon_factor"] == {"feasible_points": [0.35, 0.5, 0.75, 1.0]}
    described = registry.describe(path.stem, "pytorch")
    for point in tuning.read_points(str(path), 8):
        described.configure(point)
    rate = space["learning_rate"]
    assert 9 < rate["max"] / rate["min"] < 34
    free = [name for name, entry in space.items() if len(entry.get("feasible_points", (0, 0))) > 1]
    if registry.is_kfac(path.stem, "pytorch"):
        assert free == ["learning_rate", "horizon_factor"]
    else:
        assert len(free) == 7 - ("beta2" not in described.defaults)


def test_every_submission_has_a_space_in_the_suite():
    assert {path.stem for path in SUITE.glob("*.json")} == {
        *registry.names_in("pytorch"),
        *registry.names_in("jax"),
    }


# The adapter.


def test_parameters_are_sorted_by_role():
    sorted_ = parameters_of(Toy().model(), Toy())
    model = Toy().model()
    names = {tuple(p.shape): name for name, p in model.named_parameters()}
    found = {role: [names[tuple(p.shape)] for p in getattr(sorted_, role)] for role in vars(sorted_)}
    assert found["matrices"] == ["convolution.weight", "hidden.weight"]
    assert [tuple(p.shape) for p in sorted_.embeddings] == [(11, 6), (11, 6)]
    assert found["head"] == ["head.weight", "head.bias"]
    assert len(sorted_.vectors) == 5
    assert "token" in found["vectors"]
    assert len(sorted_.all) == len(list(model.parameters()))


def test_rates_of_groups_follow_the_schedule_and_several_optimizers_are_one():
    def make(parameters, point):
        rest = [{"params": parameters.head, "lr": 7.0}, {"params": parameters.vectors}]
        return [torch.optim.Adam(parameters.matrices, lr=point.learning_rate), torch.optim.SGD(rest, lr=1.0)]

    submission = from_torch(
        title="Two",
        text="Two.",
        hyperparameters={"learning_rate": (0.5, POSITIVE)},
        training={"warmup_factor": 0.25},
        make=make,
    )
    model, state = start(submission)
    assert isinstance(state["optimizer"], Several)
    train(submission, model, state, 1)
    assert [group["lr"] for group in state["optimizer"].param_groups] == pytest.approx([0.05, 0.7, 0.1])
    other = start(submission)[1]["optimizer"]
    other.load_state_dict(copy.deepcopy(state["optimizer"].state_dict()))
    assert [group["initial_lr"] for group in other.param_groups] == [0.5, 7.0, 1.0]
    assert other.state_dict()["0"]["state"][0]["step"] == 1


def test_constant_schedule_warms_up_as_the_other():
    factors = [constant_after_warmup(40, 0.5, 0.2, step) for step in range(30)]
    assert factors == [0.25, 0.5, 0.75, *[1.0] * 27]
    assert constant_after_warmup(40, 1.0, 0.0, 0) == 1.0


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="Lazy declares no hyperparameter 'learning_rate'"):
        describe("Lazy", "", {})
    with pytest.raises(ValueError, match="declares the hyperparameter 'grad_clip', which the training reads"):
        describe("Twice", "", {"learning_rate": (1.0, POSITIVE), "grad_clip": (1.0, POSITIVE)})
    with pytest.raises(ValueError, match="learning_rate=-1"):
        describe("Wrong", "", {"learning_rate": (-1.0, POSITIVE)})
    described = describe("Fine", "", {"learning_rate": (1.0, POSITIVE)}, {"grad_clip": 2.0})
    assert set(described.defaults) == {"learning_rate", *names_of(TrainingConfig)}
    assert described.configure(None)[0].grad_clip == 2.0


# Missing packages.


def test_packages_are_found_by_release(monkeypatch):
    assert Package("torch", "2.5", "").is_installed()
    assert not Package("torch", "99.1", "").is_installed()
    assert not Package("no_such_package", "1.0", "").is_installed()
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda _: "2.10.0rc1+cpu")
    assert Package("torch", "2.9.5", "").is_installed()
    with pytest.raises(
        MissingPackage, match=r"^X needs torch 2\.11, which is not installed\. Run: pip install 'torch==2\.11'$"
    ):
        packages.require([Package("torch", "2.11", "")], "X")


def test_commands_name_the_pip_line_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Package, "is_installed", lambda self: False)
    for name in list(sys.modules):
        if name.startswith("submissions.soap."):
            monkeypatch.delitem(sys.modules, name)
    line = (
        r"SOAP needs pytorch_optimizer 4\.1\.0, which is not installed\. Run: pip install 'pytorch_optimizer==.*'"
    )
    for action in (
        lambda: loader.load(str(CHECKOUT / "submissions/soap/pytorch/submission.py")),
        lambda: registry.load("soap", "pytorch"),
        lambda: export.contents("soap", "pytorch", "external"),
    ):
        with pytest.raises(UserError, match=f"^{line}$"):
            action()
    assert study.main(["--submissions=adamw,soap", f"--experiment_dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err.startswith("error: SOAP needs pytorch_optimizer 4.1.0")
    assert not (tmp_path / "runs").exists()


# Exports.


def test_exports_say_what_they_are_and_need():
    files = export.contents("shampoo", "pytorch", "external")
    assert "Nothing is needed beyond" in files["requirements.txt"]
    assert "shampoo/pytorch/optimizer.py" in files
    assert files["tuning_search_space.json"] == (SUITE / "shampoo.json").read_text()
    files = export.contents("soap", "pytorch", "self")
    assert "\npytorch_optimizer==4.1.0  # " in files["requirements.txt"]
    assert files["README.md"].startswith("# SOAP\n\nSOAP (Vyas et al., 2024")
    assert "`pytorch_optimizer==4.1.0`" in files["README.md"]
    assert not [name for name, text in files.items() if "kfac_reduce" in text or name.startswith("common/kfac")]


def test_an_optimizer_of_ones_own_is_the_file_of_the_documents(tmp_path):
    text = (CHECKOUT / "docs/references.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    root = copied_checkout(tmp_path / "checkout")
    path = root / "submissions/my_adagrad/pytorch/submission.py"
    path.parent.mkdir(parents=True)
    path.write_text(snippet)
    changes = {"workload": "mnist_vit", "submission_path": path.relative_to(root), "max_global_steps": 1}
    flags = arguments(tmp_path, **changes)
    script = f"""
import sys
from submissions.__main__ import main as export
from workloads import run
assert run.main({flags}) == 0
sys.exit(export(["export", "my_adagrad", "--ruleset=self", "--out={tmp_path}"]))
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "e/mnist_vit_pytorch/trial_1/outcome.json").is_file()
    assert (tmp_path / "self_tuning/my_adagrad/README.md").read_text().startswith("# My Adagrad\n")


# Oracles.


def gradients(shape, steps):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def root(matrix, order):
    """The inverse root by singular values, which the optimizer does not use."""
    u, s, v = torch.linalg.svd(matrix)
    return u @ torch.diag(s ** (-1 / order)) @ v


def test_shampoo_is_that_of_the_papers():
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}
    optimizer = Shampoo([parameter], **options, precondition_frequency=2, max_dim=4)
    expected = parameter.detach().clone()
    left, right, m, v = 0, 0, 0, 0
    for step, g in enumerate(gradients((3, 4), 5), 1):
        parameter.grad = g.clone()
        optimizer.step()
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        if step in (1, 3, 5):
            roots = [root(f / (1 - 0.9**step) + 1e-3 * torch.eye(len(f)), 4) for f in (left, right)]
        s = roots[0] @ (m / (1 - 0.8**step)) @ roots[1]
        adam = m / (1 - 0.8**step) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * s * adam.norm() / s.norm()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_shampoo_keeps_the_length_of_adam_block_by_block():
    parameter, other = nn.Parameter(torch.zeros(5, 3, 2)), nn.Parameter(torch.zeros(5, 3, 2))
    optimizer = Shampoo([parameter], lr=1.0, max_dim=3)
    adam = torch.optim.Adam([other], lr=1.0)
    for g in gradients((5, 3, 2), 3):
        parameter.grad, other.grad = g.float(), g.float()
        before, other_before = parameter.detach().clone(), other.detach().clone()
        optimizer.step()
        adam.step()
        steps = [p.detach() - b for p, b in ((parameter, before), (other, other_before))]
        pairs = list(zip(*(blocks(step, 3) for step in steps), strict=True))
        assert len(pairs) == 2
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(*steps, atol=0.05)


def test_shampoo_bears_what_cannot_be_decomposed(monkeypatch):
    eigh, given = torch.linalg.eigh, []

    def failing(matrix):
        given.append(matrix.dtype)
        values, vectors = eigh(matrix)
        return (values, vectors * torch.nan) if matrix.dtype == torch.float32 else (values, vectors)

    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    expected = inverse_root(matrix, 2, 1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    torch.testing.assert_close(inverse_root(matrix, 2, 1e-4), expected)
    assert given == [torch.float32, torch.float64]
    assert inverse_root(matrix * torch.nan, 2, 1e-4) is None
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = Shampoo([parameter], precondition_frequency=1)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    before = optimizer.state[parameter]["roots"][0][0].clone()
    parameter.grad = torch.full((3, 4), torch.nan)
    optimizer.step()  # a run that diverged goes on, and is seen to have
    assert torch.equal(optimizer.state[parameter]["roots"][0][0], before)


def test_shapes_are_merged_up_to_the_largest_side():
    assert merged((64, 3, 3, 3), 1024) == [576, 3]
    assert merged((64, 32, 3, 3), 1024) == [64, 288]
    assert merged((7,), 4) == [7]
    assert merged((1, 1), 4) == [1]


def test_soap_is_adam_in_the_eigenbasis():
    from pytorch_optimizer import SOAP

    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = SOAP([parameter], lr=0.1, betas=(0.8, 0.9), weight_decay=0.0, precondition_frequency=100)
    first, *rest = gradients((3, 4), 4)
    parameter.grad = first.clone()
    optimizer.step()
    assert torch.equal(
        parameter.detach(), torch.ones(3, 4, dtype=torch.float64)
    )  # the first gradient gives the basis
    left, right = (torch.linalg.eigh(0.1 * side)[1] for side in (first @ first.T, first.T @ first))
    expected, m, v = parameter.detach().clone(), 0, 0
    for step, g in enumerate(rest, 1):
        parameter.grad = g.clone()
        optimizer.step()
        rotated = left.T @ g @ right
        m, v = 0.8 * m + 0.2 * rotated, 0.9 * v + 0.1 * rotated**2
        d = m / (1 - 0.8**step) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        expected -= 0.1 * left @ d @ right.T
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_soap_has_no_basis_of_a_vocabulary():
    submission = load("soap")
    model, state = start(submission)
    train(submission, model, state, 1)
    bases = {
        name: [len(q) for q in value["Q"]]
        for name, parameter in model.named_parameters()
        if "Q" in (value := state["optimizer"].state[parameter])
    }
    assert bases["symbols.weight"] == bases["tables.0"] == [0, 6]  # (11, 6)
    assert bases["hidden.weight"] == [7, 8]
    assert bases["head.weight"] == [4, 7]


def test_muon_is_that_of_torch():
    ours = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    module = load("muon")
    _, point = module.DESCRIPTION.configure({"learning_rate": 0.02, "one_minus_beta1": 0.1})
    optimizer = module.make(Parameters(ours[:2], [], [], ours[2:]), point)
    muon = torch.optim.Muon(theirs[:2], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[2:], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        for a, b, g in zip(ours, theirs, [gradients(p.shape, 3)[step].float() for p in ours], strict=True):
            a.grad, b.grad = g.clone(), g.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_schedule_free_trains_and_evaluates_at_different_points():
    submission = load("schedule_free_adamw")
    model, state = start(submission)
    train(submission, model, state, 4, evaluate_every=100)
    trained = copy.deepcopy(model.state_dict())
    common = (Toy(), model, None, None, None, None, state, [], 4, [0, 0])
    submission.prepare_for_eval(*common)
    evaluated = copy.deepcopy(model.state_dict())
    assert not torch.equal(trained["hidden.weight"], evaluated["hidden.weight"])
    assert not torch.equal(trained["norm.running_mean"], evaluated["norm.running_mean"])
    submission.prepare_for_eval(*common)  # a second evaluation sees the same
    assert all(torch.equal(evaluated[name], value) for name, value in model.state_dict().items())
    state["optimizer"].train()
    torch.testing.assert_close(model.state_dict()["hidden.weight"], trained["hidden.weight"])
