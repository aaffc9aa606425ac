"""What thinking longer buys: control, scaling and performance of a method of test-time scaling (s1, section 3.2).

found = scaling([Level(tokens, right, least=100, most=100), Level(tokens2, right2, least=200, most=200)])
print(found)
found.plot().savefig("scaling.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Float

from tokenpaths.report.figures import COLOURS, empty_figure, error_bars, grid
from tokenpaths.report.records import Record
from tokenpaths.report.tables import interval_text, with_interval
from tokenpaths.stats.intervals import Interval, statistic_interval, wilson
from tokenpaths.stats.verdicts import LEAST_LEVELS, too_little

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Level:
    """One setting of the budget, run over all questions.

    Args:
        tokens: the number of thinking tokens of each question.
        right: whether each answer was right.
        least: the fewest thinking tokens that the setting allows; None if there is no such limit.
        most: the most thinking tokens that the setting allows; None if there is no such limit.
    """

    tokens: Sequence[int]
    right: Sequence[bool]
    least: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class LevelPoint:
    """The mean number of thinking tokens and the accuracy of a level, with the accuracy's 95 % Wilson interval."""

    tokens: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Scaling(Record):
    """The three figures of s1, each with its 95 % interval, and the levels as points, in order of their tokens.

    `slope` is in accuracy per 1,000 thinking tokens, and None where all levels have the same mean tokens. In print it
    is told of `LEAST_LEVELS` levels of different length and `LEAST_ITEMS` questions or more (`stats.verdicts`).
    """

    what: ClassVar[str] = "a scaling report"

    control: float
    control_interval: Interval
    slope: float | None
    slope_interval: Interval | None
    performance: float
    performance_interval: Interval
    questions: int
    points: tuple[LevelPoint, ...]

    @property
    def too_little(self) -> str:
        """Why nothing may be said of the slope, in words; "" if it may."""
        levels = len({point.tokens for point in self.points})
        told = [] if levels >= LEAST_LEVELS else [f"{levels} of the {LEAST_LEVELS} levels that a slope needs"]
        return " and ".join([*told, *filter(None, [too_little(self.questions)])])

    def __str__(self) -> str:
        lines = [f"{'thinking tokens':>15}  accuracy [95 % interval], {self.questions} questions"]
        lines += [f"{point.tokens:15.1f}  {with_interval(point.accuracy, point.interval)}" for point in self.points]
        lines.append(f"control      {with_interval(self.control, self.control_interval)}")
        if self.slope is None or self.slope_interval is None:
            lines.append("scaling      unknown: all levels think equally long")
        elif self.too_little:
            lines.append(f"scaling      cannot tell: {self.too_little}")
        else:
            slope = f"{self.slope:+.3f} {interval_text(self.slope_interval)}"
            lines.append(f"scaling      {slope} per 1,000 tokens")
        lines.append(f"performance  {with_interval(self.performance, self.performance_interval)}")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Accuracy against mean thinking tokens: a point a level, with its 95 % interval (s1, figure 1).

        Raises `ImportError` where matplotlib is missing.
        """
        slope = "" if self.slope is None or self.too_little else f", scaling {self.slope:+.2f} per 1,000 tokens"
        title = f"{self.questions} questions: control {self.control:.0%}, performance {self.performance:.2f}{slope}"
        figure = empty_figure(title, 4.0)
        axes = figure.subplots()
        accuracy = [point.accuracy for point in self.points]
        bars = error_bars(accuracy, [point.interval for point in self.points])
        tokens = [point.tokens for point in self.points]
        axes.errorbar(tokens, accuracy, yerr=bars, fmt="o-", color=COLOURS[0], capsize=3)
        axes.set(xlabel="mean thinking tokens", ylabel="accuracy, 95 % interval")
        grid(axes)
        return figure


def scaling(levels: Sequence[Level]) -> Scaling:
    """Control, scaling and performance of levels A (s1, equations 1 to 3).

        control      the share of all runs whose thinking tokens lie within the limits of their level
        scaling      1 / |P| sum over pairs (a, b) in P of (f(b) - f(a)) / (b - a)
        performance  max f(a)

    a is the mean number of thinking tokens of a level, f(a) its accuracy and P the pairs of levels with a < b. The
    interval of control is Wilson's, which takes runs as independent. Those of scaling and of performance are percentile
    bootstraps over questions, which draw the same questions for all levels. Draws in which all levels think equally
    long have no scaling and are left out. A maximum over noisy levels is biased upward, in each draw as in the figure
    itself.

    Args:
        levels: the settings of the budget, all on the same questions in the same order.

    Raises:
        ValueError: no levels, or levels of different numbers of questions.
    """
    sizes = {len(part) for level in levels for part in (level.tokens, level.right)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "every level needs one count of tokens and one verdict for each of the same questions, but the levels have "
            f"{sorted(sizes)}"
        )
    order = sorted(levels, key=lambda level: float(np.mean(level.tokens)))
    tokens, right = (np.array([getattr(level, part) for level in order], float) for part in ("tokens", "right"))
    within = np.concatenate([_within(level) for level in levels])
    questions = tokens.shape[1]
    slope = float(_slope(tokens.mean(1), right.mean(1)))
    flat = bool(np.isnan(slope))
    return Scaling(
        control=float(within.mean()),
        control_interval=wilson(within),
        slope=None if flat else slope,
        slope_interval=None
        if flat
        else statistic_interval(
            lambda drawn: _slope(tokens[:, drawn].mean(-1), right[:, drawn].mean(-1)), questions, defined_only=True
        ),
        performance=float(right.mean(1).max()),
        performance_interval=statistic_interval(lambda drawn: right[:, drawn].mean(-1).max(0), questions),
        questions=questions,
        points=tuple(
            LevelPoint(float(a.mean()), float(b.mean()), wilson(b)) for a, b in zip(tokens, right, strict=True)
        ),
    )


def _within(level: Level) -> Float[np.ndarray, " runs"]:
    tokens = np.array(level.tokens)
    low = 0 if level.least is None else level.least
    high = np.inf if level.most is None else level.most
    return ((tokens >= low) & (tokens <= high)).astype(np.float64)


def _slope(
    tokens: Float[np.ndarray, "levels ..."], right: Float[np.ndarray, "levels ..."]
) -> Float[np.ndarray, "*draws"]:
    """The mean slope over pairs of levels, per 1,000 tokens; NaN without a pair that differs in tokens."""
    a, b = np.triu_indices(len(tokens), 1)
    run, rise = tokens[b] - tokens[a], right[b] - right[a]  # a slope is the same in either direction
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(run != 0, 1000 * rise / run, 0.0)
        return np.asarray(slopes.sum(0) / (run != 0).sum(0))
