"""What a model makes of texts and choices, and what has changed, with 95 % intervals over items.

Whatever is attached to the model is at work. An example that is all prompt is read from its second token on; of any
other the answer alone is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenpaths import Example
from tokenpaths.data import Choice
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, nats, right
from tokenpaths.stats.intervals import mean_interval

TOKENS = 1500  # of a batch; more is no quicker on a CPU, and the logits of 1500 tokens of SmolLM2 take 300 MB

Kinds = Mapping[str, Sequence[Example]]
Values = Sequence[float] | np.ndarray


def nats_of(model: Any, texts: Kinds) -> dict[str, list[float]]:
    """Of each kind of text, the nats of each example."""
    return {kind: nats(model, examples, TOKENS)[0].tolist() for kind, examples in texts.items()}


def counts_of(texts: Kinds) -> dict[str, list[int]]:
    """Of each kind of text, over how many tokens these nats are."""
    return {kind: [sum(e.answer) or len(e) - 1 for e in examples] for kind, examples in texts.items()}


def correct(model: Any, tokenizer: Any, items: Sequence[Choice]) -> list[float]:
    """1 for each item whose right option has the largest summed log-likelihood, 1/k where k options have it, else 0."""
    return right(log_likelihoods(model, encode_choices(items, tokenizer), TOKENS), items).tolist()


def lost(before: Values, after: Values, counts: Sequence[int]) -> float:
    """Nats a token that a model has lost."""
    return float((np.sum(after) - np.sum(before)) / np.sum(counts))


class Change(NamedTuple):
    """An estimate with its interval."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def points(before: Values, after: Values) -> Change:
    """100 (mean after - mean before), in pairs: what both got for the same items."""
    change = 100 * (np.asarray(after, float) - np.asarray(before, float))
    return Change(float(change.mean()), *mean_interval(change))


def perplexity_ratio(before: Values, after: Values, counts: Values) -> Change:
    """exp(sum (after - before) / sum counts), in pairs, from the nats of each text."""
    change, weights = np.asarray(after, float) - np.asarray(before, float), np.asarray(counts, float)
    return Change(*(float(np.exp(x)) for x in (change.sum() / weights.sum(), *mean_interval(change, weights))))
