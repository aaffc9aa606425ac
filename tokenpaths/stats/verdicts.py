"""When a verdict may be given: on how many items, of which share of tokens moved, and among how many tests.

    too_little(items=6, moved=0.04)              # why nothing may be said, or ""
    confidences = step_down(intervals, [0.0, 0.0, 0.0])   # by what interval each of three tests is judged
    within(interval, 0.05)                       # the same, or kept: the whole interval lies inside the margin

A difference is told if a whole interval lies on one side of a threshold. That there is none is told if the whole
interval lies within a margin (two one-sided tests, Schuirmann 1987), and never because no difference was told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tokenpaths.stats.intervals import Interval, Values, half_width, variance_of_mean

ALPHA = 0.05
"""The probability that any of the tests behind one verdict tells a difference that is not there."""
LEAST_ITEMS = 10
"""Fewer items give no verdict. Where ten items do not differ at all, up to 26 % of such may still (1 - 0.05^(1/10)),
and our intervals are measured from 8 items on (`benchmarks/coverage`): below, both the word and its interval are loose.
"""
LEAST_MOVED = 0.5
"""Below this share of moved tokens there is no verdict. A mean over tokens of which a share s is moved shows 1/s of
their change: at a half it is understated twofold, about as far as a margin is a matter of taste, and arms of which one
moves all tokens and one fewer than half are not compared on the same tokens.
"""
LEAST_PROMPTS = 3
"""An audit's scans take the median over prompts: of fewer than three, one prompt decides."""
LEAST_LEVELS = 3
"""A slope of accuracy over thinking tokens needs three levels: through two points there is always a line."""
POWER = 0.8
"""The probability with which a change of the size `noticeable` is told."""


def too_little(items: int, moved: float = math.nan, least: int = LEAST_ITEMS) -> str:
    """Why no verdict may rest on so many items and this share of moved tokens, in words; "" if one may.

    NaN stands for a share that is not known, as that of a function which answers, and is passed over.
    """
    told: list[str] = []
    if items < least:
        told.append(f"{items} of the {least} items that a verdict needs")
    if moved < LEAST_MOVED:
        told.append(f"{moved:.1%} of tokens moved, of the {LEAST_MOVED:.0%} that a verdict needs")
    return " and ".join(told)


def step_down(
    intervals: Sequence[Callable[[float], Interval]], thresholds: Sequence[float], alpha: float = ALPHA
) -> list[float]:
    """The confidence of the interval by which each of m tests is judged, so that all together err with `alpha` at most.

    Holm (1979): a test tells if its interval of confidence 1 - alpha / m lies on one side of its threshold. The k that
    do leave 1 - alpha / (m - k) to the others, and so on until no more tell.

    Args:
        intervals: for each test, its interval at a confidence.
        thresholds: for each test, the number on one side of which the interval must lie.
        alpha: the probability that any test tells falsely.
    """
    found, left = [1 - alpha] * len(intervals), list(range(len(intervals)))
    while left:
        confidence = 1 - alpha / len(left)
        told = [i for i in left if outside(intervals[i](confidence), thresholds[i])]
        for i in left:
            found[i] = confidence
        if not told:
            break
        left = [i for i in left if i not in told]
    return found


def outside(interval: Interval, threshold: float) -> bool:
    """Whether the whole interval lies on one side of the threshold."""
    return interval[0] > threshold or interval[1] < threshold


def within(interval: Interval, margin: float) -> bool:
    """Whether the whole interval lies between -margin and margin; never for a margin of NaN."""
    return -margin <= interval[0] and interval[1] <= margin


def noticeable(changes: Values, confidence: float = 1 - ALPHA) -> float:
    """The least mean change that items like these tell with probability `POWER`: t s + z s, s the standard error.

    Smaller ones may hide behind so few items. `changes` are one number an item; NaN where all are equal, or there are
    fewer than two, so that their spread is unknown.
    """
    if len(changes) < 2 or not (variance := variance_of_mean(changes)) > 0:
        return math.nan
    from scipy.special import ndtri

    half = half_width([(variance, len(changes) - 1)], 1 - confidence)
    return half + float(ndtri(POWER)) * math.sqrt(variance)


def may_still(items: int, confidence: float = 1 - ALPHA) -> float:
    """Where none of n items changed, the share of such items that may still: 1 - (1 - confidence)^(1/n)."""
    return 1 - (1 - confidence) ** (1 / items) if items else 1.0
