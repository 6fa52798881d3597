"""An optimizer older than the model's parameters, and parameters of sorts that K-FAC cannot train."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf_kfac.pytorch import KFAC, NadamW
from algoperf_kfac.pytorch.decay import set_weight_decay
from tests.pytorch.toys import assert_same_parameters, mlp, train, vectors


class Net(nn.Module):
    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(11, 8, sparse=sparse), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(x))))


def step(model: nn.Module, optimizer: KFAC | NadamW, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(11, (8, 4), generator=generator), torch.randint(11, (32,), generator=generator)
    optimizer.zero_grad()
    if isinstance(optimizer, KFAC):
        with optimizer.capture():
            F.cross_entropy(model(x).flatten(0, 1), y).backward()
    else:
        F.cross_entropy(model(x).flatten(0, 1), y).backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_cast_after_the_optimizer_was_made(steps: int) -> None:
    model = Net()
    optimizer = KFAC(model, learning_rate=1e-2)
    for i in range(steps):
        step(model, optimizer, i)
    model.double()
    if not steps:
        # Nothing was lost: as if the optimizer had been made afterwards.
        twin = copy.deepcopy(model)
        later = KFAC(twin, learning_rate=1e-2)
        for i in range(3):
            step(model, optimizer, i)
            step(twin, later, i)
        assert_same_parameters(model, twin)
    step(model, optimizer, 5)
    assert optimizer.factors()["body"].A.dtype == torch.float64
    assert all(value["exp_avg"].dtype == torch.float64 for value in optimizer.state.values())


def replaced_head(model: Net) -> None:
    model.head = nn.Linear(8, 11, bias=False)


def off_meta(model: Net) -> None:
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)


@pytest.mark.parametrize(("device", "change"), [("cpu", replaced_head), ("meta", off_meta)], ids=["head", "meta"])
def test_parameters_that_are_not_the_optimizers_are_named(device: str, change) -> None:
    with torch.device(device):
        model = Net()
    optimizer = KFAC(model)
    change(model)
    message = r"parameter .*head\.weight of the model is not the optimizer's.*Make the optimizer afterwards"
    with pytest.raises(ValueError, match=message):
        step(model, optimizer)


def test_a_new_head_can_be_given_to_the_optimizer() -> None:
    model = Net()
    optimizer = KFAC(model, learning_rate=1e-2, exclude=["head"])
    step(model, optimizer)
    model.extra = nn.Linear(11, 11)
    forward = model.forward
    model.forward = lambda x: model.extra(forward(x))
    optimizer.add_param_group({"params": model.extra.parameters()})
    before = model.extra.weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(before, model.extra.weight)


def test_a_head_in_the_place_of_another_starts_as_new() -> None:
    """The other layers, the one behind it among them, keep states, moments and turns; a checkpoint goes on."""
    options = {"learning_rate": 1e-2, "factor_interval": 1, "refresh_interval": 3, "initial_statistics": 1}
    model = mlp(5, 4, 4, 3)
    optimizer = KFAC(model, **options)
    batches = [vectors() for _ in range(12)]
    train(model, optimizer, batches[:5])
    old, (first, last) = (
        model[2].weight,
        (optimizer.state_dict()["kfac"]["layers"][name]["state"] for name in ("0", "4")),
    )
    first, last = copy.deepcopy(first), copy.deepcopy(last)
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    model[2] = nn.Linear(4, 4)
    optimizer.add_param_group({"params": model[2].parameters()})
    assert [layer.name for layer in optimizer.coverage().layers] == ["0", "2", "4"]  # in the order of turns
    now = optimizer.state_dict()["kfac"]["layers"]
    for name, before in (("0", first), ("4", last)):
        torch.testing.assert_close(now[name]["state"], before, rtol=0, atol=0)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment)
    assert now["2"]["state"]["refreshes"] == 0
    assert not now["2"]["state"]["a"][0].any()
    assert all(p is not old for group in optimizer.param_groups for p in group["params"])
    before = model[2].weight.detach().clone()
    train(model, optimizer, batches[5:8])
    assert optimizer.metrics()["2/refreshes"] > 0
    assert not torch.equal(before, model[2].weight)

    other = copy.deepcopy(model)
    order = [[0, 4], [2]]
    groups = [{"params": [p for i in layers for p in other[i].parameters()]} for layers in order]
    resumed = KFAC(other, groups, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for net, own in ((model, optimizer), (other, resumed)):
        train(net, own, batches[8:])
    assert_same_parameters(model, other, rtol=0, atol=0)


NAMED = pytest.mark.skipif(torch.__version__ < "2.6", reason="torch takes names with parameters from 2.6 on")


@NAMED
def test_parameters_that_join_with_their_names() -> None:
    """Names go with their parameters: into new groups, out of old ones, and through a checkpoint."""
    model = mlp(5, 4, 4, 3)
    optimizer = KFAC(model, [p for p in model.named_parameters() if not p[0].startswith("4")], learning_rate=1e-2)
    train(model, optimizer, [vectors()])
    model[2] = nn.Linear(4, 4, bias=False)
    optimizer.add_param_group({"params": model[4].named_parameters(prefix="4"), "lr": 1e-3})
    optimizer.add_param_group({"params": list(model[2].named_parameters(prefix="2"))})
    optimizer.add_param_group({"params": [], "param_names": []})
    groups = [["0.weight", "0.bias"], ["4.weight", "4.bias"], ["2.weight"], []]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [group["param_names"] for group in optimizer.param_groups] == groups
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == groups
    assert {layer.name for layer in optimizer.coverage().layers} == {"0", "2", "4"}
    train(model, optimizer, [vectors()])
    other = copy.deepcopy(model)
    given = dict(other.named_parameters())
    resumed = KFAC(other, [{"params": [(name, given[name]) for name in group]} for group in groups[:3]])
    resumed.add_param_group({"params": [], "param_names": []})
    resumed.load_state_dict(optimizer.state_dict())
    assert [group["param_names"] for group in resumed.param_groups] == groups
    with pytest.raises(ValueError, match="without names"):
        optimizer.add_param_group({"params": []})


@NAMED
def test_names_go_with_their_parameters_into_groups_of_a_decay() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, model.named_parameters())
    set_weight_decay(optimizer, model, {("0.weight", "2.bias"): 0.1})
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_a_set_of_parameters_has_no_order() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, model[0].parameters())
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": set(model[2].parameters())})


def test_a_bias_is_new_with_its_weight() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, learning_rate=1e-2)
    train(model, optimizer, [vectors()])
    model[2].weight = nn.Parameter(torch.zeros(3, 4))
    optimizer.add_param_group({"params": [model[2].weight]})
    assert optimizer.coverage().fraction == 1
    assert len(optimizer.coverage().layers) == 2
    train(model, optimizer, [vectors()])
    assert optimizer.metrics()["2/refreshes"] == 1
    assert model[2].weight.any()


def test_a_layer_frozen_at_first_is_listed_and_trained_later() -> None:
    model = mlp(5, 4, 3)
    model[0].requires_grad_(False)
    optimizer = KFAC(model, params=model.parameters(), learning_rate=1e-2)
    assert [layer.name for layer in optimizer.coverage().layers] == ["0", "2"]
    train(model, optimizer, [vectors()])
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    train(model, optimizer, [vectors() for _ in range(2)])
    assert not torch.equal(before, model[0].weight)
    assert optimizer.metrics()["0/refreshes"] > 0


def test_a_thawed_layer_that_is_not_the_optimizers_is_named() -> None:
    model = mlp(5, 4, 3)
    model[0].requires_grad_(False)
    optimizer = KFAC(model, learning_rate=1e-2)
    model[0].requires_grad_(True)
    message = r"0\.weight, 0\.bias had no gradient when the optimizer was made.*add_param_group"
    with pytest.warns(UserWarning, match=message):
        train(model, optimizer, [vectors()])


@pytest.mark.parametrize("path", ["0", "1", "2"], ids=["embedding", "linear", "norm"])
def test_whatever_thaws_or_is_replaced_is_named_each_time(path: str) -> None:
    """Also modules without a rule, by their gradients; what the caller left to another optimizer is not."""

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(11, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 3)
        )

    batches = [(torch.randint(11, (16,)), torch.randint(3, (16,)))]
    model = net()
    for part in (model[4], model.get_submodule(path)):
        part.requires_grad_(False)
    optimizer = KFAC(model, params=[p for n, p in model.named_parameters() if n != "3.bias" and p.requires_grad])
    for part in ("4", path):  # the second is named, too
        model.get_submodule(part).requires_grad_(True)
        with pytest.warns(UserWarning, match="had no gradient") as said:
            train(model, optimizer, batches)
        assert len(said) == 1
        assert f"{part}.weight" in str(said[0].message)
    model = net()
    optimizer = KFAC(model)
    model.set_submodule(path, net().get_submodule(path))
    with pytest.raises(ValueError, match=rf"parameter {path}\.weight.* is not the optimizer's"):
        train(model, optimizer, batches)


@pytest.mark.parametrize(
    "make", [KFAC, lambda m, **options: NadamW(m.parameters(), lr=1e-2)], ids=["kfac", "nadamw"]
)
def test_sparse_gradients_are_those_of_a_dense_table(make) -> None:
    torch.manual_seed(1)
    dense, sparse = Net(), Net(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    options = {"learning_rate": 1e-2, "weight_decay": 0.1}
    for model in (dense, sparse):
        optimizer = make(model, **options)
        for i in range(4):
            step(model, optimizer, i)
    assert_same_parameters(sparse, dense, rtol=0, atol=0)


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("spectrum", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="parameter spectrum is complex: train its real and imaginary parts"):
        KFAC(model)


def test_a_learning_rate_that_is_a_tensor() -> None:
    model = mlp(5, 4, 3)
    optimizer = KFAC(model, lr=1e-2)
    optimizer.param_groups[0]["lr"] = torch.tensor([0.0])
    before = copy.deepcopy(model)
    train(model, optimizer, [vectors()])
    assert_same_parameters(model, before, rtol=0, atol=0)


def test_a_number_in_place_of_parameters() -> None:
    with pytest.raises(TypeError, match=r"params=0\.001 are no parameters: the learning rate is lr=0\.001"):
        KFAC(nn.Linear(3, 2), 1e-3)
