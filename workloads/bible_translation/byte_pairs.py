"""Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): pieces of words, learned from text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

PADDING, END, UNKNOWN = 0, 1, 2
SPECIAL = ("<pad>", "<end>", "<unknown>")
# A word with the space before it, or any other character.
_WORD = re.compile(r" ?[a-z']+|.", re.DOTALL)


def learn(texts: Iterable[str], size: int) -> list[str]:
    """The vocabulary of a text: special pieces, characters, then pairs of pieces in the order they were joined.

    Of the pairs that are equally frequent the first in the alphabet is joined, so that the result is a function of
    the text alone.

    Args:
        texts: what to learn from.
        size: of the vocabulary; more than there are characters.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    words = [(list(word), count) for word, count in sorted(counts.items())]
    pieces = [*SPECIAL, *sorted({character for word in counts for character in word})]
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += count
            places[pair].add(index)
    while len(pieces) < size:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces.append("".join(best))
        for index in places.pop(best):
            word, count = words[index]
            for pair in pairwise(word):
                pairs[pair] -= count
            _join(word, best)
            for pair in pairwise(word):
                pairs[pair] += count
                places[pair].add(index)
        del pairs[best]
    return pieces


class Encoder:
    """Texts to numbers of pieces.

    Args:
        pieces: from `learn`.
    """

    def __init__(self, pieces: list[str]) -> None:
        self._numbers = {piece: number for number, piece in enumerate(pieces)}
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The pieces of a text, in the order they were learned joined again, and the end."""
        return [number for word in _WORD.findall(text) for number in self._word(word)] + [END]

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = list(word)
            while found := [pair for pair in pairwise(parts) if "".join(pair) in self._numbers]:
                _join(parts, min(found, key=lambda pair: self._numbers["".join(pair)]))
            self._known[word] = [self._numbers.get(part, UNKNOWN) for part in parts]
        return self._known[word]


def _join(parts: list[str], pair: tuple[str, str]) -> None:
    """Makes one part of each occurrence of the pair, from the left, in place."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    parts[:] = joined
