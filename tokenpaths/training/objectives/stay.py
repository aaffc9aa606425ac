"""Staying close to the frozen model on rehearsal text, within a budget.

    goals = [Imitate(examples), Stay(encode_texts(texts, tokenizer), within=0.01)]     # nats a token

The frozen model is the same model with the trails off. Each class holds one kind of distance D between the two models.
The weight of a `Stay` is a Lagrange multiplier: it rises while D is over the budget and falls while D is inside. At
zero the objective is read and not trained:

    weight <- clip(weight + gain min(D / within - 1, 1), 0, most)        after each step (dual ascent)

In each step in which it is due it costs two forwards of its texts, the frozen one without gradients, and a backward. At
weight 0 it costs the two forwards still, since D tells when the weight has to rise: `every=4` reads it a fourth as
often. A cone leaves of the frozen forward its output embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.checking import as_number
from tokenpaths.data.examples import Batch
from tokenpaths.engine.divergence import at_least_float32, kl_of_rows
from tokenpaths.engine.forwards import forward
from tokenpaths.engine.logits import kl_from, logits_at
from tokenpaths.engine.states import recording, recording_maps
from tokenpaths.site import Place
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective, host_of


@dataclass
class Stay(Objective):
    """KL(frozen || steered) of the next token, in nats, the mean over all tokens of the rehearsal texts.

    Args:
        examples: the rehearsal texts.
        within: the budget, in units of the distance.
        gain: added to the weight after a step at twice the budget or more, and taken from it after a step without any
            drift. At 0 the weight is fixed.
        most: the largest weight.

    Raises:
        ValueError: a number is negative or not finite, or the budget is 0.
    """

    within: float = 0.01
    gain: float = 0.1
    most: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("within", "gain", "most"):
            value = as_number(f"{type(self).__name__}: {name}", getattr(self, name))
            if not (math.isfinite(value) and value >= 0) or (name == "within" and value == 0):
                raise ValueError(f"{type(self).__name__}: {name}={value} must be a finite number above 0")

    def reweigh(self, weight: float, loss: float) -> float:
        return min(max(weight + self.gain * min(loss / self.within - 1, 1), 0.0), self.most)

    def terms(self, examples: Any) -> int:
        return sum(len(example) for example in examples)

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        with trails.off(), torch.no_grad():
            frozen = self.see(model, trails, batch)
        return self.distance(frozen, self.see(model, trails, batch))

    def see(self, model: nn.Module, trails: Adapter, batch: Batch) -> Any:
        """What is compared, from one forward: here `Logits`, so that no forward holds the logits of all tokens."""
        return logits_at(model, lambda: forward(model, batch), batch.attention_mask.bool())

    def distance(self, frozen: Any, steered: Any) -> Float[Tensor, ""]:
        """The distance between two forwards, a mean over the real tokens."""
        return steered.sum(kl_from, frozen) / len(steered)


@dataclass
class StayStates(Stay):
    """||h' - h||^2 / ||h||^2 of the residual stream after each block, the mean over tokens and blocks."""

    def see(self, model: nn.Module, trails: Adapter, batch: Batch) -> list[Tensor]:
        blocks = host_of(model, trails).blocks
        with recording({block: Place(block, "output") for block in blocks}) as states:
            forward(model, batch)
        real = batch.attention_mask.bool()
        return [at_least_float32(h[real]) for h in states.values()]

    def distance(self, frozen: list[Tensor], steered: list[Tensor]) -> Float[Tensor, ""]:
        shares = [
            (y - x).square().sum(-1) / x.square().sum(-1).clamp_min(1e-12) for x, y in zip(frozen, steered, strict=True)
        ]
        return torch.stack(shares).mean()


@dataclass
class StayMoments(StayStates):
    """(||mu' - mu||^2 + ||C' - C||_F) / tr C of the states after each block, the mean over blocks.

    mu and C are mean and covariance of the states of a batch's tokens: single tokens may move, their distribution may
    not. The larger the batch, the better it shows the distribution.
    """

    def distance(self, frozen: list[Tensor], steered: list[Tensor]) -> Float[Tensor, ""]:
        return torch.stack([_moments_apart(x, y) for x, y in zip(frozen, steered, strict=True)]).mean()


@dataclass
class StayAttention(Stay):
    """KL(frozen || steered) of attention rows, in nats: the mean over tokens, heads and layers. Needs eager attention.

    Raises:
        ValueError: in the forward, if the model gives no attention maps: `model.set_attn_implementation("eager")`.
    """

    def see(self, model: nn.Module, trails: Adapter, batch: Batch) -> list[Tensor]:
        with recording_maps(host_of(model, trails)) as maps:
            forward(model, batch)
        if not maps:
            raise ValueError(
                f"found no attention in the blocks of {type(model).__name__}, which StayAttention compares"
            )
        real = batch.attention_mask.bool()
        rows = [rearrange(m, "batch heads query key -> batch query heads key")[real] for m in maps.values()]
        return [at_least_float32(row) for row in rows]

    def distance(self, frozen: list[Tensor], steered: list[Tensor]) -> Float[Tensor, ""]:
        return torch.stack([kl_of_rows(p, q).mean() for p, q in zip(frozen, steered, strict=True)]).mean()


def _moments_apart(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    mean, moved = x.mean(0), y.mean(0)
    x, y = x - mean, y - moved
    if len(x) <= x.shape[1]:  # ||C' - C||_F without forming d x d: with few tokens the Gram matrices are smaller
        square = (y @ y.mT).square().sum() - 2 * (x @ y.mT).square().sum() + (x @ x.mT).square().sum()
        apart = square.clamp_min(1e-20).sqrt()
    else:
        apart = (y.mT @ y - x.mT @ x).square().sum().clamp_min(1e-20).sqrt()
    return ((moved - mean).square().sum() * len(x) + apart) / x.square().sum().clamp_min(1e-12)
