"""The empty figure that every picture begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def empty_figure(title: str, height: float, *, width: float = 8.0) -> Figure:
    """A matplotlib figure without pyplot, so that nothing global is touched; inches, of 100 pixels each.

    Raises `ImportError` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("pictures need matplotlib: pip install 'tokenpaths[plots]'") from missing
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure
