"""The activations a plan counts, against what autograd and compiled programs really keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from algoperf_kfac.cost import ITEM_BYTES
from algoperf_kfac.pytorch import KFAC
from submissions.cli.pytorch_probe import Subject, sight_optimizer
from tests.submissions.planned import BATCH, Net, Recurrent, inputs, seen_by


def test_activations_are_what_autograd_keeps():
    subject = Subject(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
        lambda net, n: net(torch.zeros(n, 3)),
        BATCH,
        None,
    )
    seen = sight_optimizer(subject, KFAC)
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
    seen = sight_optimizer(subject, KFAC)
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
        seen = sight_optimizer(subject, KFAC)
        return seen.activation_bytes, seen.note

    whole, scaled = kept(16, None), kept(16, 2)
    assert (whole[1], scaled[1]) == ("seen on a real batch of 16", "seen on a real batch of 2, scaled to 16")
    assert whole[0] == scaled[0] == ITEM_BYTES * (16 * 8 + 8 * 8)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, True), (2, False)])
def test_activations_of_an_lstm_are_those_of_a_fused_one(layers, bidirectional):
    """The plan counts what cuDNN keeps. On a CPU without oneDNN the same recurrence keeps every step's tensors, of
    which a fused one needs most: gates, cell and hidden states, inputs and outputs."""
    steps, width, hidden = 30, 12, 16

    def make():
        return nn.LSTM(width, hidden, layers, batch_first=True, bidirectional=bidirectional)

    def run(net, n=BATCH):
        return net(torch.zeros(n, steps, width))[0]

    seen = sight_optimizer(Subject(make, run, BATCH, None), KFAC)
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
    seen = sight_optimizer(Subject(Recurrent, lambda net, n: net(torch.zeros(n, 7, 3)), BATCH, None), KFAC)
    rows, gates, hidden = 7 * BATCH, 2 * 20, 2 * 5
    identity = 20 * gates * 2  # as the input weights of both directions
    assert seen.capture_bytes >= ITEM_BYTES * (rows * (gates + hidden) + identity)


class Wide(nn.Module):
    """Two layers with operations between that are cheaper to compute again than to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 3)

    def forward(self, x):
        h = self.up(x)
        return self.down(torch.sigmoid(h) * torch.tanh(h) + torch.relu(h).square())


class Broken(Wide):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_compiled_model_keeps_what_it_would_not_compute_again():
    sizes = 5 * BATCH  # not of the batch that anything runs on

    def seen(make: Callable[[], nn.Module], compiled: bool):
        subject = Subject(make, lambda net, n: net(torch.zeros(n, 4)), sizes, None, compiled=compiled)
        return sight_optimizer(subject, KFAC)

    plain, compiled, broken = seen(Wide, False), seen(Wide, True), seen(Broken, True)
    assert compiled.activation_bytes == ITEM_BYTES * sizes * 2 * 64  # what one layer gave, and the other got
    assert compiled.note == "activations of the compiled model"
    assert compiled.output_bytes == plain.output_bytes
    assert plain.activation_bytes > 2 * compiled.activation_bytes
    assert (broken.activation_bytes, broken.note) == (plain.activation_bytes, "")
