"""Wrappers: trails that are made of other trails. To change a trail, wrap it; do not subclass it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.checking import as_number, as_whole
from tokenpaths.trails.base import Trail, check_trail_given, width_of


class Wrapper(Trail):
    """A trail around one other trail, which starts at the identity if the other does."""

    def __init__(self, trail: Trail) -> None:
        super().__init__()
        check_trail_given(f"what {type(self).__name__} wraps", trail)
        self.trail = trail
        self.starts_at_identity = trail.starts_at_identity


class Scaled(Wrapper):
    """factor * trail(h).

    Args:
        trail: the trail to scale.
        factor: a finite number; `ValueError` is raised for any other.
    """

    def __init__(self, trail: Trail, factor: float) -> None:
        super().__init__(trail)
        if not math.isfinite(as_number("Scaled: factor", factor)):
            raise ValueError(f"Scaled: factor {factor} must be a finite number")
        self.factor = factor

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.factor * self.trail(h)


class Capped(Wrapper):
    """d min(1, cap ||h|| / ||d||) with d = trail(h): no token is moved by more than `cap` times its norm.

    The bound is exact in the trail's dtype. Rounding h + d to a coarser dtype of the model comes after it.

    Args:
        trail: the trail to cap.
        cap: a finite number of at least 0; `ValueError` is raised for any other.
    """

    def __init__(self, trail: Trail, cap: float) -> None:
        super().__init__(trail)
        if not (math.isfinite(as_number("Capped: cap", cap)) and cap >= 0):
            raise ValueError(f"Capped: cap {cap} must be a finite number, at least 0")
        self.cap = cap

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        d = self.trail(h)
        (peak_h, length_h), (peak_d, length_d) = _length(h), _length(d)
        # a few rounding errors below the cap, so that the measured norm never exceeds it
        cap = self.cap * (1 - 8 * torch.finfo(d.dtype).eps)
        ratio = cap * (peak_h / peak_d.clamp_min(1e-30)).clamp_max(1e30) * (length_h / length_d)
        return (d * ratio.clamp_max(1)).to(d.dtype)


class Gated(Wrapper):
    """sigmoid(w.h + b) trail(h): a learned gate, which opens on some states and shuts on others.

    w is in R^d, b is a number; d + 1 parameters beside the trail's. At start w = 0 and b = 0: the gate is half open.

    Args:
        trail: the trail behind the gate.
        dim: the width d of the states.
    """

    def __init__(self, trail: Trail, dim: int) -> None:
        super().__init__(trail)
        self.dim = dim = width_of(type(self).__name__, dim)
        self.w = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return torch.sigmoid(h @ self.w + self.b).unsqueeze(-1) * self.trail(h)


class Guarded(Wrapper):
    """clamp(w.n + b, 0, 1) trail(h) with n = h / rms(h): a gate that is exactly shut on states unlike the task's.

    w is in R^d, b is a number. They are not learned: `guard` finds them from states. A fresh gate is open: w = 0 and
    b = 1. Where it is shut, the displacement is zero, and a text on which it is always shut keeps the frozen model's
    outputs. The gate reads the state at unit scale, as the model's own norms do, so that massive activations cannot
    open it.

    Args:
        trail: the trail behind the gate.
        dim: the width d of the states.
    """

    w: Tensor
    b: Tensor

    def __init__(self, trail: Trail, dim: int) -> None:
        super().__init__(trail)
        self.dim = dim = width_of(type(self).__name__, dim)
        self.register_buffer("w", torch.zeros(dim))
        self.register_buffer("b", torch.ones(()))

    def gate(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens"]:
        """How far the gate is open on each state, from 0 to 1."""
        return (at_unit_scale(h) @ self.w + self.b).clamp(0, 1)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.gate(h).unsqueeze(-1) * self.trail(h)


class Confined(Wrapper):
    """U^T U trail(h) with U U^T = I: the displacement stays in the span of a few directions, the rows of U.

    U is `directions` x d. It is not learned: `confine` finds it from states. A fresh U is the first rows of I.

    Args:
        trail: the trail to confine.
        dim: the width d of the states.
        directions: the number of directions, from 1 to dim; `ValueError` is raised for any other.
    """

    U: Float[Tensor, "directions dim"]

    def __init__(self, trail: Trail, dim: int, directions: int) -> None:
        super().__init__(trail)
        self.dim = dim = width_of(type(self).__name__, dim)
        self.directions = directions = as_whole("Confined: directions", directions, None)
        if not 1 <= directions <= dim:
            raise ValueError(f"Confined: directions {directions} must be from 1 to dim {dim}")
        self.register_buffer("U", torch.eye(dim)[:directions])

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.trail(h) @ self.U.mT @ self.U


class Chain(Trail):
    """d + second(h + d) with d = first(h): the second trail reads the state that the first has moved.

    Args:
        first: the trail that reads the state of the model.
        second: the trail that reads the moved state.
    """

    def __init__(self, first: Trail, second: Trail) -> None:
        super().__init__()
        for place, trail in (("first", first), ("second", second)):
            check_trail_given(f"the {place} trail of Chain", trail)
        self.first = first
        self.second = second
        self.starts_at_identity = first.starts_at_identity and second.starts_at_identity

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        d = self.first(h)
        return d + self.second(h + d)


def at_unit_scale(h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """Each state divided by the root mean square of its entries; 0 for 0."""
    wide = torch.promote_types(h.dtype, torch.float32)
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide).clamp_min(1e-30)
    return (h * (math.sqrt(h.shape[-1]) / length)).to(h.dtype)


def _length(x: Float[Tensor, "*tokens dim"]) -> tuple[Float[Tensor, "*tokens 1"], Float[Tensor, "*tokens 1"]]:
    """Two factors of each norm: the largest entry, and the norm in units of it, from 1 (also for 0) to sqrt(dim).

    With them no square overflows or vanishes, and no root is taken at zero, where it has no gradient.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = x.detach().abs().amax(-1, keepdim=True)
    return peak, (x / peak.clamp_min(1e-30)).square().sum(-1, keepdim=True).clamp_min(1).sqrt()
