"""metrics(), the schedule of statistics and refreshes, and decompositions that fail."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from algoperf_kfac.pytorch import KFAC
from tests.pytorch.toys import Patches, assert_finite, images, mlp, train, vectors

TOTALS = {
    "steps",
    "coverage",
    "missed_layers",
    "stand_ins",
    "refreshes",
    "refresh_interval",
    "failures",
    "skipped",
    "dropped",
    "vanished",
    "idle",
    "noise",
    "graft_ratio",
    "cosine",
}
EACH = {
    *("refreshes", "failures", "skipped", "dropped", "vanished", "idle", "noise"),
    *("drift", "gradient_error", "graft_ratio", "cosine"),
}
EVERY_STEP: dict[str, Any] = {"factor_interval": 1, "refresh_interval": 1, "initial_refreshes": "every"}
LATER = {"graft_ratio", "cosine", "gradient_error"}  # after the first step


def test_keys() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model)
    assert set(optimizer.metrics()) == TOTALS - LATER | {
        f"{layer}/{key}" for layer in ("0", "2") for key in EACH - LATER
    }
    train(model, optimizer, [vectors()])
    metrics = optimizer.metrics()
    assert set(metrics) == TOTALS | {f"{layer}/{key}" for layer in ("0", "2") for key in EACH}
    assert all(type(value) is float for value in metrics.values())
    assert metrics["steps"] == 1
    assert metrics["refreshes"] == 2
    assert metrics["coverage"] == 1


def directions(model: torch.nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> tuple[KFAC, Tensor, Tensor]:
    """After one step of learning rate 1: the optimizer, and gradient and step of layer 0 as vectors."""
    start = [p.detach().clone() for p in model[0].parameters()]
    optimizer = KFAC(model, learning_rate=1.0, **options)
    train(model, optimizer, [batch])
    gradient = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    step = torch.cat([(q - p.detach()).flatten() for p, q in zip(model[0].parameters(), start, strict=True)])
    return optimizer, gradient, step


def test_meaning_of_graft_ratio_and_cosine() -> None:
    """On the first step the NadamW update is the gradient's sign, so that its norm is known."""
    batch = vectors()
    torch.manual_seed(1)
    optimizer, gradient, step = directions(mlp(5, 4, 3), batch)
    metrics = optimizer.metrics()
    assert metrics["0/cosine"] == pytest.approx(float(torch.cosine_similarity(gradient, step, 0)), abs=1e-5)
    assert 0 < metrics["0/cosine"] < 0.999
    # Nesterov on the first step: (beta1 (1 - beta1) + (1 - beta1)) / (1 - beta1) = 1.9 times the gradient.
    length = 1.9 * len(gradient) ** 0.5
    assert float(step.norm()) == pytest.approx(length, rel=1e-4)
    torch.manual_seed(1)
    plain, _, ungrafted = directions(mlp(5, 4, 3), batch, grafting=False)
    assert metrics["0/graft_ratio"] == pytest.approx(length / float(ungrafted.norm()), rel=1e-4)
    assert "graft_ratio" not in plain.metrics()
    assert metrics["graft_ratio"] == pytest.approx((metrics["0/graft_ratio"] + metrics["2/graft_ratio"]) / 2)


def test_statistics_and_refreshes_keep_their_intervals() -> None:
    """Once the statistics are no longer young, each layer is refreshed once per interval, not all at once."""
    model = Patches()
    optimizer = KFAC(model, factor_interval=2, refresh_interval=8, initial_statistics=1, initial_refreshes="every")
    names = ["patch", "up", "down", "head"]
    history = []
    for step in range(33):
        assert optimizer.is_statistics_step == (step % 2 == 0)
        train(model, optimizer, [images()])
        metrics = optimizer.metrics()
        history.append([metrics[f"{name}/refreshes"] for name in names])
    counts = torch.tensor(history)
    new = torch.diff(counts, dim=0, prepend=torch.zeros(1, 4))
    assert (new[1::2] == 0).all(), "a refresh without new statistics"
    assert (new[0:8:2] == 1).all(), "young statistics refresh at once"
    assert (new[8:].unfold(0, 8, 1).sum(-1) == 1).all(), "once in every window of an interval"
    assert (new[8:].sum(1) <= 1).all(), "four layers over four statistics steps"


INITIAL = [{}] + [
    {"initial_statistics": initial, "factor_interval": interval, "refresh_interval": refresh}
    for initial, interval, refresh in [
        (0, 3, 6),
        (1, 3, 6),
        (4, 3, 6),
        (10, 3, 6),
        (7, 2, 4),
        (3, 5, 20),
        (5, 1, 3),
    ]
]


@pytest.mark.parametrize("options", INITIAL, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_initial_statistics(options: dict[str, int]) -> None:
    """Steps 0 to initial_statistics - 1 all take statistics, by default ten, then the multiples of factor_interval
    do. In that phase, or for a first refresh_interval if that is longer, they refresh every layer."""
    initial, interval, refresh = options.values() if options else (10, 10, 20)
    model, names, steps = Patches(), ["patch", "up", "down", "head"], 45
    optimizer = KFAC(model, initial_refreshes="every", **options)
    statistics, refreshed = [], []
    for _ in range(steps):
        states = optimizer._layers.states
        before = copy.deepcopy(states)
        train(model, optimizer, [images()])
        new = [name for name in names if states[name].weight > before[name].weight]
        statistics.append(new)
        refreshed.append([name for name in names if states[name].refreshes > before[name].refreshes])
    expected = [step for step in range(steps) if step < initial or step % interval == 0]
    assert statistics == [names if step in expected else [] for step in range(steps)]
    young = max(initial, refresh)
    assert refreshed[:young] == statistics[:young]
    assert all(statistics[step] for step in range(steps) if refreshed[step]), "a refresh without new statistics"
    for start in range(young, steps - refresh + 1):
        window = [name for layers in refreshed[start : start + refresh] for name in layers]
        assert sorted(window) == sorted(names), f"once each in steps {start} to {start + refresh - 1}"


def test_drift_decides_on_a_due_refresh() -> None:
    """The same statistics again leave the basis as it is; other ones do not. Eigenvalues follow in any case."""
    model, batch = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model, learning_rate=0.0, drift_tolerance=0.05, **EVERY_STEP)
    train(model, optimizer, [batch] * 3)
    metrics = optimizer.metrics()
    assert (metrics["refreshes"], metrics["skipped"]) == (2, 4)
    assert metrics["0/drift"] < 1e-4
    values = optimizer._layers.states["0"].a_values[0].clone()
    train(model, optimizer, [(2 * batch[0], batch[1])])
    assert optimizer._layers.states["0"].a_values[0].sum() > 1.1 * values.sum()
    mixed = batch[0] @ torch.randn(5, 5)
    train(model, optimizer, [(3 * mixed, batch[1])] * 3)
    metrics = optimizer.metrics()
    assert metrics["0/refreshes"] > 1
    assert metrics["0/drift"] > 0


def test_forced_statistics_off_schedule() -> None:
    model, (x, y) = mlp(5, 4, 3), vectors()
    optimizer = KFAC(model, factor_interval=10, initial_statistics=1)
    train(model, optimizer, [(x, y)])
    assert not optimizer.is_statistics_step
    weight = optimizer._layers.states["0"].weight.clone()
    optimizer.zero_grad()
    with optimizer.capture(force=True) as capture:
        assert capture.active
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer._layers.states["0"].weight > weight


# Decompositions that fail ------------------------------------------------------------------------------------


def fail_eigh(monkeypatch: pytest.MonkeyPatch, dtypes: set[torch.dtype]) -> None:
    original = torch.linalg.eigh

    def eigh(m: Tensor) -> Any:
        if m.dtype in dtypes:
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return original(m)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


def fail_cholesky(monkeypatch: pytest.MonkeyPatch, dtypes: set[torch.dtype]) -> None:
    original = torch.linalg.cholesky_ex

    def cholesky_ex(m: Tensor) -> Any:
        root, info = original(m)
        return (root * float("nan"), info + 1) if m.dtype in dtypes else (root, info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)


FAILURES = [("eigen", fail_eigh), ("inverse", fail_cholesky)]


def bases(optimizer: KFAC) -> list[Tensor]:
    states = optimizer._layers.states.values()
    return [m.clone() for state in states for m in [*state.a_operator, *state.b_operator]]


@pytest.mark.parametrize(("preconditioner", "fail"), FAILURES)
def test_a_failure_keeps_the_last_good_decomposition(
    preconditioner: str, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, preconditioner=preconditioner, **EVERY_STEP)
    train(model, optimizer, [vectors(), vectors()])
    good = bases(optimizer)
    with monkeypatch.context() as patch:
        fail(patch, {torch.float32, torch.float64})
        train(model, optimizer, [vectors()])
    metrics = optimizer.metrics()
    assert metrics["refreshes"] == 4
    assert metrics["0/failures"] == metrics["2/failures"] == 4  # once, and three retries
    assert all(torch.equal(now, before) for now, before in zip(bases(optimizer), good, strict=True))
    train(model, optimizer, [vectors()])
    assert optimizer.metrics()["refreshes"] == 6
    assert not torch.equal(bases(optimizer)[0], good[0])
    assert_finite(model, optimizer)


def test_too_small_a_workspace_in_float32_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch 2.5 does above 2894 rows on a CPU; any other error of the library passes through."""
    original = torch.linalg.eigh
    message = "false INTERNAL ASSERT FAILED: linalg.eigh: Argument 8 has illegal value."

    def eigh(m: Tensor) -> Any:
        if m.dtype == torch.float32:
            raise RuntimeError(message)
        return original(m)

    models = [mlp(5, 4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [KFAC(model, factor_interval=1, refresh_interval=1) for model in models]
    batch = vectors()
    train(models[0], optimizers[0], [batch])
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    train(models[1], optimizers[1], [batch])
    assert optimizers[1].metrics()["refreshes"] == 2
    assert optimizers[1].metrics()["failures"] == 0
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(models[1], optimizers[1], [batch])


@pytest.mark.parametrize(("preconditioner", "fail"), FAILURES)
def test_before_the_first_success_the_momentum_is_the_direction(
    preconditioner: str, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the refresh is tried again at the next statistics step, due or not."""
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, preconditioner=preconditioner, factor_interval=1, refresh_interval=50)
    with monkeypatch.context() as patch:
        fail(patch, {torch.float32, torch.float64})
        train(model, optimizer, [vectors()])
        assert optimizer.metrics()["0/cosine"] == pytest.approx(1, abs=1e-5)
        optimizer._steps = 60  # no longer young
        train(model, optimizer, [vectors()])
        assert optimizer.metrics()["0/failures"] == 8
    train(model, optimizer, [vectors()])
    metrics = optimizer.metrics()
    assert metrics["0/refreshes"] == metrics["2/refreshes"] == 1
    assert metrics["0/cosine"] < 0.999
    assert_finite(model, optimizer)


@pytest.mark.parametrize(("preconditioner", "fail"), FAILURES)
def test_a_failure_in_float32_is_mended_in_float64(
    preconditioner: str, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = vectors()
    steps = []
    for broken in (False, True):
        torch.manual_seed(2)
        model = mlp(5, 4, 3)
        with monkeypatch.context() as patch:
            if broken:
                fail(patch, {torch.float32})
            optimizer, _, step = directions(model, batch, preconditioner=preconditioner)
        steps.append(step)
        assert optimizer.metrics()["failures"] == (2 if broken else 0)
        assert optimizer.metrics()["refreshes"] == 2
        assert all(m.dtype == torch.float32 for m in bases(optimizer))
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-4)


def test_one_bad_matrix_in_a_batch_of_equal_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one shape are decomposed together; only the one that failed is tried again."""
    model = mlp(4, 4, 4, 4)
    optimizer = KFAC(model, factor_interval=1, refresh_interval=1)
    original = torch.linalg.eigh

    def eigh(m: Tensor) -> Any:
        values, vectors = original(m)
        if m.dtype == torch.float32:
            vectors = vectors.clone()
            vectors[1] = float("nan")
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    train(model, optimizer, [(torch.randn(8, 4), torch.randint(4, (8,)))])
    metrics = optimizer.metrics()
    assert [metrics[f"{name}/failures"] for name in ("0", "2", "4")] == [0, 1, 0]
    assert metrics["refreshes"] == 3
    assert_finite(model, optimizer)
