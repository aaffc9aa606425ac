"""Staying close to the frozen model on rehearsal text, inside a budget that is named and not tuned.

    goals = [Imitate(examples), Stay(plain(tokenizer, texts), within=0.01)]     # nats a token

The frozen model is the same model with the trails off. What is held is a distance D between the two, of one kind a
class. The weight of a `Stay` is a Lagrange multiplier: it rises while D is over the budget, falls while D is inside,
and at zero the objective costs nothing:

    weight <- clip(weight + gain min(D / within - 1, 1), 0, most)        after each step (dual ascent)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Batch
from tokenpaths.engine.answers import forward
from tokenpaths.engine.divergence import at_least_float32, kl_of_rows
from tokenpaths.engine.logits import kl_from, logits_at
from tokenpaths.engine.states import recording, recording_maps
from tokenpaths.site import Host, Place, find_blocks
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective


@dataclass
class Stay(Objective):
    """KL(frozen || steered) of the next token, in nats, the mean over all tokens of the rehearsal texts.

    Args:
        within: the budget, in units of the distance.
        gain: how fast the weight follows: it is added to the weight in a step that is at twice the budget or further,
            and taken from it in one that does not drift at all. At 0 the weight is fixed.
        most: the largest weight.
    """

    within: float = 0.01
    gain: float = 0.1
    most: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("within", "gain", "most"):
            value = getattr(self, name)
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
        """What is compared, of one forward: here `Logits`, so that neither forward holds tokens x words of them."""
        return logits_at(model, lambda: forward(model, batch), batch.attention_mask.bool())

    def distance(self, frozen: Any, steered: Any) -> Float[Tensor, ""]:
        """The distance between two forwards, a mean over the real tokens."""
        return steered.sum(kl_from, frozen) / len(steered)


@dataclass
class StayStates(Stay):
    """||h' - h||^2 / ||h||^2 of the residual stream after each block: the mean over tokens and blocks."""

    def see(self, model: nn.Module, trails: Adapter, batch: Batch) -> list[Tensor]:
        places = {block: Place(block, "output") for block in find_blocks(model, trails.blocks)}
        with recording(places) as states:
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
    """The same states as distributions: single tokens may move, their mean and covariance in a batch may not.

    For each block, (||mu' - mu||^2 + ||C' - C||_F) / tr C, of a batch's tokens; the mean over blocks. The larger the
    batch, the more it says of the distribution.
    """

    def distance(self, frozen: list[Tensor], steered: list[Tensor]) -> Float[Tensor, ""]:
        return torch.stack([_moments_apart(x, y) for x, y in zip(frozen, steered, strict=True)]).mean()


@dataclass
class StayAttention(Stay):
    """KL(frozen || steered) of attention rows, in nats: the mean over tokens, heads and layers. Needs eager attention.

    A model that keeps its attention weights to itself is refused: `model.set_attn_implementation("eager")`.
    """

    def see(self, model: nn.Module, trails: Adapter, batch: Batch) -> list[Tensor]:
        with recording_maps(Host.of(model, trails.blocks)) as maps:
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
