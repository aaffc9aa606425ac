"""Imitation: make the model write the answers, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Batch, Example
from tokenpaths.engine.forwards import answers
from tokenpaths.engine.logits import cross_entropy
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective


@dataclass
class Imitate(Objective):
    """Mean cross-entropy of the answer tokens: -1/n sum_t log p(answer_t | all before it), in nats, float32 at least.

    Raises:
        ValueError: an example has no answer.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, example in enumerate(self.examples):
            if not any(example.answer):
                raise ValueError(f"Imitate: example {number} has no answer to imitate")

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        logits, targets = answers(model, batch)
        return logits.sum(cross_entropy, targets) / len(targets)

    def terms(self, examples: Sequence[Example]) -> int:
        return sum(sum(example.answer) for example in examples)
