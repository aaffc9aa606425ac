"""The trails that every law is run over: one line each. A new trail is one line here, and inherits all tests.

TRAILS["LoReFT"](16)     a fresh one for states of width 16 (at least 4)
MOVING["LoReFT"](16)     the same, moved away from the identity: always the same numbers for one name and width
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenpaths import (
    PSR,
    RED,
    Additive,
    BiasReFT,
    Capped,
    Chain,
    ConstantReFT,
    DirectReFT,
    DiReFT,
    Gated,
    LoReFT,
    NoReFT,
    ReFTr1,
    Scaled,
    Trail,
)

TRAILS: dict[str, Callable[[int], Trail]] = {
    "LoReFT": lambda dim: LoReFT(dim, 4),
    "NoReFT": lambda dim: NoReFT(dim, 4),
    "DiReFT": lambda dim: DiReFT(dim, 4),
    "DirectReFT": lambda dim: DirectReFT(dim, 4),
    "ConstantReFT": lambda dim: ConstantReFT(dim, 4),
    "BiasReFT": lambda dim: BiasReFT(dim, 4),
    "Additive": lambda dim: Additive(dim),
    "RED": lambda dim: RED(dim),
    "ReFTr1": lambda dim: ReFTr1(dim),
    "PSR": lambda dim: PSR(dim),
    "Scaled": lambda dim: Scaled(NoReFT(dim, 2), 0.5),
    "Capped": lambda dim: Capped(LoReFT(dim, 2), 0.1),
    "Gated": lambda dim: Gated(DiReFT(dim, 2), dim),
    "Chain": lambda dim: Chain(LoReFT(dim, 2), RED(dim)),
    "nested": lambda dim: Capped(Gated(Chain(Scaled(LoReFT(dim, 1), 2.0), Additive(dim)), dim), 0.5),
}


def moving(make: Callable[[int], Trail]) -> Callable[[int], Trail]:
    """The same trail with noise on every parameter. A ReLU gate (ReFTr1, PSR) still stays shut on some states."""

    def moved(dim: int) -> Trail:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(dim)
            trail = make(dim)
            for parameter in trail.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return trail

    return moved


MOVING: dict[str, Callable[[int], Trail]] = {name: moving(make) for name, make in TRAILS.items()}
