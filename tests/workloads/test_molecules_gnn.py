"""molecules_gnn: molecules without leakage, padding that changes nothing, its metric, and both frameworks."""

from __future__ import annotations

import csv
import functools
import io
import sys

import jax
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from commands.errors import UserError
from submissions.common.jax import compute_gradient
from submissions.common.kfac.pytorch import positions
from submissions.common.spec import ForwardPassMode
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds
from workloads.data.source import read
from workloads.molecules_gnn import data
from workloads.molecules_gnn.task import MoleculesGnnTask, average_precision

RNG = seeds.root(1)


@pytest.fixture(scope="module")
def parts():
    return data.load()


@pytest.fixture(scope="module")
def workload():
    return registry.load("molecules_gnn", "pytorch")


@pytest.fixture(scope="module")
def model(workload):
    return workload.init_model_fn(RNG)[0]


def _tensors(batch):
    return jax.tree.map(torch.tensor, batch)


def _loss(workload, model, batch):
    batch = _tensors(batch)
    logits, _ = workload.model_fn(model, batch, None, ForwardPassMode.TRAIN, RNG, True)
    return logits, workload.loss_fn(batch["targets"], logits, batch["weights"])


def test_parts_share_no_scaffold_and_have_the_labels_of_the_file(parts):
    entries = list(csv.DictReader(io.StringIO(read(data.SOURCE).decode()), delimiter="\t"))
    seen_rows, seen_scaffolds = set(), set()
    for part in parts.values():
        assert not seen_rows & set(part.rows)
        assert not seen_scaffolds & set(part.scaffolds)
        seen_rows |= set(part.rows)
        seen_scaffolds |= set(part.scaffolds)
        assert len(set(part.rows)) == len(part.rows)
        assert [entries[row]["BBB+/BBB-"] == "BBB-" for row in part.rows] == part.labels[:, 0].tolist()
        assert 1 < part.n_node.min() <= part.n_node.max() <= data.MAX_ATOMS
    assert [len(parts[name].rows) for name in ("train", "validation", "test")] == [6078, 768, 128]


def test_a_molecule_is_read_as_it_is_written():
    """Acetate, CC(=O)[O-]: three bonds in both directions, of which one is double."""
    table = "SMILES\tBBB+/BBB-\nCC(=O)[O-]\tBBB-\nC\tBBB+\nCC(=O)[O-]\tBBB+\nnonsense\tBBB+\n"
    arrays = data._parse(table.encode())
    assert arrays["rows"].tolist() == [0]  # one atom, again the same, and unreadable: left out
    assert arrays["labels"].tolist() == [[1]]
    # Atomic number - 1, chirality, degree, charge + 5, hydrogens, radicals, SP2 or SP3, aromatic, in a ring.
    assert arrays["nodes"].tolist() == [
        [5, 0, 4, 5, 3, 0, 2, 0, 0],
        [5, 0, 3, 5, 0, 0, 1, 0, 0],
        [7, 0, 1, 5, 0, 0, 1, 0, 0],
        [7, 0, 1, 4, 0, 0, 1, 0, 0],
    ]
    assert list(zip(arrays["senders"], arrays["receivers"], strict=True)) == [
        (0, 1),
        (1, 0),
        (1, 2),
        (2, 1),
        (1, 3),
        (3, 1),
    ]
    assert arrays["edges"][:, 0].tolist() == [0, 0, 1, 1, 0, 0]


def test_batches_hold_whole_molecules_and_fixed_shapes(parts):
    batches = [data.train_batch(parts["train"], RNG, index, 32) for index in range(6)]
    assert len({jax.tree.leaves(batch["inputs"])[0].shape for batch in batches}) == 1
    sizes = set()
    for batch in batches:
        graph, real = batch["inputs"], int(batch["weights"].sum())
        sizes.add(real)
        owner = np.repeat(np.arange(len(graph.n_node)), graph.n_node)
        edge_owner = np.repeat(np.arange(len(graph.n_edge)), graph.n_edge)
        assert (owner[graph.senders] == edge_owner).all()
        assert (owner[graph.receivers] == edge_owner).all()
        assert len(owner) == len(graph.nodes)
        assert len(edge_owner) == len(graph.edges)
        assert batch["weights"][:real].all()
        assert (graph.n_node[real + 1 :] == 0).all()
        assert graph.n_node[real] > 0
    assert len(sizes) > 1  # some batches are full before they have 32


def test_padding_changes_nothing(parts, workload, model):
    some = parts["test"].chosen(np.arange(5))
    close, wide = (data.padded(some, *room) for room in ((int(some.n_node.sum()), 300, 5), (900, 2000, 20)))
    real = int(some.n_node.sum())
    wide["inputs"].nodes[real:] = 3.0
    wide["inputs"].edges[int(some.n_edge.sum()) :] = -2.0
    (one, loss), (other, again) = (_loss(workload, model, batch) for batch in (close, wide))
    torch.testing.assert_close(one[:5], other[:5])
    torch.testing.assert_close(loss["summed"], again["summed"])
    assert loss["n_valid_examples"] == again["n_valid_examples"] == 5


def test_shares_of_processes_are_the_whole_batch(workload, model):
    batch = workload.numpy_batch(RNG, "train", 0, 24)
    shares = [workload.share_of(batch, rank, 3) for rank in range(3)]
    whole = _loss(workload, model, batch)[1]
    parts = [_loss(workload, model, share)[1] for share in shares]
    for key in ("summed", "n_valid_examples"):
        torch.testing.assert_close(sum(part[key] for part in parts), whole[key])
    assert parts[0]["n_valid_examples"] == 10  # of 32 graphs with the padding


def test_submissions_see_graphs_in_it(workload):
    batch = _tensors(workload.numpy_batch(RNG, "train", 0, workload.batch_size))
    found = positions(batch)
    graph = batch["inputs"]
    assert [len(p.segment_ids) for p in found] == [len(graph.nodes), len(graph.edges), len(graph.n_node)]


def test_average_precision_is_that_of_scikit_learn():
    generator = np.random.RandomState(0)
    for digits in (1, 9):  # with and without equal scores
        labels, scores = generator.randint(0, 2, 200), generator.randn(200).round(digits)
        assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores))
    assert np.isnan(average_precision(np.zeros(3), np.ones(3)))
    assert np.isnan(average_precision(np.ones(2), np.array([0.0, np.nan])))


def test_the_metric_leaves_padding_out(workload):
    batch = {"loss": np.float64(1), "n_valid": np.float64(3)}
    scores = np.array([[3.0], [2.0], [1.0], [9.0]])
    labels, weights = np.array([[1.0], [0.0], [1.0], [0.0]]), np.array([[1.0], [1.0], [1.0], [0.0]])
    found = workload.metrics([{**batch, "scores": scores, "labels": labels, "weights": weights}])
    assert found == {"loss": pytest.approx(1 / 3), "mean_average_precision": pytest.approx((1 + 2 / 3) / 2)}


def test_both_frameworks_agree(monkeypatch):
    monkeypatch.setattr(MoleculesGnnTask, "hops", 2)  # which have globals of both widths
    workload, in_jax = (registry.load("molecules_gnn", framework) for framework in ("pytorch", "jax"))
    model, _ = workload.init_model_fn(RNG)
    template, _ = in_jax.init_model_fn(RNG)
    params = jax_params(model, template)
    batch = workload.numpy_batch(RNG, "train", 0, 4)
    _, loss = _loss(workload, model, batch)
    (loss["summed"] / loss["n_valid_examples"]).backward()
    expected = from_named({name: parameter.grad for name, parameter in model.named_parameters()}, params)
    differentiate = jax.jit(functools.partial(compute_gradient, in_jax))
    gradient, result = differentiate(params, batch, None, RNG.astype(np.uint32))
    np.testing.assert_allclose(result.loss, (loss["summed"] / loss["n_valid_examples"]).item(), rtol=2e-4)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


def test_rdkit_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(UserError, match=r"'rdkit'.*is not installed. Run: .*pip install .*rdkit==2026"):
        data._parse(b"")
