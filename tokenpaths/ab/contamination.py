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
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokenpaths.data import collate, plain
from tokenpaths.drift.readings import Run, look

GRAM = 8
"""Words of a stretch."""
CLOSE = 0.95
"""Cosine from which two texts count as close."""


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
    return _closest_first(found)


def nearest(run: Run, tokenizer: Any, train: Sequence[str], test: Sequence[str], batch: int = 8) -> list[Overlap]:
    """For each test text its nearest training text, by the cosine between mean hidden states after the last block.

    States of a language model all point one way: the mean over all texts is subtracted first, which makes the cosine
    of unrelated texts about 0 (and says little about fewer than a dozen texts). The first token is left out, whose
    state is massive in most models, and so a text needs two. Compare with `CLOSE`.

    Raises:
        ValueError: no texts, or one of fewer than two tokens.
    """
    means = _means(run, tokenizer, [*train, *test], batch)
    means = means - means.mean(0)
    cosines = F.normalize(means[len(train) :], dim=1) @ F.normalize(means[: len(train)], dim=1).T
    best = cosines.max(1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return _closest_first([Overlap("embedding", number, train, score) for number, (train, score) in enumerate(pairs)])


def _means(run: Run, tokenizer: Any, texts: Sequence[str], batch: int) -> Float[Tensor, "texts dim"]:
    examples = plain(tokenizer, texts)
    order = sorted(range(len(texts)), key=lambda i: len(examples[i]))  # little padding
    means: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for i, reading in zip(rows, look(run, collate([examples[i] for i in rows])), strict=True):
            last = [name for name in reading.states if name.startswith("block")][-1]
            means[i] = reading.states[last][1:].double().mean(0).cpu()
    return torch.stack([means[i] for i in range(len(texts))])


def _closest_first(found: list[Overlap]) -> list[Overlap]:
    return sorted(found, key=lambda overlap: (-overlap.score, overlap.test))


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _grams(words: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    return {words[i : i + n] for i in range(len(words) - n + 1)} if n else set()
