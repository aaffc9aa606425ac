"""The nearest training text of each test text, by the hidden states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from tokenpaths.data.contamination import Overlap, closest_first
from tokenpaths.data.encoding import encode_texts
from tokenpaths.engine.means import mean_states
from tokenpaths.engine.readings import Run


def nearest(
    run: Run, train: Sequence[str], test: Sequence[str], tokenizer: Any, *, max_batch_tokens: int = 1500
) -> list[Overlap]:
    """For each test text its nearest training text, by the cosine between mean hidden states after the last block.

    States of a language model all point one way: the mean over all texts is subtracted first. This makes the cosine of
    unrelated texts about 0, and says little about fewer than a dozen texts. The first token is left out, whose state is
    massive in most models, so a text needs two.

    Args:
        run: the model that reads.
        train: training texts.
        test: test texts.
        tokenizer: the model's tokenizer.
        max_batch_tokens: the most tokens in one forward, padding included.

    Returns:
        An `Overlap` for each test text, the closest first.

    Raises:
        ValueError: no texts, or one of fewer than two tokens.
    """
    last = f"block {len(run.host.blocks) - 1}"
    examples = encode_texts([*train, *test], tokenizer)
    means = mean_states(run, examples, last, skip_first=True, max_batch_tokens=max_batch_tokens)
    means = F.normalize(means - means.mean(0), dim=1)
    best = (means[len(train) :] @ means[: len(train)].T).max(1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return closest_first([Overlap("embedding", number, train, score) for number, (train, score) in enumerate(pairs)])
