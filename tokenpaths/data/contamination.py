"""Has the training seen the test?  Three ways to ask, each a plain function from texts to the pairs that it finds.

    exact(train, test)            # equal but for case, punctuation and white space
    shared_grams(train, test)     # stretches of eight words in common
    nearest(run, tokenizer, train, test)   # the closest training text by the mean hidden state of a model

Each returns at most one `Overlap` a test text: that with its closest training text, the closest pairs first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

GRAM = 8


"""Words of a stretch."""


@dataclass(frozen=True)
class Overlap:
    """Test text number `test` is like training text number `train`: by `score`, in the unit of its kind.

    "exact": 1. "n-gram": the share of the test text's n-grams that the training text has. "embedding": the cosine.
    """

    kind: str
    test: int
    train: int
    score: float


def exact(train: Sequence[str], test: Sequence[str]) -> list[Overlap]:
    """Test texts that are a training text, but for case, punctuation and white space."""
    known: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(train):
        known.setdefault(_words(text), number)
    told = enumerate(_words(text) for text in test)
    return [Overlap("exact", number, known[words], 1.0) for number, words in told if words and words in known]


def shared_grams(train: Sequence[str], test: Sequence[str], n: int = GRAM) -> list[Overlap]:
    """Test texts that share a stretch of `n` words with a training text; one of fewer words must be in it whole.

    Texts of one form share what they are framed in ("Question: ... Answer:"): give texts without it.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: it is the number of words in a stretch")
    asked = [_grams(words := _words(text), min(n, len(words))) for text in test]
    wanted = {gram for grams in asked for gram in grams}
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, text in enumerate(train):
        words = _words(text)
        for length in {len(gram) for gram in wanted}:
            for gram in _grams(words, length) & wanted:
                having[gram].append(number)
    found: list[Overlap] = []
    for number, grams in enumerate(asked):
        counts: dict[int, int] = defaultdict(int)
        for gram in grams:
            for other in having[gram]:
                counts[other] += 1
        if counts:
            closest = max(sorted(counts), key=lambda other: counts[other])
            found.append(Overlap("n-gram", number, closest, counts[closest] / len(grams)))
    return closest_first(found)


def closest_first(found: list[Overlap]) -> list[Overlap]:
    return sorted(found, key=lambda overlap: (-overlap.score, overlap.test))


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _grams(words: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    return {words[i : i + n] for i in range(len(words) - n + 1)} if n else set()
