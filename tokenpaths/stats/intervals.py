"""The intervals of the package: of means and paired changes, of proportions, and of what streams by.

    mean_interval(after - before)                # of the mean of paired changes: nats, areas, right less right
    mean_interval(nats, weights=tokens)          # of sum(nats) / sum(tokens), items being texts
    difference_interval(x, y)                    # of mean(x) - mean(y), two independent samples

Those of means are on each side the wider of two. One is Student's t, v -+ t s with the estimate v, its standard error s
and the quantile t of its degrees of freedom. It is short where values are skewed. The other is t after Hall's (1992)
transformation, which takes skewness out of it: with k the skewness of the estimate,

    v - s g(t)  to  v - s g(-t),        g(y) = 3 / k ((1 + k (y - k / 6))^(1/3) - 1)

`benchmarks/coverage` measures how often they hold the truth at 4 to 128 items. All are of 95 % unless told, and the
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


def mean_interval(
    values: Values,
    weights: Values | None = None,
    confidence: float = 0.95,
    *,
    within: tuple[int | float, int | float] | None = None,
) -> Interval:
    """Of the mean, or of sum(values) / sum(weights): the wider of Student's t and Hall's, over items.

    Of n items with standard deviation s and skewness G, the mean has the standard error s / sqrt(n) and the skewness
    k = G / sqrt(n). With weights w, the ratio R and n items, the same is made of the jackknife's deviations (Miller
    1974), centred, W being the sum of the w,

        d_i = (n - 1) (R - R without item i) = (n - 1) (v_i - R w_i) / (W - w_i)

    and R is added; equal weights give the interval of the mean. Neither order nor sign of the values matters.

    Where all values are equal, or all d, it is (v, v). That says that no item differed, not that none would: a share q
    of up to 1 - ((1 - confidence) / 2)^(1 / n) may. Say in `within` how far values can lie, as (-1, 1) for changes of
    right answers, and it is then v - q (v - low) to v + q (high - v). `within` also cuts other intervals.

    Args:
        values: one number an item, in any unit.
        weights: what each item counts, as its tokens; without them, all count alike.
        confidence: of the interval.
        within: the least and the most that a value can be. Not with weights.

    Raises:
        ValueError: a number that is not finite or not within, a weight below 0 or none above, weights together with
            `within`, or a confidence outside (0, 1).
    """
    items = len(values)
    _check(confidence, values, *(() if weights is None else (weights,)))
    low, high = map(float, within or UNKNOWN)
    if items and not low <= values.min() <= values.max() <= high:
        raise ValueError(f"within={within}, but the values lie from {values.min():g} to {values.max():g}")
    if items < 2:
        return low, high
    if weights is None:
        found = _of_mean(values, confidence)
        if within is None:
            return found
        if found[0] == found[1]:
            share = at_most(0, items, (1 + confidence) / 2)
            found = found[0] - share * (found[0] - low), found[1] + share * (high - found[1])
        return max(low, found[0]), min(high, found[1])
    if within is not None:
        raise ValueError("within= is for values that count alike: leave out the weights")
    total = float(weights.sum())
    if len(weights) != items or (weights < 0).any() or not total:
        raise ValueError(f"weights must be numbers of at least 0, not all 0, one for each of {items} values")
    if (weights == total).any():  # of one item alone
        return UNKNOWN
    ratio = float(values.sum()) / total
    deviations = (items - 1) * (values - ratio * weights) / (total - weights)
    low, high = _of_mean(deviations - deviations.mean(), confidence)
    return ratio + low, ratio + high


def at_most(count: int, items: int, confidence: float = 0.95) -> float:
    """The upper limit, one-sided, of a share that was `count` of `items` (Clopper and Pearson 1934).

    With 0 of n it is 1 - (1 - confidence)^(1 / n).
    """
    from scipy.special import betaincinv

    return 1.0 if count >= items else float(betaincinv(count + 1, items - count, confidence))


def difference_interval(x: Values, y: Values, confidence: float = 0.95) -> Interval:
    """Of mean(x) - mean(y), two independent samples of numbers, in their unit: the wider of Welch's t and Hall's.

    The variance is V_x + V_y, with V = var / n of each sample. Its t (Welch 1947) has (V_x + V_y)^2 / (V_x^2 /
    (n_x - 1) + V_y^2 / (n_y - 1)) degrees of freedom. The skewness is (k_x V_x^1.5 - k_y V_y^1.5) / (V_x + V_y)^1.5
    of those of the two means. (v, v) where neither sample has any spread, as in `mean_interval`, and `UNKNOWN` for fewer
    than two items in either. Of proportions see `newcombe`. ValueError as `mean_interval`.
    """
    _check(confidence, x, y)
    if min(len(x), len(y)) < 2:
        return UNKNOWN
    value, (a, b) = float(x.mean() - y.mean()), (variance_of_mean(x), variance_of_mean(y))
    if not a + b > 0:
        return value, value
    share = a / (a + b)
    freedom = 1 / (share**2 / (len(x) - 1) + (1 - share) ** 2 / (len(y) - 1))
    skewness = share**1.5 * _skewness_of_mean(x) - (1 - share) ** 1.5 * _skewness_of_mean(y)
    return _wider(value, a + b, skewness, freedom, confidence)


def statistic_interval(
    statistic: Callable[[Int[np.ndarray, "*draws items"]], Any], items: int, *, defined_only: bool = False
) -> Interval:
    """Of a statistic of the items that were drawn, given by their numbers: 95 % percentile bootstrap over items.

    For what is no mean, such as a maximum or a ratio of ratios. Its percentiles are those of `_tail`, which undoes what
    2.5 and 97.5 are short for few items; where the statistic is skewed it is short nevertheless. `UNKNOWN` for fewer
    than two items, and where a draw leaves the statistic undefined (NaN); with `defined_only`, such draws are left out,
    and it is `UNKNOWN` if all are undefined.
    """
    if items < 2:
        return UNKNOWN
    found = np.concatenate([statistic(drawn) for drawn in _draws(items)])
    undefined = np.isnan(found)
    if undefined.all() or (undefined.any() and not defined_only):
        return UNKNOWN
    tail = _tail(items)
    low, high = np.quantile(found[~undefined], [tail, 1 - tail])
    return float(low), float(high)


def streamed_interval(
    total: float,
    count: float,
    replicate_totals: Float[np.ndarray, " replicates"],
    replicate_counts: Float[np.ndarray, " replicates"],
    texts: int,
) -> Interval:
    """Of total / count, 95 %, from sums of a Poisson bootstrap over texts that were not kept (Chamandy et al. 2012).

    On each side the widest of three: percentiles of the replicates' ratios T_r / C_r, at those of `_tail`, and t and
    Hall's of R = total / count. With e_r = (T_r - R C_r) / count and n texts, the variance of R is n / (n - 1)
    mean_r e_r^2, and its skewness that of the e_r, by the same factor for few texts as `mean_interval` has.

    `UNKNOWN` for fewer than two texts; (R, R) where all replicates agree. Replicates without any text are left out of
    the percentiles.
    """
    if texts < 2 or not (replicate_counts > 0).any():
        return UNKNOWN
    ratio, drawn, tail = total / count, replicate_counts > 0, _tail(texts)
    low, high = np.quantile(replicate_totals[drawn] / replicate_counts[drawn], [tail, 1 - tail])
    e = (replicate_totals - ratio * replicate_counts) / count
    variance = texts / (texts - 1) * float(np.mean(e**2))
    skewness = _unbiased(texts) * float(np.mean(e**3)) / float(np.mean(e**2)) ** 1.5 if variance > 0 else 0.0
    found = _wider(ratio, variance, skewness, texts - 1, 0.95)
    return min(float(low), found[0]), max(float(high), found[1])


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

    What is drawn or summed of them follows from neither the order nor the sign of the values.
    """
    up, down = np.sort(values), np.sort(-values)
    return (1, up) if up.tolist() >= down.tolist() else (-1, down)


def _of_mean(values: Values, confidence: float) -> Interval:
    sign, ordered = larger(values)  # rounding hangs on the order
    mean, variance = float(ordered.mean()), variance_of_mean(ordered)
    if not variance > 0:
        return sign * float(ordered[0]), sign * float(ordered[0])
    low, high = _wider(mean, variance, _skewness_of_mean(ordered), len(ordered) - 1, confidence)
    return (low, high) if sign > 0 else (-high, -low)


def _wider(value: float, variance: float, skewness: float, freedom: int | float, confidence: float) -> Interval:
    """On each side the wider of t and Hall's: see the head of the module."""
    half = half_width([(variance, freedom)], 1 - confidence)
    if not half:
        return value, value
    error = math.sqrt(variance)

    def bound(side: int) -> float:
        y = side * half / error
        if abs(skewness) < 1e-6:  # where the quotient below has no digits left
            return value - side * half
        return value - error * 3 / skewness * (float(np.cbrt(1 + skewness * (y - skewness / 6))) - 1)

    return min(bound(1), value - half), max(bound(-1), value + half)


def _skewness_of_mean(values: Values) -> float:
    """G / sqrt(n), the skewness of the mean of n values with skewness G (Fisher's G1); 0 for two, or without spread."""
    centred = values - values.mean()
    second = float(np.mean(centred**2))
    if len(values) < 3 or not variance_of_mean(values) > 0 or not second > 0:
        return 0.0
    return _unbiased(len(values)) * float(np.mean((centred / math.sqrt(second)) ** 3)) / math.sqrt(len(values))


def _unbiased(items: int) -> float:
    """What the moments' skewness of n items is multiplied with: sqrt(n (n - 1)) / (n - 2), and 0 for two items."""
    return math.sqrt(items * (items - 1)) / (items - 2) if items > 2 else 0.0


def _tail(items: int) -> float:
    """The percentile for 2.5 % of n items, Phi(-t sqrt(n / (n - 1))), t of n - 1 (Hesterberg 2015, "expanded")."""
    from scipy.special import ndtr

    return float(ndtr(-half_width([(items / (items - 1), items - 1)], 0.05)))


def _draws(items: int) -> Iterator[Int[np.ndarray, "draws items"]]:
    """The numbers of the items in each of 9,999 bootstrap draws, as `scipy.stats.bootstrap(rng=0, batch=500)` draws."""
    random = np.random.default_rng(0)
    return (random.integers(0, items, (min(500, DRAWS - k), items)) for k in range(0, DRAWS, 500))


def _check(confidence: float, *samples: Values) -> None:
    if not all(np.isfinite(sample).all() for sample in samples):
        raise ValueError("a value or weight is not a finite number: leave such items out, and say how many")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95")
