"""The contract of an objective: examples, a weight, and a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.handle import attachments
from tokenpaths.checking import as_number, as_whole
from tokenpaths.data.examples import Batch, Example, check_examples
from tokenpaths.site import Host
from tokenpaths.trailmap.adapter import Adapter


@dataclass
class Objective:
    """Something to train for: `weight * loss`, on batches of `examples`.

    To write your own, subclass it as a dataclass and define `loss`. Define `terms` too, if the loss is not a mean over
    examples. While `loss` runs, the trails are attached to the model, in training mode and with gradients; at a weight
    of zero there are no gradients, as the loss is only read.

    Args:
        examples: what it is trained on.
        weight: the weight of its loss in the first step; `reweigh` may change it.
        every: it is trained for in every `every`-th step, from the first on. Its loss is NaN in the others.
        batch_size: examples of it in a step, on each process and in one forward; as many as `steps` takes unless given.

    Raises:
        TypeError: `examples` is no list of `Example`s, or a number is none.
        ValueError: there are no examples, or a number is out of range.
    """

    examples: Sequence[Example] = field(repr=False)
    weight: float = 1.0
    every: int = field(default=1, kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_examples(who, self.examples)
        if not self.examples:
            raise ValueError(f"{who} has no examples to train on")
        if not (math.isfinite(as_number(f"{who}: weight", self.weight)) and self.weight >= 0):
            raise ValueError(f"{who}: weight {self.weight} must be a finite number, at least 0")
        for name, value in (("every", self.every), ("batch_size", self.batch_size)):
            if value is not None:
                as_whole(f"{who}: {name}", value)

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        """The loss of a batch: a mean over its terms."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, trails, batch)")

    def terms(self, examples: Sequence[Example]) -> int:
        """The number of terms that the loss of these examples is the mean of.

        The losses of micro-batches and processes are weighted by it, so that their sum is the loss of all examples.
        """
        return len(examples)

    def reweigh(self, weight: float, loss: float) -> float:
        """The weight in the next step, from the weight and the loss in this one. Here it stays as it is."""
        return weight


def host_of(model: nn.Module, trails: Adapter) -> Host:
    """The model as the attachment of the trails has looked at it; looked at anew for an adapter without attachment."""
    held = (attachment.host for attachment in attachments(model) if attachment.trails is trails)
    return next(held, None) or Host.of(model, trails.blocks)


def tokens_of(batch: Batch) -> list[tuple[int, ...]]:
    """The token ids of each row without padding, by which an objective knows the examples of a batch."""
    real = batch.attention_mask.bool()
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, real, strict=True)]
