"""The plan's numbers against the real optimizer and against counted flops, and its command line."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from algoperf_kfac.config import KFACConfig
from algoperf_kfac.layers import Coverage, LayerSpec
from algoperf_kfac.plan import ITEM_BYTES, Load, make_plan
from algoperf_kfac.pytorch import KFAC
from algoperf_kfac.pytorch.preconditioner import precondition
from submissions.__main__ import main
from submissions.cli.plan import OFFICIAL
from submissions.cli.pytorch_probe import Subject, probe_optimizer
from submissions.training_step.batch_sizes import get_batch_size

CHECKOUT = Path(__file__).resolve().parents[2]
BATCH = 4


class Net(nn.Module):
    """Every kind of layer with a plan, a raw weight, and parameters without one."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2, bias=False)
        self.raw = nn.Parameter(torch.randn(7, 5))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.up(torch.relu(self.norm(self.conv(x))))
        return self.head(torch.tanh(nn.functional.linear(x.flatten(2).transpose(1, 2), self.raw)))


class Branching(Net):
    """Its code looks at a value, which the meta device does not have."""

    def forward(self, x):
        return super().forward(x if x.sum().item() < 1e9 else -x)


def inputs(n: int = BATCH) -> torch.Tensor:
    return torch.randn(n, 4, 8, 6)


def seen_by(model: Callable[[], Net] = Net, batch_size: int = BATCH, small: int | None = None, **config):
    subject = Subject(model, lambda net, n: net(inputs(n)), batch_size, small)
    return probe_optimizer(subject, lambda net: KFAC(net, **config))


def tensor_bytes(tree: object, seen: set[int]) -> int:
    """Bytes of all tensors in a state_dict, each storage once."""
    if isinstance(tree, torch.Tensor):
        if tree.data_ptr() in seen or not tree.is_floating_point():
            return 0
        seen.add(tree.data_ptr())
        return tree.numel() * tree.element_size()
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(tensor_bytes(value, seen) for value in values)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"approximation": "reduce", "max_factor_dim": 6},
        {"max_factor_dim": 6, "large_factor": "one_sided"},
        {"preconditioner": "inverse"},
        {"preconditioner": "inverse", "grafting": False, "damping_mode": "absolute"},
        {"scaling": "second_moment"},
    ],
    ids=str,
)
def test_state_memory_is_that_of_the_optimizer(config):
    torch.manual_seed(0)
    model = Net()
    optimizer = KFAC(model, **config)
    for _ in range(2):  # the raw weight is covered after the first
        optimizer.zero_grad()
        with optimizer.capture():
            model(inputs()).square().mean().backward()
        optimizer.step()
    plan = make_plan(optimizer.coverage(), {}, optimizer.config)
    assert plan.memory.state == tensor_bytes(optimizer.state_dict(), set())
    assert plan.memory.parameters == sum(p.numel() * p.element_size() for p in model.parameters())


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_model_flops_are_those_counted():
    # Without groups: the counter takes the weight gradient of a grouped convolution for a dense one.
    seen = seen_by(lambda: Net(groups=1))
    x = inputs().requires_grad_()  # with a gradient for the first layer's input, which the formula includes
    model = Net(groups=1)
    assert make_plan(seen.coverage, seen.loads, seen.config).flops.model == counted(
        lambda: model(x).sum().backward()
    )
    grouped, dense = (
        next(layer for layer in make_plan(s.coverage, s.loads, s.config).layers if layer.spec.name == "conv")
        for s in (seen_by(), seen)
    )
    assert 2 * grouped.model == dense.model


def test_expand_statistics_flops_are_those_counted():
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    x = torch.randn(BATCH, 6, 5, requires_grad=True)
    optimizer = KFAC(model)

    def step(captured):
        with optimizer.capture(force=captured) if captured else torch.enable_grad():
            model(x).sum().backward()

    subject = Subject(
        lambda: model, lambda net, n: net(x[:n].detach().to(next(net.parameters()).device)), BATCH, None
    )
    seen = probe_optimizer(subject, KFAC)
    plan = make_plan(seen.coverage, seen.loads, seen.config)
    extra = counted(lambda: step(True)) - counted(lambda: step(False))
    assert sum(layer.statistics for layer in plan.layers) == extra


@pytest.mark.parametrize("config", [{}, {"preconditioner": "inverse"}, {"scaling": "second_moment"}], ids=str)
def test_preconditioning_flops_are_those_counted(config):
    torch.manual_seed(0)
    model = Net()
    optimizer = KFAC(model, max_factor_dim=6, **config)
    with optimizer.capture():
        model(inputs()).square().mean().backward()
    optimizer.step()
    for layer in make_plan(optimizer.coverage(), {}, optimizer.config).layers:
        spec, state = layer.spec, optimizer._states[layer.spec.name]
        m = torch.randn(spec.groups, spec.out_dim, spec.factor_in_dim)
        flops = counted(lambda m=m, state=state: precondition(state, m, m, optimizer.config, 0.9))
        assert layer.preconditioning == flops, spec.name


def one_layer(**fields) -> Coverage:
    spec = {
        "name": "l",
        "kind": "linear",
        "weight": "l.weight",
        "bias": None,
        "weight_shape": (10, 30),
        "groups": 1,
    }
    spec |= {"in_dim": 30, "out_dim": 10, "approximation": "reduce", "in_blocks": (30,), "out_blocks": (10,)}
    return Coverage((LayerSpec(**(spec | fields)),), ())


def test_flops_by_hand():
    load = Load(examples=8, positions=5, products=40, input_elements=1200, output_elements=400)
    config = KFACConfig(factor_interval=2, refresh_interval=4)
    reduce = make_plan(one_layer(), {"l.weight": load}, config)
    assert reduce.flops.model == 6 * 40 * 300
    assert reduce.flops.statistics * reduce.flops.model == pytest.approx((1600 + 2 * 8 * (900 + 100)) / 2)
    assert reduce.flops.refresh * reduce.flops.model == pytest.approx(11 * (27000 + 1000) / 4)
    expand = make_plan(one_layer(approximation="expand"), {"l.weight": load}, config)
    assert expand.flops.statistics * expand.flops.model == pytest.approx(2 * 40 * (900 + 100) / 2)
    inverse = make_plan(one_layer(), {"l.weight": load}, KFACConfig(preconditioner="inverse"))
    assert inverse.flops.refresh * inverse.flops.model == pytest.approx((27000 + 1000) / 20)


def test_refreshes_are_divided_over_devices():
    base = one_layer().layers[0]
    specs = []
    for i, size in enumerate((40, 40, 20)):
        changes = {"name": str(i), "weight": str(i), "in_blocks": (size,), "out_blocks": ()}
        specs.append(LayerSpec(**(vars(base) | changes)))
    coverage, loads = Coverage(tuple(specs), ()), {"0": Load(1, 1, 1, 1, 1)}
    cubes = [40**3, 40**3, 20**3]
    for devices, busiest in ((1, sum(cubes)), (2, 40**3 + 20**3), (3, 40**3), (8, 40**3)):
        plan = make_plan(coverage, loads, KFACConfig(), devices=devices)
        assert plan.flops.refresh * plan.flops.model == pytest.approx(11 * busiest / 20)
    with pytest.raises(ValueError, match="devices must be at least 1"):
        make_plan(coverage, loads, KFACConfig(), devices=0)


def test_activations_are_what_autograd_keeps():
    subject = Subject(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
        lambda net, n: net(torch.zeros(n, 3)),
        BATCH,
        None,
    )
    seen = probe_optimizer(subject, KFAC)
    assert seen.activation_bytes == ITEM_BYTES * BATCH * (3 + 5)


def measured_bytes(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> int:
    """What autograd really keeps on a CPU: distinct memory of saved tensors, parameters not counted."""
    own = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    return sum(saved.values())


class Varied(nn.Module):
    """Views, in-place operations, padding, masks and normalisation between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5, inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = nn.functional.pad(x, (1, 1, 1, 1))
        x = self.dropout(torch.relu_(self.norm(self.conv(x))))
        x = x.masked_fill(x > 1, 0).flatten(2).transpose(1, 2)
        return torch.log_softmax(self.head(x) * torch.sigmoid(x[..., :3]), -1)


@pytest.mark.parametrize("model", [Net, Varied])
def test_activations_are_those_really_kept(model):
    torch.manual_seed(0)
    assert seen_by(model).activation_bytes == measured_bytes(model(), lambda net: net(inputs()))


def test_a_dropout_mask_takes_a_byte_per_entry():
    subject = Subject(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.1), nn.Linear(5, 2)),
        lambda net, n: net(torch.zeros(n, 3)),
        BATCH,
        None,
    )
    seen = probe_optimizer(subject, KFAC)
    assert seen.activation_bytes == ITEM_BYTES * BATCH * (3 + 5) + BATCH * 5


class Padded(nn.Module):
    """A matrix made from a weight is kept whatever the batch; and the code looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.raw = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        x = x * x.sum().item()
        return self.lin(x) + x @ self.raw.tanh()


def test_what_does_not_grow_with_the_batch_is_not_scaled():
    def kept(batch_size, small):
        subject = Subject(Padded, lambda net, n: net(torch.zeros(n, 8)), batch_size, small)
        seen = probe_optimizer(subject, KFAC)
        return seen.activation_bytes, seen.note

    whole, scaled = kept(16, None), kept(16, 2)
    assert (whole[1], scaled[1]) == ("seen on a real batch of 16", "seen on a real batch of 2, scaled to 16")
    assert whole[0] == scaled[0] == ITEM_BYTES * (16 * 8 + 8 * 8)


def test_a_plan_without_data_is_the_plan_with_data():
    config = {"approximation": "reduce"}
    meta, real, scaled = seen_by(**config), seen_by(Branching, **config), seen_by(Branching, small=2, **config)
    assert meta.note == ""
    assert real.note == f"seen on a real batch of {BATCH}"
    assert scaled.note == f"seen on a real batch of 2, scaled to {BATCH}"
    assert meta.coverage == real.coverage == scaled.coverage
    assert {layer.name for layer in meta.coverage.layers} == {"conv", "up", "raw", "head"}
    assert meta.loads == real.loads == scaled.loads
    assert meta.loads["conv.weight"] == Load(BATCH, 12, 12 * BATCH, 4 * 48 * BATCH, 6 * 12 * BATCH, 3)
    assert meta.loads["up.weight"] == Load(BATCH, 48, 12 * BATCH, 6 * 12 * BATCH, 5 * 48 * BATCH, 2)
    assert meta.loads["raw"] == Load(BATCH, 48, 48 * BATCH, 5 * 48 * BATCH, 7 * 48 * BATCH)


def test_planning_leaves_torch_as_it_was():
    before = torch.Generator, torch.autocast, nn.Parameter.__new__
    seen_by()
    assert (torch.Generator, torch.autocast, nn.Parameter.__new__) == before
    assert nn.Linear(2, 2).weight.device.type == "cpu"


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
    assert " ".join(row.split()) == "blocks.*.attention.query x 3 linear 64 64 16 yes reduce 65 64"
    assert "normalisation (LayerNorm)" in out
    code, markdown, _ = command(capsys, "plan", "--workload=mnist_vit", "--devices=2", "--format=markdown")
    assert markdown.startswith("## mnist_vit")
    assert r"| blocks.\*.attention.query | x 3 | linear | 64 | 64 | 16 | yes | reduce | 65 | 64 |" in markdown


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
        (("--workload=mnist_vit", "--batch_size=9"), "the batch size 9 does not divide by 8 devices"),
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
        assert tuple(table) == OFFICIAL
        for workload, row in table.items():
            section = page.partition(f"\n## {workload} in {framework}: ")[2].partition("\n## ")[0]
            assert section.startswith(f"batch {get_batch_size(workload):,} on 8 devices")
            assert f"A device needs {row['peak']} at its peak, {row['K-FAC state']} of it K-FAC's state" in section
            assert f"NadamW alone needs {row['NadamW peak']}." in section
            assert f"| peak | {row['peak']} |" in section
            assert f"K-FAC adds {row['sum']} to the model's {row['model']} per step" in section
            value, unit = row["peak"].split()
            assert unit == "GB"
            assert row["fits 16 GB"] == ("yes" if float(value) <= 16 else "no")
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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.lstm(x)[0]


def test_both_weights_of_an_lstm_see_every_time_step():
    subject = Subject(Recurrent, lambda net, n: net(torch.zeros(n, 7, 3)), BATCH, None)
    seen = probe_optimizer(subject, KFAC)
    for direction in ("", "_reverse"):
        inputs_load, hidden_load = (seen.loads[f"lstm.weight_{side}_l0{direction}"] for side in ("ih", "hh"))
        assert inputs_load == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 3, 7 * BATCH * 20)
        assert hidden_load == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 5, 7 * BATCH * 20)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, True), (2, False)])
def test_activations_of_an_lstm_are_those_of_a_fused_one(layers, bidirectional):
    """The plan counts what cuDNN keeps. On a CPU without oneDNN the same recurrence keeps every step's tensors, of
    which a fused one needs most: gates, cell and hidden states, inputs and outputs."""
    steps, width, hidden = 30, 12, 16

    def make():
        return nn.LSTM(width, hidden, layers, batch_first=True, bidirectional=bidirectional)

    def run(net, n=BATCH):
        return net(torch.zeros(n, steps, width))[0]

    seen = probe_optimizer(Subject(make, run, BATCH, None), KFAC)
    directions = 2 if bidirectional else 1
    states = 2 * layers * directions * hidden  # zeros to start from, one tensor for h and c
    rows = steps * (width + 6 * hidden * layers * directions + hidden * directions)
    assert seen.activation_bytes in (
        ITEM_BYTES * BATCH * (rows + states),
        ITEM_BYTES * BATCH * (rows + states // 2),
    )
    with torch.backends.mkldnn.flags(enabled=False):
        measured = measured_bytes(make(), run)
    assert 0.8 * measured <= seen.activation_bytes <= 1.05 * measured


def test_a_statistics_step_of_an_lstm_keeps_the_inputs_of_its_gates():
    seen = probe_optimizer(Subject(Recurrent, lambda net, n: net(torch.zeros(n, 7, 3)), BATCH, None), KFAC)
    rows, gates, hidden = 7 * BATCH, 2 * 20, 2 * 5
    identity = 20 * gates * 2  # as the input weights of both directions
    assert seen.capture_bytes >= ITEM_BYTES * (rows * (gates + hidden) + identity)


def test_peaks_by_hand():
    """Reduce makes outer products once the activations are gone, expand while they are there."""
    load = Load(examples=8, positions=5, products=40, input_elements=1200, output_elements=400)
    total, matrices = 300, 900 + 100
    for approximation, held in (("reduce", 8 * (30 + 10)), ("expand", matrices)):
        coverage = one_layer(approximation=approximation)
        plan = make_plan(coverage, {"l.weight": load}, KFACConfig(), activation_bytes=1e6, capture_bytes=1e5)
        assert plan.memory.capture == 1e5 + ITEM_BYTES * held
        assert plan.memory.peak == ITEM_BYTES * 2 * total + plan.memory.state + 1e6 + plan.memory.capture
        assert plan.memory.first_order_peak == ITEM_BYTES * 4 * total + 1e6
    idle = make_plan(coverage, {}, KFACConfig(), activation_bytes=0.0)
    assert idle.memory.first_order_peak == ITEM_BYTES * 6 * total


def test_activations_in_jax_are_what_a_compiled_program_holds():
    jax = pytest.importorskip("jax")
    jnp = importlib.import_module("jax.numpy")
    activation_bytes = importlib.import_module("submissions.cli.jax_activations").activation_bytes
    n, width, depth = 256, 64, 6

    def apply(params, x):
        for w in params:
            x = jax.nn.silu(x @ w)
        return x

    args = ([jnp.zeros((width, width))] * depth, (jnp.zeros((n, width)),))
    estimate = activation_bytes(apply, *args)
    # What each silu takes, and what it gives to the next product.
    assert estimate == ITEM_BYTES * n * width * (2 * depth - 1)
    grad = jax.jit(jax.grad(lambda params, x: apply(params, x).sum()))
    memory = grad.lower(args[0], *args[1]).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say what a program takes")
    assert 0.5 * memory.temp_size_in_bytes <= estimate <= 1.1 * memory.temp_size_in_bytes


def test_a_loop_in_jax_keeps_what_it_stacks():
    jax = pytest.importorskip("jax")
    jnp = importlib.import_module("jax.numpy")
    activation_bytes = importlib.import_module("submissions.cli.jax_activations").activation_bytes
    steps, n, width = 7, BATCH, 5

    def apply(params, x):
        def step(h, x_t):
            h = jnp.tanh(x_t + h @ params)
            return h, None

        return jax.lax.scan(step, jnp.zeros((n, width)), x)[0]

    kept = activation_bytes(apply, jnp.zeros((width, width)), (jnp.zeros((steps, n, width)),))
    each = ITEM_BYTES * steps * n * width
    assert 2 * each <= kept <= 4 * each  # the state before and after each step, and at most what tanh makes of it


def test_jax_sees_what_pytorch_sees():
    """A scan over time uses its weights at every step."""
    jax = pytest.importorskip("jax")
    jnp = importlib.import_module("jax.numpy")
    jax_probe = importlib.import_module("submissions.cli.jax_probe")
    shape = jax.ShapeDtypeStruct

    def apply(params, x):
        def step(h, x_t):
            return jnp.tanh(x_t @ params["w"] + h @ params["u"]), None

        h = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.swapaxes(0, 1))[0]
        image = h.reshape(-1, 5, 1, 1) * jnp.ones((1, 1, 6, 6))
        return jax.lax.conv_general_dilated(image, params["k"], (2, 2), "SAME").sum((1, 2, 3))

    params = {"w": shape((3, 5), "f"), "u": shape((5, 5), "f"), "k": shape((2, 5, 3, 3), "f")}
    seen = jax_probe.probe(jax_probe.Subject(apply, params, (shape((BATCH, 7, 3), "f"),)), "kfac_reduce")
    assert seen.loads["w"] == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 3, 7 * BATCH * 5)
    assert seen.loads["u"] == Load(BATCH, 7, 7 * BATCH, 7 * BATCH * 5, 7 * BATCH * 5)
    assert seen.loads["k"] == Load(BATCH, 9, 9 * BATCH, 180 * BATCH, 18 * BATCH, 3)


def test_rows_of_graphs_are_positions_of_their_graphs():
    make = lambda: nn.Linear(3, 5)  # noqa: E731
    subject = Subject(make, lambda net, n: net(torch.zeros(12, 3)), 3, None, segments={12: 3})
    assert probe_optimizer(subject, KFAC).loads["weight"] == Load(3, 4, 12, 36, 60)
