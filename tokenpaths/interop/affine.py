"""Trails that are affine, and what they make of a linear map.

The displacement of a state y is B (M y + k), with B d x r, M r x d, and k in R^r:

    LoReFT R^T, W - R, b       NoReFT P^T, W - P, b     DiReFT W2^T, W1, b     DirectReFT R^T, W, b
    ConstantReFT R^T, -R, b    BiasReFT R^T, 0, b       Additive v, 0, 1       RED I, diag(s - 1), b

Scaled, Chain and Confined trails of affine ones are affine. Where y = A x + c is what a linear map makes, and f the
strength, the moved state is that of another map, A' = A + f B M A, c' = c + f B (M c + k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.trails.base import Trail
from tokenpaths.trails.reft import BiasReFT, ConstantReFT, DirectReFT, DiReFT, LoReFT, NoReFT
from tokenpaths.trails.steering import RED, Additive
from tokenpaths.trails.wrappers import Chain, Confined, Scaled


@dataclass(frozen=True)
class Affine:
    """B (M y + k), in float64. `full` tells that it has no low rank."""

    B: Float[Tensor, "dim rank"]
    M: Float[Tensor, "rank dim"]
    k: Float[Tensor, " rank"]
    full: bool = False

    @property
    def constant(self) -> Float[Tensor, " dim"] | None:
        """The displacement, if it is the same for every state."""
        return None if bool(self.M.any()) else self.B @ self.k

    def times(self, factor: float) -> Affine:
        return Affine(factor * self.B, self.M, self.k, self.full)

    def then(self, second: Affine) -> Affine:
        """This one, and then another that reads the moved state."""
        M = torch.cat([self.M, second.M + second.M @ self.B @ self.M])
        k = torch.cat([self.k, second.k + second.M @ self.B @ self.k])
        return Affine(torch.cat([self.B, second.B], 1), M, k, self.full or second.full)


@torch.no_grad()
def affine(trail: Trail) -> Affine | None:
    """The parts of a trail, as it moves states in evaluation; None for one that is not affine."""
    own: Any = trail
    if isinstance(trail, Chain):
        first, second = affine(trail.first), affine(trail.second)
        return None if first is None or second is None else first.then(second)
    if isinstance(trail, (Scaled, Confined)):
        inner = affine(trail.trail)
        if inner is None or isinstance(trail, Scaled):
            return inner and inner.times(own.factor)
        return Affine(own.U.double().mT @ (own.U.double() @ inner.B), inner.M, inner.k, inner.full)
    if type(trail) not in _PARTS:  # a subclass may do something else
        return None
    B, M, k = (part.detach().double() for part in _PARTS[type(trail)](own))
    return Affine(B, M, k, full=type(trail) is RED)


_PARTS: Mapping[type[Trail], Callable[[Any], tuple[Tensor, Tensor, Tensor]]] = {
    LoReFT: lambda t: (t.R.mT, t.W - t.R, t.b),
    NoReFT: lambda t: (t.P.mT, t.W - t.P, t.b),
    DiReFT: lambda t: (t.W2.mT, t.W1, t.b),
    DirectReFT: lambda t: (t.R.mT, t.W, t.b),
    ConstantReFT: lambda t: (t.R.mT, -t.R, t.b),
    BiasReFT: lambda t: (t.R.mT, torch.zeros_like(t.R), t.b),
    Additive: lambda t: (t.v[:, None], torch.zeros_like(t.v)[None], torch.ones_like(t.v[:1])),
    RED: lambda t: (torch.eye(t.dim, device=t.s.device), torch.diag(t.s - 1), t.b),
}
