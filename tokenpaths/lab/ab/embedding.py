"""The nearest training text of each test text, by the hidden states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokenpaths.data.contamination import Overlap, closest_first
from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.examples import collate
from tokenpaths.engine.readings import Run, read_one

CLOSE = 0.95


"""Cosine from which two texts count as close."""


def nearest(run: Run, train: Sequence[str], test: Sequence[str], tokenizer: Any, batch: int = 8) -> list[Overlap]:
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
    return closest_first([Overlap("embedding", number, train, score) for number, (train, score) in enumerate(pairs)])


def _means(run: Run, tokenizer: Any, texts: Sequence[str], batch: int) -> Float[Tensor, "texts dim"]:
    examples = encode_texts(texts, tokenizer)
    order = sorted(range(len(texts)), key=lambda i: len(examples[i]))  # little padding
    means: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for i, reading in zip(rows, read_one(run, collate([examples[i] for i in rows])), strict=True):
            last = [name for name in reading.states if name.startswith("block")][-1]
            means[i] = reading.states[last][1:].double().mean(0).cpu()
    return torch.stack([means[i] for i in range(len(texts))])
