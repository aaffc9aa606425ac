"""The contract of an objective: examples, a weight, and a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Batch, Example
from tokenpaths.trailmap.adapter import Adapter


@dataclass
class Objective:
    """Something to train for: `weight * loss`, on batches of `examples`.

    To write your own, subclass as a dataclass and define `loss`; and `terms`, if the loss is not a mean over examples.
    While `loss` runs, the trails are attached to the model, in training mode and with gradients (but not while the
    weight is zero: then the loss is only read).

    Args:
        examples: what it is trained on.
        weight: of its loss, at the first step; `reweigh` may change it.
        every: train for it in every so many steps only, from the first; its loss is NaN in the others.
        batch_size: examples of it in a step, on each process and in one forward, where they are not to be as many as
            `steps` takes.
    """

    examples: Sequence[Example] = field(repr=False)
    weight: float = 1.0
    every: int = field(default=1, kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(f"{type(self).__name__} has no examples to train on")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"{type(self).__name__}: weight {self.weight} must be a finite number, at least 0")
        for name, value in (("every", self.every), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be at least 1")

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        """The loss of a batch: a mean over its terms."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, trails, batch)")

    def terms(self, examples: Sequence[Example]) -> int:
        """How many terms the loss of these examples is the mean of.

        Batches that are split over micro-batches or processes are weighted by it, so that however the examples are
        split the sum is the loss of them all.
        """
        return len(examples)

    def reweigh(self, weight: float, loss: float) -> float:
        """The weight of the next step, from that of this one and the loss it had: as it was, unless told otherwise."""
        return weight
