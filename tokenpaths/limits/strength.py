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
from tokenpaths.undo import tidy


@dataclass(frozen=True)
class AtStrength:
    """Trails at one strength: how well they do the task, and how far they move the model."""

    strength: float
    score: float
    drift: Drift


@tidy
def strength_curve(
    model: nn.Module,
    trails: TrailMap,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    score: Callable[[], float],
    at: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[AtStrength]:
    """Task against drift, over strengths.

    Args:
        model: the model that the trails were trained in.
        trails: trails that are not attached.
        texts: what the drift is measured on, as in `measure_drift`.
        tokenizer: for strings, and for `Match` rules.
        score: how well the model does the task; it is called with the trails attached at each strength.
        at: the strengths, by which displacements are multiplied.

    Raises:
        ValueError: the trails are attached already, or as `measure_drift`.
    """
    found: list[AtStrength] = []
    for strength in at:
        with attached_at(model, trails, strength, tokenizer):
            found.append(AtStrength(strength, score(), measure_drift(model, trails, texts, tokenizer)))
    return found


@tidy
def strength_within(
    model: nn.Module,
    trails: TrailMap,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    budget: float,
    halvings: int = 6,
) -> float:
    """The largest strength in [0, 1] found at which the mean KL(frozen || steered) on `texts` is at most `budget`.

    It is 1 if that is within the budget. Else the interval [0, 1] is halved `halvings` times, on the assumption that
    drift rises with strength. That the result is within the budget is measured and not assumed. To keep it, attach with
    this strength, or wrap each trail as `Scaled(trail, strength)`.

    Args:
        model: the model that the trails were trained in.
        trails: trails that are not attached.
        texts: what the drift is measured on, as in `measure_drift`.
        tokenizer: for strings, and for `Match` rules.
        budget: the most nats a token.
        halvings: how often the interval is halved: the result is less than 2^-halvings below the largest strength.

    Raises:
        ValueError: a budget below 0, texts without a prompt of which the trails move less than half, the trails are
            attached already, or as `measure_drift`.
    """
    if not budget >= 0:
        raise ValueError(f"budget={budget} must be at least 0 nats a token")

    def within(strength: float) -> bool:
        with attached_at(model, trails, strength, tokenizer):
            found = measure_drift(model, trails, texts, tokenizer)
        if found.too_little and not found.answers:
            raise ValueError(f"no strength can be told to keep the budget: {found.too_little}")
        return found["kl"].mean <= budget

    if within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
