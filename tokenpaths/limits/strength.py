"""How strongly trails act: task against drift over strengths, and the largest strength within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenpaths.data.examples import Example
from tokenpaths.drift.meter import measure_drift
from tokenpaths.drift.report import Drift
from tokenpaths.limits.states import attached_at
from tokenpaths.trailmap.trailmap import TrailMap


@dataclass(frozen=True)
class AtStrength:
    """Trails at one strength: what they can do, and what they cost."""

    strength: float
    score: float
    measure_drift: Drift


def strength_curve(
    model: nn.Module,
    trails: TrailMap,
    score: Callable[[], float],
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    at: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[AtStrength]:
    """Task against drift, over strengths: `score()` is called with the trails attached at each.

    Raises `ValueError` for trails that are attached already.
    """
    found: list[AtStrength] = []
    for strength in at:
        with attached_at(model, trails, strength, tokenizer):
            found.append(AtStrength(strength, score(), measure_drift(model, trails, texts, tokenizer)))
    return found


def strength_within(
    model: nn.Module,
    trails: TrailMap,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    budget: float,
    halvings: int = 6,
) -> float:
    """The largest strength in [0, 1] found at which the mean KL(frozen || steered) on `texts` is at most `budget` nats.

    1 if that is within the budget, else by halving the interval `halvings` times, which takes it that drift rises with
    strength; that the answer is within the budget is measured in any case. To keep it, attach with this strength, or
    wrap each trail as `Scaled(trail, strength)`.

    Raises `ValueError` for a budget below 0 and for trails that are attached already.
    """
    if not budget >= 0:
        raise ValueError(f"budget={budget} must be at least 0 nats a token")
    low, high = 0.0, 2.0  # so that the first to be tried is 1
    for _ in range(halvings + 1):
        middle = (low + high) / 2
        with attached_at(model, trails, middle, tokenizer):
            mean = measure_drift(model, trails, texts, tokenizer)["kl"].mean
        low, high = (middle, high) if mean <= budget else (low, middle)
        if low == 1.0:
            break
    return low
