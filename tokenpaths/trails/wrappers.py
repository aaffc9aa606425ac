"""Wrappers: a trail made of other trails. Wrap to change a trail; do not subclass it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.trails.base import Trail


class Scaled(Trail):
    """factor * trail(h)."""

    def __init__(self, trail: Trail, factor: float) -> None:
        super().__init__()
        if not math.isfinite(factor):
            raise ValueError(f"Scaled: factor {factor} must be a finite number")
        self.trail = trail
        self.factor = factor

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.factor * self.trail(h)


class Capped(Trail):
    """trail(h), shortened where it is longer than `cap` times the state: ||displacement|| <= cap ||h|| for each token.

    d min(1, cap ||h|| / ||d||). The bound is exact in the trail's dtype; rounding h + d to a coarser model dtype comes
    after it.
    """

    def __init__(self, trail: Trail, cap: float) -> None:
        super().__init__()
        if not (math.isfinite(cap) and cap >= 0):
            raise ValueError(f"Capped: cap {cap} must be a finite number, at least 0")
        self.trail = trail
        self.cap = cap

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        d = self.trail(h)
        # the norm has no gradient at zero: keep the root away from it (a longer length only shortens d more)
        length = d.square().sum(-1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny ** 0.5).sqrt()
        # a few rounding errors below the cap, so that the measured norm never exceeds it
        limit = self.cap * (1 - 8 * torch.finfo(d.dtype).eps) * h.norm(dim=-1, keepdim=True)
        return d * (limit / length).clamp_max(1)


class Gated(Trail):
    """sigmoid(w.h + b) * trail(h): the trail opens on some states and stays shut on others.

    d + 1 parameters of its own; w = 0 and b = 0 at start, a gate half open.
    """

    def __init__(self, trail: Trail, dim: int) -> None:
        super().__init__()
        self.trail = trail
        self.dim = dim
        self.w = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return torch.sigmoid(h @ self.w + self.b).unsqueeze(-1) * self.trail(h)


class Chain(Trail):
    """One trail after another: the second reads the state as the first has moved it."""

    def __init__(self, first: Trail, second: Trail) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        d = self.first(h)
        return d + self.second(h + d)
