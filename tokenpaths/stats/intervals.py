"""95 % intervals over items: of paired changes, of proportions, and of differences and ratios of two samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Values: TypeAlias = Float[np.ndarray, "_"]  # one number an item
Interval: TypeAlias = tuple[float, float]
UNKNOWN: Interval = (-math.inf, math.inf)


def of_mean(values: Values, weights: Values | None = None) -> Interval:
    """Of sum(values) / sum(weights), by the percentile bootstrap over items; without weights, of the mean.

    A paired change is the mean of the items' changes. Percentiles stand where all items agree, where BCa fails. Without
    bounds for fewer than two items.
    """
    weights = np.ones(len(values)) if weights is None else weights
    if len(values) < 2:
        return UNKNOWN
    return _bootstrap(lambda v, w, axis: v.sum(axis) / w.sum(axis), values, weights, paired=True)


def of_difference(x: Values, y: Values) -> Interval:
    """Of mean(x) - mean(y), two independent samples of numbers, by the percentile bootstrap."""
    if min(len(x), len(y)) < 2:
        return UNKNOWN
    return _bootstrap(lambda x, y, axis: x.mean(axis) - y.mean(axis), x, y, paired=False)


def of_statistic(statistic: Callable[[Int[np.ndarray, "*draws items"]], Any], items: int) -> Interval:
    """Of a statistic of the items that were drawn, given by their numbers, by the percentile bootstrap over items.

    Without bounds for fewer than two items, and where a draw leaves the statistic undefined (NaN).
    """
    if items < 2:
        return UNKNOWN
    from scipy.stats import DegenerateDataWarning

    numbers = np.arange(items, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # it speaks of another method, where all is told here
        found = _bootstrap(lambda drawn, axis: statistic(drawn.astype(np.int64)), numbers, paired=False)
    return UNKNOWN if math.isnan(found[0]) else found


def wilson(right: Values) -> Interval:
    """Of the share of ones among zeros and ones (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def newcombe(x: Values, y: Values) -> Interval:
    """Of the difference of two independent proportions, p - q (Newcombe 1998, method 10, from Wilson intervals (l, u)).

    Low  = p - q - sqrt((p - l_p)^2 + (u_q - q)^2)
    High = p - q + sqrt((u_p - p)^2 + (q - l_q)^2)
    """
    p, q = float(x.mean()), float(y.mean())
    (lp, up), (lq, uq) = wilson(x), wilson(y)
    return p - q - math.hypot(p - lp, uq - q), p - q + math.hypot(up - p, q - lq)


def of_ratio(x: Values, y: Values) -> Interval:
    """Of the ratio of two independent proportions, p / q with q > 0 (Donner and Zou 2012, MOVER from Wilson intervals).

    With bounds (l, u) of each and f(a, b) = a (2p - a) b (2q - b),
    low  = (p q - sqrt((p q)^2 - f(l_p, u_q))) / (u_q (2q - u_q))
    high = (p q + sqrt((p q)^2 - f(u_p, l_q))) / (l_q (2q - l_q))
    """
    p, q = float(x.mean()), float(y.mean())
    (lp, up), (lq, uq) = wilson(x), wilson(y)

    def bound(a: float, b: float, sign: int) -> float:
        rest = b * (2 * q - b)
        root = math.sqrt(max(0.0, (p * q) ** 2 - a * (2 * p - a) * rest))
        if sign < 0:  # the same, without a difference of nearly equal numbers or a zero below
            return max(0.0, a * (2 * p - a) / (p * q + root)) if p else 0.0
        return (p * q + root) / rest

    return bound(lp, uq, -1), bound(up, lq, 1)


def _bootstrap(statistic: Callable[..., Any], *samples: Values, paired: bool) -> Interval:
    from scipy.stats import bootstrap

    found = bootstrap(
        samples, statistic, paired=paired, vectorized=True, method="percentile", n_resamples=9999, batch=500, rng=0
    ).confidence_interval
    return float(found.low), float(found.high)
