"""Has the training seen the test?  Ways to ask, each a plain function of texts.

    exact(train, test)           # pairs that are equal but for case, punctuation and white space
    shared_grams(train, test)    # pairs that have eight consecutive words in common
    contaminated(train, test)    # for each training text, whether it shares eight consecutive words with a test text

All compare words, without case, as `words` splits a text. `tokenpaths.lab.ab.embedding.nearest` compares the hidden
states of a model instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Split: TypeAlias = Callable[[str], Sequence[str]]

GRAM = 8
"""The number of consecutive words that two texts must share to overlap."""


@dataclass(frozen=True)
class Overlap:
    """A test text and a training text that are alike.

    Args:
        kind: "exact", "n-gram" or "embedding".
        test: the number of the test text.
        train: the number of the training text.
        score: how alike they are. "exact": 1. "n-gram": the share of the test text's n-grams that the training text
            has. "embedding": the cosine.
    """

    kind: str
    test: int
    train: int
    score: float


def words(text: str) -> list[str]:
    """The words of a text without case: runs of letters, digits and underscores. Punctuation is left out."""
    return re.findall(r"\w+", text.casefold())


def grams(sequence: Sequence[T], n: int) -> list[tuple[T, ...]]:
    """The n-grams of a sequence, in order: all runs of `n` consecutive elements. A shorter sequence has none."""
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def exact(train: Sequence[str], test: Sequence[str]) -> list[Overlap]:
    """Test texts that equal a training text but for case, punctuation and white space.

    Args:
        train: the training texts.
        test: the test texts.

    Returns:
        At most one overlap a test text, with the first training text that equals it.
    """
    known: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(train):
        known.setdefault(tuple(words(text)), number)
    asked = enumerate(tuple(words(text)) for text in test)
    return [Overlap("exact", number, known[found], 1.0) for number, found in asked if found and found in known]


def shared_grams(train: Sequence[str], test: Sequence[str], n: int = GRAM, split: Split = words) -> list[Overlap]:
    """Test texts that share an n-gram of words with a training text.

    A test text of fewer than `n` words overlaps with a training text that contains the whole of it. Texts of one
    template share its words ("Question: ... Answer:"): give texts without it.

    Args:
        train: the training texts.
        test: the test texts.
        n: the number of consecutive words.
        split: the words of a text. Give another for texts in which white space does not separate words.

    Returns:
        At most one overlap a test text, with the training text that has most of its n-grams; the highest score first.

    Raises:
        ValueError: n < 1.
    """
    found: list[Overlap] = []
    for number, shares in enumerate(_shares(train, test, n, split)):
        if shares:
            closest = max(sorted(shares), key=lambda other: shares[other])
            found.append(Overlap("n-gram", number, closest, shares[closest]))
    return closest_first(found)


def contaminated(train: Sequence[str], test: Sequence[str], n: int = GRAM, split: Split = words) -> list[bool]:
    """Whether each training text shares an n-gram of words with a test text, by the definition of `shared_grams`.

    Args:
        train: the training texts.
        test: the test texts.
        n: the number of consecutive words.
        split: the words of a text.

    Returns:
        One verdict a training text.

    Raises:
        ValueError: n < 1, or a test text without words.
    """
    for number, text in enumerate(test):
        if not split(text):
            raise ValueError(f"test text {number} has no words: {text!r:.40}")
    hit = {number for shares in _shares(train, test, n, split) for number in shares}
    return [number in hit for number in range(len(train))]


def closest_first(found: list[Overlap]) -> list[Overlap]:
    """Overlaps in order of their score, the highest first, then of the test text."""
    return sorted(found, key=lambda overlap: (-overlap.score, overlap.test))


def _shares(train: Sequence[str], test: Sequence[str], n: int, split: Split) -> list[dict[int, float]]:
    """For each test text, the share of its n-grams that a training text has, by the number of the training text."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: it is the number of words in a stretch")
    asked = [set(grams(told, max(1, min(n, len(told))))) for told in map(split, test)]
    having: dict[tuple[str, ...], list[int]] = {gram: [] for wanted in asked for gram in wanted}
    lengths = {len(gram) for gram in having}
    for number, text in enumerate(train):
        told = split(text)
        for gram in {gram for length in lengths for gram in grams(told, length)} & having.keys():
            having[gram].append(number)
    counts = [Counter(number for gram in wanted for number in having[gram]) for wanted in asked]
    return [
        {number: count / len(wanted) for number, count in found.items()}
        for wanted, found in zip(asked, counts, strict=True)
    ]
