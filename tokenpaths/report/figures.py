"""Figures: one empty figure, one set of colours and one style for every `plot`.

A figure is made without pyplot, so that nothing global is touched, and shows itself in a notebook. Needs the extra
`plots`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenpaths.report.escaping import mathtext

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#999999"


def empty_figure(title: str, height: float, *, width: float = 8.0) -> Figure:
    """A matplotlib figure with a title, which may hold text from anywhere; inches, of 100 pixels each.

    Raises `ImportError` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("pictures need matplotlib: pip install 'tokenpaths[plots]'") from missing

    class Shown(Figure):
        """A figure that a notebook shows: a bare one has no picture of itself where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    figure = Shown(figsize=(width, height), dpi=100, layout="constrained")
    figure.suptitle(mathtext(title), fontsize=11)
    return figure


def grid(axes: Axes) -> None:
    """A light grid behind the data, and no frame at the top and the right."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def forest(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    colours: Sequence[str],
) -> None:
    """Values with their intervals, a row each from the top, named at the left, and an upright line at 0."""
    lengths = zip(*error_bars(values, intervals), strict=True)
    for row, (value, (below, above), colour) in enumerate(zip(values, lengths, colours, strict=True)):
        bar = [[below], [above]]
        axes.errorbar(value, row, xerr=bar, fmt="o", color=colour, capsize=3, elinewidth=1)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_yticks(range(len(names)), list(map(mathtext, names)))
    axes.set_ylim(len(names) - 0.5, -0.5)
    grid(axes)


def error_bars(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> Any:
    """Two rows, the lengths of the bars below and above each value; 0 where a bound is missing or not finite."""
    bars = [(v - i[0], i[1] - v) if i else (0.0, 0.0) for v, i in zip(values, intervals, strict=True)]
    return [[max(0.0, b) if math.isfinite(b) else 0.0 for b in side] for side in zip(*bars, strict=True)]
