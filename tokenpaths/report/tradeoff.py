"""Task against drift: a picture of several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tokenpaths.report.escaping import mathtext
from tokenpaths.report.figures import COLOURS, MARKERS, empty_figure, error_bars, grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One model in `frontier`: how well it does the task, and how far it is from the frozen model.

    Points of one `series` (the strengths of one trail, the rates of one method) are joined in the order given.
    Intervals are 95 % intervals, drawn as bars.
    """

    series: str
    task: float
    drift: float
    task_interval: tuple[float, float] | None = None
    drift_interval: tuple[float, float] | None = None
    label: str = ""


def frontier(
    points: Sequence[Point], *, task: str = "task accuracy", drift: str = "drift, nats", log: bool = False
) -> Figure:
    """Task against drift: what each model gains, and what it loses for it. Up and to the left is better.

    The dashed line is the best reached at that drift or less. `task` and `drift` name the axes with their units; `log`
    makes drift logarithmic.

    Raises:
        ValueError: no points, a point that is not finite, or a drift of 0 or less on a logarithmic axis.
    """
    if not points:
        raise ValueError("frontier was given no points")
    for point in points:
        if not (math.isfinite(point.task) and math.isfinite(point.drift)) or (log and point.drift <= 0):
            raise ValueError(f"{point} cannot be drawn: task and drift must be finite, and drift above 0 if log")
    figure = empty_figure("Task against drift, with 95 % intervals", height=5.0)
    axes = figure.subplots()
    best = sorted(points, key=lambda point: (point.drift, -point.task))
    reached = np.maximum.accumulate([point.task for point in best])
    label = "best at this drift or less"
    axes.step([p.drift for p in best], reached, where="post", color="0.5", linestyle="--", linewidth=1, label=label)
    for index, series in enumerate(dict.fromkeys(point.series for point in points)):
        mine = [point for point in points if point.series == series]
        x, y = [point.drift for point in mine], [point.task for point in mine]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        bars = {
            "xerr": error_bars(x, [p.drift_interval for p in mine]),
            "yerr": error_bars(y, [p.task_interval for p in mine]),
        }
        axes.errorbar(
            x, y, **bars, fmt=marker + "-", color=colour, label=mathtext(series), capsize=3, elinewidth=1, alpha=0.9
        )
        for point in mine:
            axes.annotate(
                mathtext(point.label), (point.drift, point.task), (5, 5), textcoords="offset points", fontsize=9
            )
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(mathtext(drift))
    axes.set_ylabel(mathtext(task))
    axes.legend(frameon=False)
    axes.margins(0.08)
    grid(axes)
    return figure
