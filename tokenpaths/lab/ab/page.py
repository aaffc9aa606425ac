"""A report as one HTML page: readable on a phone, in the dark and without a network, since nothing is fetched.

Pictures are SVG that takes its colours from the page. All text that came from a model, a data set or a user is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenpaths.lab.ab.report import Comparison, Report

MOST_ROWS = 200
"""So many items on which arms differ are shown; the JSON file has all."""
WIDTH = 440
"""Of pictures, in their own unit: near the width of a phone, so that their letters stay readable there."""
LONG = 30
"""Characters from which a column is given room."""
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


def page(report: Report) -> str:
    """The whole page."""
    arms = ", ".join(found.arm for found in report.comparisons)
    title = f"{arms} against {report.a}"
    body = [
        f"<h1>{_text(title)}, on {len(report.asked):,} items</h1>",
        *(_card(found) for found in report.comparisons),
        "<h2>The task</h2>",
        _table(report.tables()[0]),
        _figure(_effects(report), f"Gain over {report.a} with its interval. Right of the dashed line is better."),
        "<h2>What the number of items can tell</h2>",
        *(part for found in report.comparisons for part in _power(found)),
    ]
    if len(report.tables()) > 1:
        body += ["<h2>Retention and drift</h2>", _table(report.tables()[1]), *_losses(report)]
    if report.searched:
        body += ["<h2>Was the test seen in training?</h2>", *_overlaps(report)]
    body += [
        "<h2>Where the arms differ</h2>",
        *(part for found in report.comparisons for part in _items(report, found)),
    ]
    body += ["<h2>How to read this</h2>", *(f"<p>{_text(note)}</p>" for note in [*report.notes(), *_RULE])]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n<footer><p>Made by tokenpaths.</p></footer>\n</body>\n</html>\n"
    )


_RULE = (
    "Worse: the task is worse, or a loss of retention or drift is beyond its margin. Better: the task is better, and "
    "every loss is within its margin. Cannot tell: all else.",
    "The task is better or worse if its adjusted p-value is at most alpha. A loss is within (beyond) its margin if its "
    "whole interval is.",
)


def _card(found: Comparison) -> str:
    reasons = "".join(f"<p>{_text(reason)}</p>" for reason in found.reasons)
    kind = found.verdict if found.verdict != "cannot tell" else "open"
    return f'<div class="card {kind}">{_text(found.arm)}: <strong>{_text(found.verdict)}</strong>{reasons}</div>'


def _table(rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    header, *body = rows
    long = [max(len(row[i]) for row in body) > LONG for i in range(len(header))]
    cells = {True: '<td class="long">', False: "<td>"}
    lines = ["".join(f"{cells[wide]}{_text(cell)}</td>" for wide, cell in zip(long, row, strict=True)) for row in body]
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _effects(report: Report) -> str:
    rows = [(c.arm, c.effect.value, c.effect.interval) for c in report.comparisons]
    return _forest(rows, 0.0, "zero", "no difference")


def _losses(report: Report) -> list[str]:
    """A picture for each measure, in its own unit, with the margin that all its rows have."""
    figures = [(found.arm, r) for found in report.comparisons for r in found.retained]
    parts: list[str] = []
    for measure in dict.fromkeys(r.measure for _, r in figures):
        rows = [(f"{arm}, {r.task}", r.loss, r.interval) for arm, r in figures if r.measure == measure]
        margin = next(r.margin for _, r in figures if r.measure == measure)
        caption = f"Loss in {measure}. Kept is what lies left of the margin with its whole interval."
        parts.append(_figure(_forest(rows, margin, "limit", f"margin {margin:g}"), caption))
    return parts


def _forest(rows: Sequence[tuple[str, float, tuple[float, float]]], line: float, kind: str, told: str) -> str:
    """Values with their intervals, a row each with its name above it, and one upright line."""
    ends = [line, 0.0, *(end for _, value, interval in rows for end in (value, *interval) if math.isfinite(end))]
    ticks = _ticks(min(ends), max(ends))
    low, high = min(ticks[0], min(ends)), max(ticks[-1], max(ends))

    def x(value: float) -> float:
        inside = min(max(value, low), high)
        return 20 + (WIDTH - 40) * (inside - low) / (high - low)

    bottom = 34.0 + 46 * len(rows)
    parts = [f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="24" y2="{bottom:.0f}"/>' for t in ticks]
    parts += [_label(x(t), bottom + 16, f"{t:g}", "soft") for t in ticks]
    parts.append(f'<line class="{kind}" x1="{x(line):.1f}" x2="{x(line):.1f}" y1="20" y2="{bottom:.0f}"/>')
    parts.append(_label(x(line), 14.0, told, "soft"))
    for number, (name, value, interval) in enumerate(rows):
        y = 62 + 46 * number
        parts.append(f'<text x="20" y="{y - 14}">{_text(name)}</text>')
        parts.append(f'<line class="bar" x1="{x(interval[0]):.1f}" x2="{x(interval[1]):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{y}" r="5.5"/>')
    return _svg(bottom + 24, parts, "; ".join(f"{name}: {value:.3g}" for name, value, _ in rows))


def _power(found: Comparison) -> list[str]:
    power, items = found.power, found.effect.items
    caption = (
        f"{found.arm}: the chance to tell an effect of {abs(found.effect.value):.2g}, were it the true one, against "
        f"the number of items (logarithmic). The dashed line is the {power.target:.0%} that is asked for."
    )
    counts = [n for n, _ in power.curve]
    first, last = math.log(counts[0]), math.log(counts[-1])

    def x(n: int) -> float:
        return 44 + (WIDTH - 64) * (math.log(n) - first) / (last - first)

    def y(share: float) -> float:
        return 200 - 170 * share

    parts: list[str] = []
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<line class="axis" x1="44" x2="{WIDTH - 20}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(_label(22.0, y(share) + 4, f"{share:.0%}", "soft"))
    marks = [n * 10**k for k in range(6) for n in (1, 2, 5) if counts[0] <= n * 10**k <= counts[-1]]
    parts += [_label(x(n), 218.0, f"{n:,}", "soft") for n in marks]
    parts.append(
        f'<line class="zero" x1="44" x2="{WIDTH - 20}" y1="{y(power.target):.1f}" y2="{y(power.target):.1f}"/>'
    )
    path = " ".join(f"{x(n):.1f},{y(share):.1f}" for n, share in power.curve)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    if counts[0] <= items <= counts[-1]:
        parts.append(f'<line class="zero" x1="{x(items):.1f}" x2="{x(items):.1f}" y1="26" y2="200"/>')
        parts.append(_label(x(items), 18.0, f"this test, {items:,}", "soft"))
    return [_figure(_svg(226.0, parts, caption), caption)]


def _overlaps(report: Report) -> list[str]:
    near = [overlap for overlap in report.overlaps if overlap.kind == "embedding"][:5]
    seen = [overlap for overlap in report.overlaps if overlap.kind != "embedding"][:MOST_ROWS]
    if not (seen or near):
        return ["<p>No test item was found in training.</p>"]
    rows = [["found by", "test item", "training text", "score", "the item"]]
    for overlap in [*seen, *near]:
        prompt = report.asked[overlap.test].prompt
        rows.append([overlap.kind, str(overlap.test), str(overlap.train), f"{overlap.score:.3f}", prompt])
    told = "The closest by embedding are shown whether or not they are close." if near else ""
    return [f'<p class="soft">{told}</p>', _table(rows, "items")]


def _items(report: Report, found: Comparison) -> list[str]:
    """The items on which an arm and arm a differ: what the first seed of each wrote, and the mean score of all."""
    numbers = report.discordant(found.arm)
    a, b = report.of_arm(report.a), report.of_arm(found.arm)
    rows = [["item", "prompt", "right answer", report.a, "score", found.arm, "score"]]
    for i in numbers[:MOST_ROWS]:
        scores = [f"{sum(seed[i] for seed in arm.scores) / len(arm.scores):.3g}" for arm in (a, b)]
        texts = [arm.written[0][i] for arm in (a, b)]
        rows.append([str(i), report.asked[i].prompt, report.asked[i].answer, texts[0], scores[0], texts[1], scores[1]])
    shown = f", of which the first {MOST_ROWS} are shown" if len(numbers) > MOST_ROWS else ""
    head = f"<h3>{_text(found.arm)}</h3><p class='soft'>{len(numbers):,} of {len(report.asked):,} items{shown}.</p>"
    return [head, _table(rows, "items")] if numbers else [head]


def _svg(height: float, parts: Sequence[str], told: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{_text(told)}">{"".join(parts)}</svg>'


def _label(x: float, y: float, told: str, kind: str) -> str:
    anchor = "start" if x < 60 else "end" if x > WIDTH - 60 else "middle"
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(told)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _text(text: str) -> str:
    return escape(text, quote=True)
