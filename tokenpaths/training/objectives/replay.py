"""Rehearsal: go on writing the original data, while something else is learned.

    goals = [Imitate(task), Rehearse(plain(tokenizer, texts), weight=0.3, every=3, batch_size=1)]

Two goals keep the two losses, their weights and their token counts apart. Of B task examples a step and b = batch_size
texts every k = every steps, the share of texts is b / (k B + b) (1.03 % at B = 32, k = 3, b = 1), the same in any
k steps in a row. A share to the item, in one stream and one mean over tokens, is `Rehearse(mix(task, texts, 0.01))`.

`Rehearse` pulls towards the data, whatever the frozen model made of it, so its weight is to be found by trial. `Stay`
pulls towards the frozen model on any text, inside a budget; with `gain=0` it is rehearsal by KL at a fixed weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import IGNORED, Batch, Example
from tokenpaths.engine.answers import answer_logits
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective


@dataclass
class Replay(Objective):
    """Mean cross-entropy of original data: -1/n sum_t log p(token_t | all before it), in nats, in float32 at least.

    The tokens t are the answer tokens of an example that has an answer, as in `Imitate`, and of one that has none (from
    `plain`) all but the first. Token rules see the examples as they are: a plain text is all prompt.

    Raises `ValueError` for a text of one token.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, example in enumerate(self.examples):
            if not _count(example):
                raise ValueError(f"Rehearse: example {number} has one token, and none after it to predict")

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        real = batch.attention_mask.bool()
        all_prompt = (batch.labels == IGNORED).all(1, keepdim=True)
        written = all_prompt & real & (real.cumsum(1) > 1)  # nothing predicts the first real token
        labels = torch.where(written, batch.input_ids, batch.labels)
        logits, targets = answer_logits(model, replace(batch, labels=labels))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def terms(self, examples: Sequence[Example]) -> int:
        return sum(map(_count, examples))


def _count(example: Example) -> int:
    """How many tokens of an example are rehearsed."""
    return sum(example.answer) or len(example) - 1
