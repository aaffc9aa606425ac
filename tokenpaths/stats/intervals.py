"""The intervals of the package: of means and paired changes, of proportions, and of what streams by.

    mean_interval(after - before)                # of the mean of paired changes: nats, areas, right less right
    mean_interval(nats, weights=tokens)          # of sum(nats) / sum(tokens), items being texts
    difference_interval(x, y)                    # of mean(x) - mean(y), two independent samples

`benchmarks/coverage` measures how often they hold the truth at 8, 16 and 50 items. All are of 95 % unless told, and the
same numbers give the same bounds. `UNKNOWN`, (-inf, inf), stands where fewer than two items leave the spread unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Values: TypeAlias = Float[np.ndarray, "_"]  # one number an item
Interval: TypeAlias = tuple[float, float]
UNKNOWN: Interval = (-math.inf, math.inf)
DRAWS = 9999


def mean_interval(values: Values, weights: Values | None = None, confidence: float = 0.95) -> Interval:
    """Of the mean, or of sum(values) / sum(weights): on each side the wider of Student's t and BCa, over items.

    t is short where values are skewed, BCa (Efron 1987) where items are few or tails heavy. With weights w, the ratio
    R and n items, the same is made of the jackknife's deviations (Miller 1974), centred, W being the sum of the w,

        d_i = (n - 1) (R - R without item i) = (n - 1) (v_i - R w_i) / (W - w_i)

    and R is added; equal weights give the interval of the mean. Neither order nor sign of the values matters.

    Where all values are equal, or all d, it is (v, v). That says that no item differed, not that none would: a share of
    up to 1 - ((1 - confidence) / 2)^(1 / n) may, which the A/B report notes. Right answers in pairs have bounds there
    too in `stats.paired.tango`. `values` are one number an item in any unit, `weights` what each counts, as its tokens.

    Raises:
        ValueError: a number that is not finite, a weight below 0 or none above, or a confidence outside (0, 1).
    """
    items = len(values)
    _check(confidence, values, *(() if weights is None else (weights,)))
    if items < 2:
        return UNKNOWN
    if weights is None:
        return _of_mean(values, confidence)
    total = float(weights.sum())
    if len(weights) != items or (weights < 0).any() or not total:
        raise ValueError(f"weights must be numbers of at least 0, not all 0, one for each of {items} values")
    if (weights == total).any():  # of one item alone
        return UNKNOWN
    ratio = float(values.sum()) / total
    deviations = (items - 1) * (values - ratio * weights) / (total - weights)
    low, high = _of_mean(deviations - deviations.mean(), confidence)
    return ratio + low, ratio + high


def difference_interval(x: Values, y: Values, confidence: float = 0.95) -> Interval:
    """Of mean(x) - mean(y), two independent samples of numbers, in their unit: Welch's t (1947).

    Mean +- t sqrt(V_x + V_y), with V = var / n of each sample and t of (V_x + V_y)^2 / (V_x^2 / (n_x - 1) +
    V_y^2 / (n_y - 1)) degrees of freedom. (v, v) where neither sample has any spread, as in `mean_interval`, and
    `UNKNOWN` for fewer than two items in either. Of proportions see `newcombe`. ValueError as `mean_interval`.
    """
    _check(confidence, x, y)
    if min(len(x), len(y)) < 2:
        return UNKNOWN
    value, (a, b) = float(x.mean() - y.mean()), (variance_of_mean(x), variance_of_mean(y))
    if not a + b > 0:
        return value, value
    share = a / (a + b)
    freedom = 1 / (share**2 / (len(x) - 1) + (1 - share) ** 2 / (len(y) - 1))
    half = half_width([(a + b, freedom)], 1 - confidence)
    return value - half, value + half


def statistic_interval(
    statistic: Callable[[Int[np.ndarray, "*draws items"]], Any], items: int, *, defined_only: bool = False
) -> Interval:
    """Of a statistic of the items that were drawn, given by their numbers: 95 % percentile bootstrap over items.

    For what is no mean, such as a maximum or a ratio of ratios; it is short for few items. `UNKNOWN` for fewer than
    two, and where a draw leaves the statistic undefined (NaN); with `defined_only`, such draws are left out, and it is
    `UNKNOWN` if all are undefined.
    """
    if items < 2:
        return UNKNOWN
    found = np.concatenate([statistic(drawn) for drawn in _draws(items)])
    undefined = np.isnan(found)
    if undefined.all() or (undefined.any() and not defined_only):
        return UNKNOWN
    low, high = np.quantile(found[~undefined], [0.025, 0.975])
    return float(low), float(high)


def streamed_interval(
    total: float,
    count: float,
    replicate_totals: Float[np.ndarray, " replicates"],
    replicate_counts: Float[np.ndarray, " replicates"],
    texts: int,
) -> Interval:
    """Of total / count, 95 %, from sums of a Poisson bootstrap over texts that were not kept (Chamandy et al. 2012).

    On each side the wider of two. Percentiles of the replicates' ratios T_r / C_r, at Phi(-+ t sqrt(n / (n - 1))) with
    n texts and t of n - 1 degrees of freedom, which undoes what 2.5 and 97.5 are short (Hesterberg 2015, "expanded").
    And Student's t, R -+ t s with R = total / count and s^2 = n / (n - 1) mean_r ((T_r - R C_r) / count)^2.

    `UNKNOWN` for fewer than two texts; (R, R) where all replicates agree. Replicates without any text are left out of
    the percentiles.
    """
    if texts < 2 or not (replicate_counts > 0).any():
        return UNKNOWN
    from scipy.special import ndtr

    ratio, drawn, wider = total / count, replicate_counts > 0, texts / (texts - 1)
    tail = float(ndtr(-half_width([(wider, texts - 1)], 0.05)))
    low, high = np.quantile(replicate_totals[drawn] / replicate_counts[drawn], [tail, 1 - tail])
    variance = wider * float(np.mean(((replicate_totals - ratio * replicate_counts) / count) ** 2))
    half = half_width([(variance, texts - 1)], 0.05)
    return min(float(low), ratio - half), max(float(high), ratio + half)


def wilson(right: Values, confidence: float = 0.95) -> Interval:
    """Of the share of ones among zeros and ones (Wilson 1927). ValueError without any item."""
    from scipy.stats import binomtest

    found = binomtest(int(right.sum()), len(right)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def newcombe(x: Values, y: Values, confidence: float = 0.95) -> Interval:
    """Of the difference of two independent proportions, p - q (Newcombe 1998, method 10, from Wilson intervals (l, u)).

    Low  = p - q - sqrt((p - l_p)^2 + (u_q - q)^2)
    High = p - q + sqrt((u_p - p)^2 + (q - l_q)^2)
    """
    p, q = float(x.mean()), float(y.mean())
    (lp, up), (lq, uq) = wilson(x, confidence), wilson(y, confidence)
    return p - q - math.hypot(p - lp, uq - q), p - q + math.hypot(up - p, q - lq)


def ratio_interval(x: Values, y: Values, confidence: float = 0.95) -> Interval:
    """Of the ratio of two independent proportions, p / q with q > 0 (Donner and Zou 2012, MOVER from Wilson's).

    With bounds (l, u) of each and f(a, b) = a (2p - a) b (2q - b),
    low  = (p q - sqrt((p q)^2 - f(l_p, u_q))) / (u_q (2q - u_q))
    high = (p q + sqrt((p q)^2 - f(u_p, l_q))) / (l_q (2q - l_q))
    """
    p, q = float(x.mean()), float(y.mean())
    (lp, up), (lq, uq) = wilson(x, confidence), wilson(y, confidence)

    def bound(a: float, b: float, sign: int) -> float:
        rest = b * (2 * q - b)
        root = math.sqrt(max(0.0, (p * q) ** 2 - a * (2 * p - a) * rest))
        if sign < 0:  # the same, without a difference of nearly equal numbers or a zero below
            return max(0.0, a * (2 * p - a) / (p * q + root)) if p else 0.0
        return (p * q + root) / rest

    return bound(lp, uq, -1), bound(up, lq, 1)


def variance_of_mean(values: Values) -> float:
    """s^2 / n of n values, in their unit squared; exactly 0 where all are equal."""
    return 0.0 if (values == values[0]).all() else float(values.var(ddof=1)) / len(values)


def half_width(parts: Sequence[tuple[float, int | float]], alpha: float) -> float:
    """sqrt(sum_k t_k^2 V_k), half of a two-sided interval of confidence 1 - alpha.

    `parts` are variances V_k, each with the degrees of freedom of its own quantile t_k, at least 1 (Cochran and Cox
    1950). One part gives Student's t sqrt(V).
    """
    from scipy.special import stdtrit

    return math.sqrt(sum(float(stdtrit(max(1, df), alpha / 2)) ** 2 * variance for variance, df in parts))


def edge(inside: Callable[[float], bool], within: float, beyond: float) -> float:
    """The last number on the way from `within` to `beyond` at which `inside` is true, by bisection.

    `inside` is true at `within`, and changes once at most. Found to 3e-14 of the way; `beyond` itself if it is inside.
    """
    if inside(beyond):
        return beyond
    for _ in range(45):
        middle = (within + beyond) / 2
        within, beyond = (middle, beyond) if inside(middle) else (within, middle)
    return within


def larger(values: Values) -> tuple[int, Values]:
    """The values sorted, with 1, or their negatives, with -1: of the two the larger.

    What is drawn from them follows from neither the order nor the sign of the values.
    """
    up, down = np.sort(values), np.sort(-values)
    return (1, up) if up.tolist() >= down.tolist() else (-1, down)


def _of_mean(values: Values, confidence: float) -> Interval:
    """The wider of t and BCa, whose draws are of `larger(values)`.

    BCa's bounds are percentiles of the means of draws, at Phi(z0 + (z0 + z) / (1 - a (z0 + z))) for the normal
    quantiles z, with Phi(z0) the share of draws below the mean and a = sum_i c_i^3 / (6 (sum_i c_i^2)^1.5), c centred.
    """
    from scipy.special import ndtr, ndtri

    sign, ordered = larger(values)
    mean, variance = float(ordered.mean()), variance_of_mean(ordered)
    if not variance > 0:
        return sign * mean, sign * mean
    half, spread = half_width([(variance, len(values) - 1)], 1 - confidence), math.sqrt(variance)
    means = np.concatenate([ordered[drawn].mean(1) for drawn in _draws(len(values))])
    ties = 1e-9 * spread  # equal but for rounding
    z0 = ndtri(((means < mean - ties).mean() + (means <= mean + ties).mean()) / 2)
    c = ordered - mean
    a = float((c**3).sum()) / (6 * float((c**2).sum()) ** 1.5)
    z = z0 + ndtri((1 + np.array([-confidence, confidence])) / 2)
    low, high = np.quantile(means, ndtr(z0 + z / (1 - a * z)))
    low, high = min(mean - half, float(low)), max(mean + half, float(high))
    return (low, high) if sign > 0 else (-high, -low)


def _draws(items: int) -> Iterator[Int[np.ndarray, "draws items"]]:
    """The numbers of the items in each of 9,999 bootstrap draws, as `scipy.stats.bootstrap(rng=0, batch=500)` draws."""
    random = np.random.default_rng(0)
    return (random.integers(0, items, (min(500, DRAWS - k), items)) for k in range(0, DRAWS, 500))


def _check(confidence: float, *samples: Values) -> None:
    if not all(np.isfinite(sample).all() for sample in samples):
        raise ValueError("a value or weight is not a finite number: leave such items out, and say how many")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95")
