"""Two arms on the same items: how much better the second is, and how sure that is.

    found = effect(right_a, right_b)      # one number an item and arm, or [seeds, items]
    found.value, found.interval, found.p

Which test and which interval, by what the outcomes are:

    outcomes             test                                  interval of the mean difference
    0 and 1              McNemar's, exact (1947)               Tango's score interval (1998)
    any numbers          sign flips (Fisher 1935)              on each side the wider of Student's t and Hall's
    an arm with seeds    Cochran and Cox (1950), both random   the same, inverted

At 50 items these intervals cover the truth 93 to 97 times of 100 wherever 5 items or more are expected to differ, as
the benchmark of the A/B test measures. Wald's interval and t alone cover it less often. Where fewer items differ,
counts are too few for an interval or an exact test of 0/1 outcomes to be that precise: both err on the safe side.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tokenpaths.stats.intervals import (
    UNKNOWN,
    Interval,
    Values,
    edge,
    half_width,
    larger,
    mean_interval,
    variance_of_mean,
)

MCNEMAR, COCHRAN_COX = "McNemar, exact", "Cochran-Cox t over items and seeds"
LEAST_P = 1e-12
"""The least p-value that the test over seeds gives."""
Outcomes = Float[np.ndarray, "_ items"]  # a row for each seed of an arm


@dataclass(frozen=True)
class Effect:
    """The mean outcome of arm b less that of arm a.

    Args:
        value: the difference, in the unit of the outcomes.
        interval: of `value`, of the confidence `confidence`.
        p: two-sided, of the hypothesis that the arms do not differ.
        items: the number of items.
        wins: items on which b is above a, by the mean over seeds.
        losses: items on which b is below a.
        parts: the variances of `value` with their degrees of freedom: that of items, then that of each arm's seeds.
        test: the name of the test.
        method: the name of the interval.
        confidence: of the interval.
    """

    value: float
    interval: Interval
    p: float
    items: int
    wins: int
    losses: int
    parts: tuple[tuple[float, int], ...]
    test: str
    method: str
    confidence: float = 0.95


def effect(a: np.ndarray, b: np.ndarray, *, confidence: float = 0.95, seed: int = 0, counts: bool = True) -> Effect:
    """Compare the outcomes of two arms on the same items.

    With several seeds of an arm the claim is about its method and not about one training run. Items and seeds are then
    both random (crossed). The variance of the difference is V_i of items plus V_s of seeds. Each gets the t quantile of
    its own degrees of freedom: half^2 = t_i^2 V_i + t_s^2 V_s (Cochran and Cox 1950). A bootstrap over two or three
    seeds covers too seldom, and so do Satterthwaite's degrees of freedom.

    Args:
        a: outcomes of the first arm, one for each item, [items] or [seeds, items].
        b: outcomes of the second arm on the same items.
        confidence: of the interval.
        seed: of the sign flips.
        counts: take outcomes that are all 0 or 1 for counts of right answers. Give False for nats, which may be 0 too.

    Raises:
        ValueError: no items, other numbers of items, a number that is not finite, or a confidence outside (0, 1).
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    _check(a, b, confidence)
    d = b.mean(0) - a.mean(0)
    seeds = [(variance_of_mean(arm.mean(1)), len(arm) - 1) for arm in (a, b) if len(arm) > 1]
    parts = ((variance_of_mean(d), len(d) - 1), *seeds)
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    spread = parts[0][0] > 0
    if seeds:
        names = COCHRAN_COX, COCHRAN_COX
        mean, half = float(d.mean()), half_width(parts, 1 - confidence)
        interval = mean - half, mean + half
        p = _p_of_parts(abs(mean), parts) if spread else sign_flips(d, seed)
    elif counts and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        names, spread = (MCNEMAR, "Tango's score interval"), True
        interval, p = tango(wins, losses, len(d), confidence), mcnemar(wins, losses)
    else:
        names = "sign flips", "the wider of Student's t and Hall's"
        interval, p = mean_interval(d, confidence=confidence), sign_flips(d, seed)
    if not spread:
        interval, names = UNKNOWN, (names[0], "none: all differences are equal, and their spread unknown")
    return Effect(float(d.mean()), interval, p, len(d), wins, losses, parts, *names, confidence)


def mcnemar(wins: int, losses: int) -> float:
    """The p-value of McNemar's exact test: items that differ are won or lost with probability 1/2. 1 if none differ."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flips(d: Values, seed: int = 0) -> float:
    """The share of the sign patterns of paired differences whose mean is at least as far from 0 (Fisher 1935).

    Up to 13 differences all patterns are counted. Beyond, 9,999 are drawn, and the observed one is counted among them.
    Differences of 0 are left out. The draws follow from `seed` and from the differences: the same draws for all data
    would err the same way each time.
    """
    from scipy.stats import permutation_test

    _, ordered = larger(d[d != 0])
    if len(ordered) < 2:
        return 1.0
    found = permutation_test(
        (ordered,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=9999,
        batch=1000, rng=np.random.default_rng([seed, zlib.crc32(ordered.tobytes())]),
    )  # fmt: skip
    return float(found.pvalue)


def tango(wins: int, losses: int, items: int, confidence: float = 0.95) -> Interval:
    """Tango's interval (Statistics in Medicine 17, 1998) of p_b - p_a: all D that a score test does not reject.

    (wins - losses - n D)^2 <= z^2 n (2 q + D (1 - D)) over n items, with q the likeliest P(a right, b wrong) under D.
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))

    def inside(change: float) -> bool:
        q = _likeliest_loss(wins, losses, items, change)
        return (wins - losses - items * change) ** 2 <= z * z * items * (2 * q + change * (1 - change))

    estimate = (wins - losses) / items
    return edge(inside, estimate, -1.0), edge(inside, estimate, 1.0)


def holm(p: Sequence[float]) -> tuple[float, ...]:
    """Holm's (1979) adjusted p-values: if those of at most alpha are rejected, P(any false rejection) <= alpha."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def likelihood(wins: int, losses: int, items: int, change: float) -> float:
    """The largest log-likelihood of items won, lost and neither, in one order, under p_b - p_a = change."""
    from scipy.special import xlogy

    q = _likeliest_loss(wins, losses, items, change)
    shares = (q + change, q, 1 - 2 * q - change)
    counts = (wins, losses, items - wins - losses)
    return float(sum(xlogy(count, max(0.0, share)) for count, share in zip(counts, shares, strict=True)))


def _likeliest_loss(wins: int, losses: int, items: int, change: float) -> float:
    """The likeliest probability that an item is lost, under p_b - p_a = change: Tango's quadratic, A q^2 + B q + C."""
    a = 2 * items
    b = -wins - losses + (2 * items - wins + losses) * change
    c = -losses * change * (1 - change)
    return (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)


def _p_of_parts(size: float, parts: Sequence[tuple[float, int]]) -> float:
    """The least alpha whose interval, `size` +- half its width, does not hold 0; `LEAST_P` at least."""
    return edge(lambda alpha: half_width(parts, alpha) <= size, 1.0, LEAST_P)


def _check(a: np.ndarray, b: np.ndarray, confidence: float) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(
            f"outcomes have shapes {list(a.shape)} and {list(b.shape)}: give both arms one number for each of the same "
            "items, [items] or [seeds, items]"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("an outcome is not a finite number: every item needs one from every arm")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95")
