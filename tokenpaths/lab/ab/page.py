"""The parts of an A/B report's page that come from its comparisons; `tokenpaths.report.pages` makes the page."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpaths.lab.ab.comparison import Comparison
from tokenpaths.report import pages

RULE = (
    "Worse: the task is worse, or a loss of retention or drift is beyond its margin. Better: the task is better, and "
    "every loss is within its margin. Cannot tell: all else.",
    "The task is better or worse if its adjusted p-value is at most alpha. A loss is within (beyond) its margin if its "
    "whole interval is.",
)


def verdict(found: Comparison) -> str:
    """The verdict on an arm, with its reasons."""
    kind = found.verdict if found.verdict != "cannot tell" else "open"
    return pages.card(found.arm, found.verdict, kind, found.reasons)


def effects(comparisons: Sequence[Comparison], a: str) -> str:
    """The gain of each arm on the task."""
    rows = [(found.arm, found.effect.value, found.effect.interval) for found in comparisons]
    picture = pages.forest(rows, 0.0, "no difference")
    return pages.figure(picture, f"Gain over {a} with its interval. Right of the dashed line is better.")


def power(found: Comparison) -> str:
    """The power of the test against the number of items."""
    caption = (
        f"{found.arm}: the chance to tell an effect of {abs(found.effect.value):.2g}, were it the true one, against "
        f"the number of items (logarithmic). The dashed line is the {found.power.target:.0%} that is asked for."
    )
    items = found.effect.items
    picture = pages.curve(found.power.curve, found.power.target, items, f"this test, {items:,}", caption)
    return pages.figure(picture, caption)


def losses(comparisons: Sequence[Comparison]) -> list[str]:
    """A picture for each measure, in its own unit, with the margin that all its rows have."""
    figures = [(found.arm, kept) for found in comparisons for kept in found.retained]
    parts: list[str] = []
    for measure in dict.fromkeys(kept.measure for _, kept in figures):
        mine = [(arm, kept) for arm, kept in figures if kept.measure == measure]
        rows = [(f"{arm}, {kept.task}", kept.loss, kept.interval) for arm, kept in mine]
        margin = mine[0][1].margin
        picture = pages.forest(rows, margin, f"margin {margin:g}", "limit")
        caption = f"Loss in {measure}. Kept is what lies left of the margin with its whole interval."
        parts.append(pages.figure(picture, caption))
    return parts
