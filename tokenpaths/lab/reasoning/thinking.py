"""What thinking longer buys: control, scaling and performance of a method of test-time scaling (s1, section 3.2).

levels = [Level(tokens, right, least=100, most=100), Level(tokens2, right2, least=200, most=200)]
found = scaling(levels)
print(found)
scaling_picture(found).savefig("scaling.png")
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from tokenpaths.files import write_text
from tokenpaths.stats.intervals import Interval, wilson

_DRAWS = 2000


@dataclass(frozen=True)
class Level:
    """One setting of the budget, run over all questions: of each question its thinking tokens and whether it was right.

    `least` and `most` are the thinking tokens that were asked for (None: not limited on that side).
    """

    tokens: Sequence[int]
    right: Sequence[bool]
    least: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class Point:
    """The mean thinking tokens and the accuracy of a level, with the 95 % Wilson interval of the accuracy."""

    tokens: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Scaling:
    """The three figures of s1, each with its 95 % interval, and the points that they come from, by tokens.

    `slope` is in accuracy per 1,000 thinking tokens; None where all levels have the same mean tokens.
    """

    control: float
    control_interval: Interval
    slope: float | None
    slope_interval: Interval | None
    performance: float
    performance_interval: Interval
    questions: int
    points: tuple[Point, ...]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False))

    def __str__(self) -> str:
        lines = [f"{'thinking tokens':>15}  accuracy [95 % interval], {self.questions} questions"]
        lines += [f"{p.tokens:15.1f}  {p.accuracy:.3f} {_interval(p.interval)}" for p in self.points]
        lines.append(f"control      {self.control:.3f} {_interval(self.control_interval)}")
        if self.slope is None or self.slope_interval is None:
            lines.append("scaling      unknown: all levels think equally long")
        else:
            lines.append(f"scaling      {self.slope:+.3f} {_interval(self.slope_interval)} per 1,000 tokens")
        lines.append(f"performance  {self.performance:.3f} {_interval(self.performance_interval)}")
        return "\n".join(lines)


def scaling(levels: Sequence[Level], *, seed: int = 0) -> Scaling:
    """Control, scaling and performance of levels A (s1, equations 1 to 3), every one on the same questions in order.

        control      the share of all runs whose thinking tokens lie within what their level asked for
        scaling      1 / |P| sum over pairs (a, b) in P of (f(b) - f(a)) / (b - a)
        performance  max f(a)

    with a the mean thinking tokens of a level, f(a) its accuracy and P the pairs of levels with a < b. The interval of
    control is Wilson's, which takes runs as independent. Those of the slope and of performance are percentile
    bootstraps over questions, the same questions for all levels; draws in which all levels think equally long are left
    out. A maximum over noisy levels is biased upward, in every draw as in the figure itself.

    Raises:
        ValueError: no levels, or levels of different numbers of questions.
    """
    sizes = {len(part) for level in levels for part in (level.tokens, level.right)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "every level needs one count of tokens and one verdict for each of the same questions, but the levels have "
            f"{sorted(sizes)}"
        )
    order = sorted(range(len(levels)), key=lambda i: float(np.mean(levels[i].tokens)))
    tokens = np.array([levels[i].tokens for i in order], dtype=np.float64)
    right = np.array([levels[i].right for i in order], dtype=np.float64)
    within = np.concatenate([_within(level) for level in levels])
    count = tokens.shape[1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_DRAWS)  # how often each
    t, f = (drawn @ part.T / count for part in (tokens, right))
    slope = _slope(tokens.mean(1)[None], right.mean(1)[None])[0]
    slopes = _slope(t, f)
    slopes = slopes[np.isfinite(slopes)]
    flat = bool(np.isnan(slope))
    return Scaling(
        control=float(within.mean()),
        control_interval=wilson(within),
        slope=None if flat else float(slope),
        slope_interval=None if flat else _percentiles(slopes),
        performance=float(right.mean(1).max()),
        performance_interval=_percentiles(f.max(1)),
        questions=count,
        points=tuple(Point(float(a.mean()), float(b.mean()), wilson(b)) for a, b in zip(tokens, right, strict=True)),
    )


def _within(level: Level) -> Float[np.ndarray, " runs"]:
    tokens = np.array(level.tokens)
    low = 0 if level.least is None else level.least
    high = np.inf if level.most is None else level.most
    return ((tokens >= low) & (tokens <= high)).astype(np.float64)


def _slope(
    tokens: Float[np.ndarray, "draws levels"], right: Float[np.ndarray, "draws levels"]
) -> Float[np.ndarray, " draws"]:
    """The mean slope over pairs of levels, per 1,000 tokens; NaN without a pair that differs in tokens."""
    a, b = np.triu_indices(tokens.shape[1], 1)
    run, rise = tokens[:, b] - tokens[:, a], right[:, b] - right[:, a]  # a slope is the same in either direction
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(run != 0, 1000 * rise / run, 0.0)
        return slopes.sum(1) / (run != 0).sum(1)


def _percentiles(values: Float[np.ndarray, " draws"]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _interval(interval: Interval) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"
