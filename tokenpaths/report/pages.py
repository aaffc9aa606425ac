"""Reports as one HTML page: readable on a phone, in the dark and without a network, since nothing is fetched.

    page("Title", [card(...), heading("The task"), table(rows), figure(forest(...), "caption")])

Pictures are SVG that takes its colours from the page. Every function escapes the text that it is given, which may come
from a model, a data set or a user.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from tokenpaths.report.escaping import html as escape
from tokenpaths.report.tables import Rows

Number: TypeAlias = "float | int"
WIDTH = 440
"""Of pictures, in their own unit: near the width of a phone, so that their letters stay readable there."""
LONG = 30
"""A column with a cell of more characters than this is given room."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing."""
STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --back: #fff; --soft: #5b6470; --line: #d9dde2; --card: #f5f6f8;
  --better: #00704f; --worse: #b3400a; --open: #5b6470; --mark: #0067a8; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #15181c; --soft: #a0a9b4; --line: #353b43;
  --card: #1e2228; --better: #3ecf9b; --worse: #ff9a5c; --open: #a0a9b4; --mark: #6cb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 60rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.card { background: var(--card); border-left: .35rem solid var(--open); border-radius: .3rem; padding: .7rem 1rem;
  margin: .8rem 0; }
.card p { margin: .3rem 0 0; } .card strong { font-size: 1.15rem; }
.better { border-color: var(--better); } .worse { border-color: var(--worse); }
.better strong { color: var(--better); } .worse strong { color: var(--worse); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.figures td { white-space: nowrap; }
.items td { white-space: pre; }
.items td.long { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 13rem; max-width: 26rem; }
.soft, figcaption, footer { color: var(--soft); font-size: .88rem; }
figure { margin: 0; } svg { width: 100%; height: auto; max-width: 36rem; display: block; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; paint-order: stroke; stroke: var(--back);
  stroke-width: 4px; } svg .soft { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .zero { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .bar { stroke: var(--mark); stroke-width: 3; } svg .dot { fill: var(--mark); }
svg .curve { fill: none; stroke: var(--mark); stroke-width: 2.5; } svg .limit { stroke: var(--worse); stroke-width: 2; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts, each made by a function of this module. The title is not shown on the page itself."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n<footer><p>Made by tokenpaths.</p></footer>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading of a level from 1, the largest, to 3."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; of the kind "soft" in small grey letters."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def card(name: str, verdict: str, kind: str, reasons: Iterable[str]) -> str:
    """A verdict in large letters with its reasons. `kind` is "better", "worse" or "open", and gives the colour."""
    told = "".join(map(paragraph, reasons))
    return f'<div class="card {kind}">{escape(name)}: <strong>{escape(verdict)}</strong>{told}</div>'


def table(rows: Rows, kind: str = "figures") -> str:
    """Rows of cells, the header first. Of the kind "items", white space is kept and long texts are wrapped."""
    header, *body = rows
    long = [max(len(row[i]) for row in body) > LONG for i in range(len(header))]
    cells = {True: '<td class="long">', False: "<td>"}
    lines = ["".join(f"{cells[wide]}{escape(cell)}</td>" for wide, cell in zip(long, row, strict=True)) for row in body]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def figure(svg: str, caption: str) -> str:
    """A picture with the words below it."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def forest(rows: Sequence[tuple[str, float, tuple[float, float]]], line: float, label: str, kind: str = "zero") -> str:
    """Values with their intervals as SVG: a row each with its name above it, and one upright line.

    Args:
        rows: name, value and interval of each. Bounds that are not finite are drawn at the edge.
        line: where the upright line stands.
        label: what stands above it.
        kind: "zero" for a dashed line, "limit" for a full one in the colour of "worse".
    """
    ends = [line, 0.0, *(end for _, value, interval in rows for end in (value, *interval) if math.isfinite(end))]
    ticks = _ticks(min(ends), max(ends))
    low, high = min(ticks[0], min(ends)), max(ticks[-1], max(ends))

    def x(value: float) -> float:
        inside = min(max(value, low), high)
        return 20 + (WIDTH - 40) * (inside - low) / (high - low)

    bottom = 34.0 + 46 * len(rows)
    parts = [_line("axis", x(tick), 24, x(tick), bottom) for tick in ticks]
    parts += [_label(x(tick), bottom + 16, f"{tick:g}") for tick in ticks]
    parts += [_line(kind, x(line), 20, x(line), bottom), _label(x(line), 14, label)]
    for number, (name, value, (start, end)) in enumerate(rows):
        y = 62 + 46 * number
        parts.append(f'<text x="20" y="{y - 14}">{escape(name)}</text>')
        parts.append(_line("bar", x(start), y, x(end), y))
        parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{y}" r="5.5"/>')
    return _svg(bottom + 24, parts, "; ".join(f"{name}: {value:.3g}" for name, value, _ in rows))


def curve(points: Sequence[tuple[int, float]], level: float, mark: int, label: str, caption: str) -> str:
    """Shares against counts as SVG, the counts logarithmic.

    Args:
        points: counts, from the least, each with its share within 0 and 1.
        level: a share that a dashed line stands at.
        mark: a count that a dashed line stands at, if the points reach it.
        label: what stands above that line.
        caption: what the picture shows, for those who cannot see it.
    """
    first, last = points[0][0], points[-1][0]

    def x(count: int) -> float:
        return 44 + (WIDTH - 64) * math.log(count / first) / math.log(last / first)

    def y(share: float) -> float:
        return 200 - 170 * share

    parts: list[str] = []
    for share in (0.0, 0.5, 1.0):
        parts += [_line("axis", 44, y(share), WIDTH - 20, y(share)), _label(22, y(share) + 4, f"{share:.0%}")]
    marks = [n * 10**k for k in range(6) for n in (1, 2, 5) if first <= n * 10**k <= last]
    parts += [_label(x(n), 218, f"{n:,}") for n in marks]
    parts.append(_line("zero", 44, y(level), WIDTH - 20, y(level)))
    path = " ".join(f"{x(n):.1f},{y(share):.1f}" for n, share in points)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    if first <= mark <= last:
        parts += [_line("zero", x(mark), 26, x(mark), 200), _label(x(mark), 18, label)]
    return _svg(226, parts, caption)


def _svg(height: Number, parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _line(kind: str, x1: Number, y1: Number, x2: Number, y2: Number) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _label(x: Number, y: Number, text: str) -> str:
    anchor = "start" if x < 60 else "end" if x > WIDTH - 60 else "middle"
    return f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
