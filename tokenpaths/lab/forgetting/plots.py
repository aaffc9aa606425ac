"""Pictures of forgetting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokenpaths.lab.forgetting.suite import Forgetting, Loss
from tokenpaths.report.figures import empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from tokenpaths.report.figures import COLOURS, error_bars, grid


def losses(report: Forgetting) -> Figure:
    """What the trails changed, task by task: the change of each measure with its 95 % interval, a panel for each unit.

    Nats a token and KL to the frozen model share a panel, and so do all accuracies (in points). Bits a byte, which are
    the nats again, are left out. Orange is worse, green is better, grey is unclear or a distance.
    """
    units = {"nats a token": "change, nats a token", "KL to frozen": "change, nats a token"}
    panels: dict[str, list[Loss]] = {}
    for loss in report.losses:
        if loss.measure != "bits a byte":
            panels.setdefault(units.get(loss.measure, "change, points"), []).append(loss)
    figure = empty_figure(
        "What the trails changed, against the frozen model, with 95 % intervals",
        height=1.2 + 0.8 * len(panels) + 0.3 * sum(map(len, panels.values())),
    )
    rows = figure.subplots(len(panels), squeeze=False, height_ratios=[1 + len(part) for part in panels.values()])
    for axes, (unit, part) in zip(rows[:, 0], panels.items(), strict=True):
        scale = 100 if unit == "change, points" else 1
        values = [scale * loss.change for loss in part]
        bars = np.array(error_bars(values, [(scale * loss.interval[0], scale * loss.interval[1]) for loss in part]))
        for place, loss in enumerate(part):
            colour = {"worse": COLOURS[1], "better": COLOURS[2]}.get(loss.verdict, "0.5")
            axes.errorbar(
                values[place], place, xerr=bars[:, place : place + 1], fmt="o", color=colour, capsize=3, elinewidth=1
            )
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set_yticks(range(len(part)), [f"{loss.task}: {loss.measure}" for loss in part])
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.set_ylabel("task")
        axes.set_xlabel(unit)
        grid(axes)
    return figure
