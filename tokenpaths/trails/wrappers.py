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
        self.starts_at_identity = trail.starts_at_identity

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
        self.starts_at_identity = trail.starts_at_identity

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        d = self.trail(h)
        (peak_h, length_h), (peak_d, length_d) = _length(h), _length(d)
        # a few rounding errors below the cap, so that the measured norm never exceeds it
        cap = self.cap * (1 - 8 * torch.finfo(d.dtype).eps)
        ratio = cap * (peak_h / peak_d.clamp_min(1e-30)).clamp_max(1e30) * (length_h / length_d)
        return (d * ratio.clamp_max(1)).to(d.dtype)


class Gated(Trail):
    """sigmoid(w.h + b) * trail(h): the trail opens on some states and stays shut on others.

    d + 1 parameters of its own; w = 0 and b = 0 at start, a gate half open.
    """

    def __init__(self, trail: Trail, dim: int) -> None:
        super().__init__()
        self.trail = trail
        self.dim = dim
        self.starts_at_identity = trail.starts_at_identity
        self.w = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return torch.sigmoid(h @ self.w + self.b).unsqueeze(-1) * self.trail(h)


class Guarded(Trail):
    """clamp(w.n + b, 0, 1) * trail(h), n = h / rms(h): a gate, exactly shut on states that are not like the task's.

    w and b are not learned: `guard` finds them, from states. A fresh gate is open: w = 0, b = 1.
    Where it is shut the displacement is zero, so a text on all of whose tokens it is shut keeps the frozen model's
    outputs. It reads the state at unit scale, as the model's own norms do, so that massive activations cannot open it.
    """

    w: Tensor
    b: Tensor

    def __init__(self, trail: Trail, dim: int) -> None:
        super().__init__()
        self.trail = trail
        self.dim = dim
        self.starts_at_identity = trail.starts_at_identity
        self.register_buffer("w", torch.zeros(dim))
        self.register_buffer("b", torch.ones(()))

    def gate(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens"]:
        """How far the gate is open on each state, from 0 to 1."""
        return (at_unit_scale(h) @ self.w + self.b).clamp(0, 1)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.gate(h).unsqueeze(-1) * self.trail(h)


class Confined(Trail):
    """U^T U trail(h), with U U^T = I: the displacement stays in the span of `directions` chosen directions.

    U is not learned: `confine` finds it, from states. A fresh U holds the first coordinates.
    """

    U: Float[Tensor, "directions dim"]

    def __init__(self, trail: Trail, dim: int, directions: int) -> None:
        super().__init__()
        if not 1 <= directions <= dim:
            raise ValueError(f"Confined: directions {directions} must be from 1 to dim {dim}")
        self.trail = trail
        self.dim = dim
        self.directions = directions
        self.starts_at_identity = trail.starts_at_identity
        self.register_buffer("U", torch.eye(dim)[:directions])

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.trail(h) @ self.U.mT @ self.U


class Chain(Trail):
    """One trail after another: the second reads the state as the first has moved it."""

    def __init__(self, first: Trail, second: Trail) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.starts_at_identity = first.starts_at_identity and second.starts_at_identity

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        d = self.first(h)
        return d + self.second(h + d)


def at_unit_scale(h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """The state divided by the root mean square of its entries; 0 for 0."""
    wide = torch.promote_types(h.dtype, torch.float32)
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide).clamp_min(1e-30)
    return (h * (math.sqrt(h.shape[-1]) / length)).to(h.dtype)


def _length(x: Float[Tensor, "*tokens dim"]) -> tuple[Float[Tensor, "*tokens 1"], Float[Tensor, "*tokens 1"]]:
    """Two factors of the norm: the largest entry, and the length in units of it, from 1 (also of 0) to sqrt(dim).

    So no square overflows or vanishes, and no root is taken at zero, where it has no gradient.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = x.detach().abs().amax(-1, keepdim=True)
    return peak, (x / peak.clamp_min(1e-30)).square().sum(-1, keepdim=True).clamp_min(1).sqrt()
