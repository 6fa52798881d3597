"""bible_translation: its vocabulary, its verses, its model in both frameworks."""

from __future__ import annotations

import collections
import functools
import math

import jax
import numpy as np
import pytest
import torch

from submissions.common.jax import compute_gradient, forward
from submissions.common.spec import ForwardPassMode
from tests.workloads.parity import from_named, jax_params
from workloads import registry, seeds
from workloads.bible_translation import byte_pairs, data
from workloads.bible_translation.task import BibleTranslationTask

# All variants at once, because each model is compiled.
CHANGES = {
    "base": {},
    "variants": {k: v for changes in BibleTranslationTask.VARIANTS.values() for k, v in changes.items()},
}


@pytest.fixture(scope="module")
def verses():
    return data.load()


@functools.cache
def _workload(framework, changes="base"):
    """A workload of one block a stack."""
    class_ = registry.WORKLOADS["bible_translation"].workload(framework)
    return type(class_.__name__, (class_,), {"depth": 1, **CHANGES[changes]})()


def _batch(workload, size=6):
    return next(workload._build_input_queue(seeds.root(1), "train", "", size))


def test_pairs_are_joined_by_frequency_then_in_the_order_of_the_alphabet():
    """The example of Sennrich et al. (2016), by hand: es, est, lo, then low."""
    text = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    characters = sorted(set("lowernewestwidest"))
    size = len(byte_pairs.SPECIAL) + len(characters) + 4
    pieces = byte_pairs.learn(text, size)
    assert pieces[:3] == list(byte_pairs.SPECIAL)
    assert pieces[3 : 3 + len(characters)] == characters
    assert pieces[3 + len(characters) :] == ["es", "est", "lo", "low"]
    encode = byte_pairs.Encoder(pieces)
    assert [pieces[number] for number in encode("lowest")] == ["low", "est", "<end>"]
    assert [pieces[number] for number in encode("xes")] == ["<unknown>", "es", "<end>"]


def test_learning_in_steps_equals_counting_all_pairs_each_time():
    text = "the children of the tribes of the sons of dan, and of their brothers; the other half of the tribe"
    pieces = byte_pairs.learn([text], 45)
    words = collections.Counter(byte_pairs._WORD.findall(text))
    parts = {word: list(word) for word in words}
    for joined in pieces[len(byte_pairs.SPECIAL) + len(set(text)) :]:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(parts[word], parts[word][1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        assert joined == "".join(best)
        for part in parts.values():
            byte_pairs._join(part, best)


def test_pieces_give_the_verses_back(verses):
    part = verses.parts["train"]
    texts = []
    for row in (part.sources[0], part.targets[0]):
        end = list(row).index(byte_pairs.END)
        assert (row[end + 1 :] == byte_pairs.PADDING).all()
        texts.append("".join(verses.pieces[number] for number in row[:end]))
    assert part.numbers[0] == 1_001_001
    assert texts == [
        "in the bigynnyng god made of nouyt heuene and erthe.",
        "in the beginning god created the heavens and the earth.",
    ]
    assert len(verses.pieces) == len(set(verses.pieces)) == data.NUM_PIECES


def test_parts_share_no_book_and_no_text(verses):
    parts = verses.parts
    assert {name: len(part.numbers) for name, part in parts.items()} == {
        "train": 9376,
        "validation": 708,
        "test": 933,
    }
    books = {name: set(part.numbers // 1_000_000) for name, part in parts.items()}
    assert books["validation"] == {26, 44}
    assert books["test"] == {18, 58}
    assert not books["train"] & {18, 19, 26, 44, 58}
    for kind in ("sources", "targets"):
        texts = {name: set(map(bytes, getattr(part, kind))) for name, part in parts.items()}
        assert not texts["train"] & (texts["validation"] | texts["test"])


def test_an_epoch_shows_every_verse_once_and_the_last_batch_is_padded(verses):
    part = data.Part(*(array[:10] for array in vars(verses.parts["train"]).values()))
    batches = [data.train_batch(part, seeds.root(3), index, 5) for index in range(4)]
    for epoch in (batches[:2], batches[2:]):
        assert set(map(bytes, np.concatenate([batch["inputs"] for batch in epoch]))) == set(
            map(bytes, part.sources)
        )
    assert not np.array_equal(batches[0]["inputs"], batches[2]["inputs"])
    last = data.eval_batch(part, 10, 1, 8)
    np.testing.assert_array_equal(last["inputs"][:2], part.sources[8:])
    assert not last["inputs"][2:].any()
    np.testing.assert_array_equal(last["weights"], last["targets"] != 0)
    with pytest.raises(ValueError, match="batch size 11 exceeds the 10 training verses"):
        data.train_batch(part, seeds.root(3), 0, 11)


@pytest.mark.parametrize("changes", CHANGES)
def test_both_frameworks_agree(changes):
    """Logits, loss and gradient with the same weights, of a batch whose last example is padding alone."""
    pytorch, in_jax = _workload("pytorch", changes), _workload("jax", changes)
    model, _ = pytorch.init_model_fn(seeds.root(1))
    batch = _batch(pytorch)
    for value in batch.values():
        value[-1] = 0
    logits, _ = pytorch.model_fn(model, batch, None, ForwardPassMode.TRAIN, seeds.root(2), True)
    loss = pytorch.loss_fn(batch["targets"], logits, batch["weights"])
    (loss["summed"] / loss["n_valid_examples"]).backward()
    template, _ = in_jax.init_model_fn(seeds.root(1))
    params = jax_params(model, template)
    arrays = {
        key: value.numpy().astype(np.int32 if key != "weights" else np.float32) for key, value in batch.items()
    }
    gradient, result = jax.jit(functools.partial(compute_gradient, in_jax))(params, arrays, None, seeds.root(2))
    found, _ = jax.jit(functools.partial(forward, in_jax))(params, arrays, None, seeds.root(2))
    np.testing.assert_allclose(found, logits.detach().numpy(), rtol=2e-4, atol=2e-5)
    assert float(result.loss) == pytest.approx(loss["summed"].item() / loss["n_valid_examples"].item(), rel=1e-5)
    expected = from_named({key: value.grad for key, value in model.named_parameters()}, params)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            found, wanted, rtol=2e-4, atol=2e-4 * np.abs(wanted).max(), err_msg=jax.tree_util.keystr(path)
        )


def test_padding_changes_nothing_and_the_future_is_not_seen():
    workload = _workload("pytorch")
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    sources, targets = batch["inputs"], batch["targets"]
    with torch.no_grad():
        whole = model(sources, targets)
        wider = model(torch.nn.functional.pad(sources, (0, 7)), torch.nn.functional.pad(targets, (0, 5)))
        changed = targets.clone()
        changed[:, 20:] = (changed[:, 20:] + 1) % data.NUM_PIECES
        other = model(sources, changed)
    valid = batch["weights"] > 0
    torch.testing.assert_close(wider[:, : data.LENGTH][valid], whole[valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other[:, :20], whole[:, :20], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other[:, 21:], whole[:, 21:], atol=1e-2)


def test_logits_see_source_and_start_near_a_uniform_guess():
    workload = _workload("pytorch")
    model, _ = workload.init_model_fn(seeds.root(1))
    batch = _batch(workload)
    with torch.no_grad():
        logits = model(batch["inputs"], batch["targets"])
        other = model(batch["inputs"].flip(0), batch["targets"])
    assert not torch.allclose(logits, other, atol=1e-2)
    loss = workload.loss_fn(batch["targets"], logits, batch["weights"])
    assert loss["n_valid_examples"] == batch["weights"].sum()
    assert (loss["summed"] / loss["n_valid_examples"]).item() == pytest.approx(math.log(data.NUM_PIECES), abs=1.0)
