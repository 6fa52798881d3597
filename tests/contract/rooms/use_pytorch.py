"""Uses the toy scaling and the toy kind in PyTorch; run by test_rooms, which adds them to a copy of the library."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import algoperf_kfac
from algoperf_kfac import KFACConfig, plan
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.factors import to_matrix
from benchmarks.official.gradient_check import CapturedGradients

OPTIONS = {"factor_interval": 2, "initial_statistics": 1, "refresh_interval": 2, "learning_rate": 1e-2}
X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 4)
        self.pairs, self.head = nn.Bilinear(3, 4, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.pairs(self.left(x), self.right(x))))


def step(model: nn.Module, optimizer: KFAC) -> float:
    optimizer.zero_grad()
    with optimizer.capture(loss_normalizer=1.0):
        loss = (model(X.to(next(model.parameters()).dtype)) - 0.3).square().sum()
        loss.backward()
    optimizer.step()
    return loss.item()


def made(seed: int, **options: object) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(seed)
    model = Model().double()
    return model, KFAC(model, **{**OPTIONS, **options})


def the_scaling_trains_and_resumes() -> None:
    model, optimizer = made(0, scaling="smoothed")
    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0], losses
    states = optimizer._layers.states
    assert all(state.kept["steps"] == 5 and state.kept["average"].any() for state in states.values()), states
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again, loaded = made(1, scaling="smoothed")
    again.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for _ in range(3):
        assert step(model, optimizer) == step(again, loaded)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def the_plan_counts_it() -> None:
    toy, power = (plan(Model(), X.float(), config=KFACConfig(**OPTIONS, scaling=s)) for s in ("smoothed", "power"))
    for ours, theirs in zip(toy.layers, power.layers, strict=True):
        assert ours.preconditioning == theirs.preconditioning + 3 * ours.spec.num_parameters
        assert ours.refresh == theirs.refresh
    assert toy.memory.kfac_state == power.memory.kfac_state + 4 * toy.coverage.num_covered
    model = Model()
    optimizer = KFAC(model, config=toy.config)
    step(model, optimizer)
    kept = [t for entry in optimizer.state_dict()["kfac"]["layers"].values() for t in tensors(entry["state"])]
    assert sum(t.nbytes for t in kept) + 4 == toy.memory.kfac_state  # 4: replaced directions, counted on the device


def the_kind_is_covered() -> None:
    model, optimizer = made(0)
    layer = next(spec for spec in optimizer.coverage().layers if spec.name == "pairs")
    assert (layer.kind, layer.in_dim, layer.out_dim, layer.bias) == ("bilinear", 12, 7, "pairs.bias"), layer
    assert optimizer.coverage().fraction == 1
    (seen,) = (la for la in plan(model.float(), X.float()).layers if la.spec.name == "pairs")
    assert (seen.load.examples, seen.load.positions, seen.load.input_elements) == (6, 3, 6 * 3 * 12), seen.load
    assert seen.statistics > 0
    assert seen.model == 6 * 18 * 12 * 7


def its_approximation_is_its_own() -> None:
    coverage = made(0, approximation={"bilinear": "reduce"})[1].coverage()
    found = {spec.kind: spec.approximation for spec in coverage.layers}
    assert found == {"linear": "expand", "bilinear": "reduce"}, found


def its_factors_are_right() -> None:
    for approximation in ("expand", "reduce"):
        model, optimizer = made(0, approximation=approximation)
        products, seen = CapturedGradients(), {}
        model.pairs.register_forward_hook(lambda _, inputs, out, seen=seen: seen.update(inputs=inputs, out=out))
        with products.listening(), optimizer.capture(loss_normalizer=1.0):
            loss = (model(X) - 0.3).square().sum()
            seen["out"].retain_grad()
            loss.backward()
        errors, _ = products.errors(model)
        assert set(errors) == {"left", "right", "pairs", "head"}, errors
        assert max(errors.values()) < 1e-12, errors
        optimizer.step()
        x, y = (t.detach() for t in seen["inputs"])
        rows = torch.cat([torch.einsum("nri,nrj->nrij", x, y).flatten(2), torch.ones(6, 3, 1).double()], -1)
        g = seen["out"].grad
        if approximation == "reduce":
            rows, g = rows.mean(1, keepdim=True), g.sum(1, keepdim=True)
        a = torch.einsum("nri,nrj->ij", rows, rows) / (rows.shape[0] * rows.shape[1])
        b = torch.einsum("nri,nrj->ij", g, g)
        pair = optimizer.factors()["pairs"]
        torch.testing.assert_close(pair.A, a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair.B, b, rtol=1e-10, atol=1e-12)


def its_direction_is_right() -> None:
    """A step of the K-FAC form written out: D = (B + l_B I)^-1 G (A + l_A I)^-1."""
    options = {"preconditioner": "inverse", "grafting": False, "damping_mode": "absolute", "damping": 1e-2}
    model, optimizer = made(0, **options, one_minus_beta1=1.0)
    before = [p.detach().clone() for p in (model.pairs.weight, model.pairs.bias)]
    step(model, optimizer)
    a, b = optimizer.factors(reduction="mean")["pairs"]
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    spec = next(spec for spec in optimizer.coverage().layers if spec.name == "pairs")
    gradient = to_matrix(model.pairs.weight.grad, model.pairs.bias.grad, spec)[0]
    inverses = [torch.linalg.inv(m + d * torch.eye(len(m)).double()) for m, d in ((a, pi * 0.1), (b, 0.1 / pi))]
    moved = [p.detach() - q for p, q in zip((model.pairs.weight, model.pairs.bias), before, strict=True)]
    direction = to_matrix(*moved, spec)[0] / -OPTIONS["learning_rate"]
    torch.testing.assert_close(direction, inverses[1] @ gradient @ inverses[0], rtol=1e-8, atol=1e-10)


def tensors(values: object) -> list[Tensor]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, Tensor):
        return [values]
    return list(itertools.chain(*map(tensors, values))) if isinstance(values, list | tuple) else []


if __name__ == "__main__":
    assert Path(algoperf_kfac.__file__).is_relative_to(sys.argv[1]), algoperf_kfac.__file__
    torch.set_num_threads(1)
    the_scaling_trains_and_resumes()
    the_plan_counts_it()
    the_kind_is_covered()
    its_approximation_is_its_own()
    its_factors_are_right()
    its_direction_is_right()
