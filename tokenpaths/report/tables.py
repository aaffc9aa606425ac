"""Tables of text: in print with aligned columns, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpaths.report.escaping import markdown, one_line

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows) -> str:
    """Rows of cells, the header first, in columns that are aligned at the left and two spaces apart.

    Control characters in a cell are written out, line breaks too.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown_table(rows: Rows) -> str:
    """Rows of cells, the header first, as a Markdown table. What stands in a cell is text and no Markdown."""
    header, *body = [[markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def interval_text(interval: tuple[float, float], digits: int = 3, sign: str = "") -> str:
    """An interval as `[0.020, 0.140]`; with sign="+", as `[+0.020, +0.140]`."""
    low, high = interval
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def with_interval(value: float, interval: tuple[float, float], digits: int = 3, sign: str = "") -> str:
    """A figure and its interval, as `0.080 [0.020, 0.140]`."""
    return f"{value:{sign}.{digits}f} {interval_text(interval, digits, sign)}"
