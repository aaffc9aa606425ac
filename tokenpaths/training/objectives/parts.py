"""Answers made of parts, such as steps and a final answer, each with its own weight.

examples = encode_parts([("2 + 3 + 4 =", {"steps": " 5", "answer": " 9."})], tokenizer)
goals = [
ImitateParts(examples, parts={"steps": 0.5, "answer": 1.0}),
ImitateParts(examples, parts={"answer": 1.0}, weight=0.0, every=10),  # reads the answer's loss apart
]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.checking import as_number, quoted
from tokenpaths.data.examples import IGNORED, Batch, Example
from tokenpaths.engine.forwards import answers
from tokenpaths.engine.logits import cross_entropy
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective


@dataclass
class ImitateParts(Objective):
    """Cross-entropy by parts: 1/n sum_parts w_part sum_(t in part) -log p(answer_t | all before it), in nats, float32.

    n is the number of tokens of the parts, whatever their weights. Answer tokens of parts that are not named are not
    trained. With one part of weight 1 it is the mean loss of that part; with `weight=0.0` the goal reads that loss and
    trains nothing.

    Args:
        examples: what it is trained on, from `encode_parts`.
        parts: the weight of each part, by the name of its span.

    Raises:
        ValueError: no parts, a weight that is negative or not finite, an example with none of the parts, parts that
            share a token, or a part with tokens that are not of the answer.
    """

    parts: Mapping[str, int | float] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.parts, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f'ImitateParts: parts are weights by name, as in {{"answer": 1.0}}, not {quoted(self.parts)}'
            )
        if not self.parts:
            raise ValueError('ImitateParts: name the parts to learn, as in parts={"steps": 0.5, "answer": 1.0}')
        for name, weight in self.parts.items():
            if not (math.isfinite(as_number(f"ImitateParts: weight of part {name!r}", weight)) and weight >= 0):
                raise ValueError(f"ImitateParts: weight {weight} of part {name!r} must be finite and at least 0")
        for number, example in enumerate(self.examples):
            chosen = [i for name in self.parts for i in range(*example.spans.get(name, (0, 0)))]
            names = ", ".join(map(repr, self.parts))
            if not chosen:
                known = ", ".join(map(repr, example.spans)) or "none"
                raise ValueError(f"ImitateParts: example {number} has none of the parts {names}; its spans: {known}")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"ImitateParts: the parts {names} of example {number} share a token")
            if not all(example.answer[i] for i in chosen):
                raise ValueError(
                    f"ImitateParts: the parts {names} of example {number} hold tokens that are not of its answer"
                )

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        weights = torch.zeros(batch.labels.shape, device=batch.labels.device)
        learned = torch.zeros_like(batch.labels, dtype=torch.bool)
        for name, weight in self.parts.items():
            if name in batch.spans:  # otherwise no example of this batch has the part
                weights[batch.spans[name]] = weight
                learned |= batch.spans[name]
        logits, targets = answers(model, replace(batch, labels=batch.labels.where(learned, IGNORED)))
        return logits.sum(_weighted, targets, weights[:, 1:][learned[:, 1:]]) / len(targets)

    def terms(self, examples: Sequence[Example]) -> int:
        spans = [example.spans.get(name, (0, 0)) for example in examples for name in self.parts]
        return sum(stop - start for start, stop in spans)


def _weighted(
    logits: Float[Tensor, "m vocab"], targets: Int[Tensor, " m"], weights: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    return weights * cross_entropy(logits, targets)
