"""Replay: go on writing the original data while something else is learned.

    goals = [Imitate(task), Replay(encode_texts(texts, tokenizer), weight=0.3, every=3, batch_size=1)]

Two goals keep the two losses, their weights and their token counts apart. With B task examples a step, and b =
`batch_size` texts in one of k = `every` steps, the share of texts is b / (k B + b): 1.03 % at B = 32, k = 3, b = 1, the
same in any k steps in a row. A share of the items, in one stream and one mean over tokens, is
`Replay(mix(task, texts, 0.01))`.

`Replay` pulls towards the data, whatever the frozen model made of them, so its weight is found by trial. `Stay` pulls
towards the frozen model on any text, within a budget; with `gain=0` it is replay by KL at a fixed weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import IGNORED, Batch, Example
from tokenpaths.engine.forwards import answers
from tokenpaths.engine.logits import cross_entropy
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective


@dataclass
class Replay(Objective):
    """Mean cross-entropy of original data: -1/n sum_t log p(token_t | all before it), in nats, in float32 at least.

    Of an example that has an answer, the tokens t are those of the answer, as in `Imitate`. Of one that has none, from
    `encode_texts`, they are all but the first. Token rules see the examples as they are: a text is all prompt.

    Raises:
        ValueError: an example has one token.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, example in enumerate(self.examples):
            if not _count(example):
                raise ValueError(f"Replay: example {number} has one token, and none after it to predict")

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        real = batch.attention_mask.bool()
        all_prompt = (batch.labels == IGNORED).all(1, keepdim=True)
        written = all_prompt & real & (real.cumsum(1) > 1)  # nothing predicts the first real token
        labels = torch.where(written, batch.input_ids, batch.labels)
        logits, targets = answers(model, replace(batch, labels=labels))
        return logits.sum(cross_entropy, targets) / len(targets)

    def terms(self, examples: Sequence[Example]) -> int:
        return sum(map(_count, examples))


def _count(example: Example) -> int:
    """The number of tokens of an example that the loss is taken of."""
    return sum(example.answer) or len(example) - 1
