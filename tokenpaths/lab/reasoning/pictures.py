"""Pictures of reasoning, 800 pixels wide: accuracy against thinking tokens, and what a selection left over.

Each function returns a matplotlib `Figure` of its own and touches no global state of matplotlib (no pyplot). Needs the
extra `plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenpaths.lab.reasoning.selection import Funnel
from tokenpaths.lab.reasoning.thinking import Scaling
from tokenpaths.report.figures import empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, GREY = "#0072B2", "#999999"


def scaling_picture(found: Scaling) -> Figure:
    """Accuracy against mean thinking tokens: a point a level with its 95 % interval (s1, figure 1)."""
    slope = "" if found.slope is None else f", scaling {found.slope:+.2f} per 1,000 tokens"
    figure = empty_figure(
        f"{found.questions} questions: control {found.control:.0%}, performance {found.performance:.2f}{slope}", 4.0
    )
    axes = figure.subplots()
    tokens, accuracy = [p.tokens for p in found.points], [p.accuracy for p in found.points]
    low = [max(0.0, p.accuracy - p.interval[0]) for p in found.points]
    high = [max(0.0, p.interval[1] - p.accuracy) for p in found.points]
    axes.errorbar(tokens, accuracy, yerr=[low, high], fmt="o-", color=BLUE, capsize=3)
    axes.set_xlabel("mean thinking tokens")
    axes.set_ylabel("accuracy, 95 % interval")
    axes.grid(alpha=0.3)
    return figure


def funnel_picture(funnel: Funnel) -> Figure:
    """How many items each step of a selection left, from the whole pool at the top to the chosen items."""
    names = ["the pool", *(step.name for step in funnel.steps)]
    left = [funnel.pool, *(step.left for step in funnel.steps)]
    figure = empty_figure(f"{funnel.pool:,} items, {left[-1]:,} selected", 1.2 + 0.4 * len(names))
    axes = figure.subplots()
    bars = axes.barh(names, left, color=[GREY, *[BLUE] * len(funnel.steps)])
    axes.bar_label(bars, [f"{count:,}" for count in left], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("items left")
    return figure
