"""Two arms on the same items: how much better is the second, and how sure is that.

    found = effect(right_a, right_b)      # one number an item and arm, or [seeds, items]
    found.value, found.interval, found.p

Which test and which interval, by what the outcomes are:

    outcomes             test                                  interval of the mean difference
    0 and 1              McNemar's, exact (1947)               Tango's score interval (1998)
    any numbers          sign flips (Fisher 1935)              on each side the wider of Student's t and BCa
    an arm with seeds    Cochran and Cox (1950), both random   the same, inverted

At 50 items these, and not their rivals, cover the truth 93 to 97 times of 100 wherever 5 items or more are expected to
differ (`benchmarks/ab.py`): Wald's interval and BCa alone cover too seldom. Where fewer differ, no interval and no
exact test of 0/1 outcomes can be that precise: they err on the safe side.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tokenpaths.stats.intervals import UNKNOWN, Interval, mean_interval

MCNEMAR, COCHRAN_COX = "McNemar, exact", "Cochran-Cox t over items and seeds"
LEAST_P = 1e-12
"""A p-value of the seeds' test is not computed below this."""
Numbers = Float[np.ndarray, "_"]
Outcomes = Float[np.ndarray, "_ items"]  # a row for each seed of an arm


@dataclass(frozen=True)
class Effect:
    """The mean outcome of arm b less that of arm a, over items.

    `p` is two-sided, of the hypothesis that the arms do not differ. `wins` and `losses` count the items on which b is
    above and below a (by the mean over seeds). `parts` are the variances of `value`, of items first and then of each
    arm's seeds, with their degrees of freedom; `test` and `method` name the test and the interval.
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
    """Compare the outcomes of two arms on the same items, [items] or [seeds, items].

    With several seeds of an arm the claim is about its method, not about one training run: items and seeds are both
    random (crossed). The variance of the difference is that of items, plus that of seeds, V_i + V_s; each gets the t
    quantile of its own degrees of freedom, half^2 = t_i^2 V_i + t_s^2 V_s (Cochran and Cox 1950). A bootstrap over two
    or three seeds, or Satterthwaite's degrees of freedom, is too sure of itself. `seed` draws sign flips and resamples.

    Outcomes that are all 0 or 1 are taken for counts of right answers, unless `counts` is False: nats may be 0 as well.

    Raises:
        ValueError: no items, other numbers of items, a number that is not finite, or a confidence outside (0, 1).
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    _check(a, b, confidence)
    d = b.mean(0) - a.mean(0)
    parts = _parts(a, b, d)
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    if len(parts) > 1:
        names = COCHRAN_COX, COCHRAN_COX
        p, interval = _p_of_parts(d, parts, seed), _interval_of_parts(d, parts, confidence)
    elif counts and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        names = MCNEMAR, "Tango's score interval"
        p, interval = mcnemar(wins, losses), tango(wins, losses, len(d), confidence)
    else:
        names = "sign flips", "the wider of Student's t and BCa"
        p, interval = sign_flips(d, seed), mean_interval(d, confidence=confidence)
        if interval[0] == interval[1]:
            interval = UNKNOWN
    if interval == UNKNOWN:
        names = names[0], "none: all differences are equal, and their spread unknown"
    return Effect(float(d.mean()), interval, p, len(d), wins, losses, parts, *names, confidence)


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact test: given that an item is won or lost, each has probability 1/2. 1 where none is."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flips(d: Numbers, seed: int = 0) -> float:
    """The share of sign patterns of paired differences whose mean is as far from 0; all of them up to 13 items.

    Above, 9,999 are drawn and the observed one is counted among them. Equal items say nothing and are left out. What is
    drawn follows from `seed` and the differences: the same draws for all data would err the same way each time.
    """
    from scipy.stats import permutation_test

    ordered, _ = _ordered(d[d != 0])
    if len(ordered) < 2:
        return 1.0
    found = permutation_test(
        (ordered,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=9999,
        batch=1000, rng=np.random.default_rng([seed, zlib.crc32(ordered.tobytes())]),
    )  # fmt: skip
    return float(found.pvalue)


def tango(wins: int, losses: int, items: int, confidence: float = 0.95) -> Interval:
    """Tango's interval (Statistics in Medicine 17, 1998) of p_b - p_a: all D that a score test does not reject.

    (wins - losses - n D)^2 <= z^2 n (2 q + D (1 - D)), with q the likeliest P(a right, b wrong) under D.
    """
    from scipy.stats import norm

    z = float(norm.ppf((1 + confidence) / 2))

    def inside(change: float) -> bool:
        q = _likeliest_loss(wins, losses, items, change)
        return (wins - losses - items * change) ** 2 <= z * z * items * (2 * q + change * (1 - change))

    return edges(inside, (wins - losses) / items)


def holm(p: Sequence[float]) -> tuple[float, ...]:
    """Holm's (1979) adjusted p-values: reject those at most alpha, and any false rejection has probability alpha."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def edges(inside: Callable[[float], bool], estimate: float) -> Interval:
    """The stretch of [-1, 1] around the estimate on which `inside` is true, by bisection."""
    found: list[float] = []
    for end in (-1.0, 1.0):
        within, beyond = estimate, end
        if inside(end):
            within = end
        for _ in range(45):  # to 1e-13
            middle = (within + beyond) / 2
            within, beyond = (middle, beyond) if inside(middle) else (within, middle)
        found.append(within)
    return found[0], found[1]


def likelihood(wins: int, losses: int, items: int, change: float) -> float:
    """The largest log-likelihood of items won, lost and neither, under p_b - p_a = change (one order of the items)."""
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


def _parts(a: Outcomes, b: Outcomes, d: Numbers) -> tuple[tuple[float, int], ...]:
    """Variances of the mean difference and their degrees of freedom: of items, and of the seeds of each arm."""
    seeds = [(_variance_of_mean(arm.mean(1)), len(arm) - 1) for arm in (a, b) if len(arm) > 1]
    return (_variance_of_mean(d), len(d) - 1), *seeds


def _variance_of_mean(values: Numbers) -> float:
    if len(values) < 2 or (values == values[0]).all():
        return 0.0
    return float(values.var(ddof=1)) / len(values)


def half_width(parts: Sequence[tuple[float, int]], alpha: float) -> float:
    """sqrt(sum_k t_k^2 V_k), with t_k the two-sided quantile of each variance's own degrees of freedom."""
    from scipy.stats import t

    return math.sqrt(sum(float(t.isf(alpha / 2, max(1, df))) ** 2 * variance for variance, df in parts))


def _interval_of_parts(d: Numbers, parts: Sequence[tuple[float, int]], confidence: float) -> Interval:
    if not parts[0][0] > 0:
        return UNKNOWN
    mean, half = float(d.mean()), half_width(parts, 1 - confidence)
    return mean - half, mean + half


def _p_of_parts(d: Numbers, parts: Sequence[tuple[float, int]], seed: int) -> float:
    """The alpha at which the interval just reaches 0."""
    from scipy.optimize import brentq

    size = abs(float(d.mean()))
    if not parts[0][0] > 0:
        return sign_flips(d, seed)
    if size == 0:
        return 1.0
    if half_width(parts, LEAST_P) <= size:
        return LEAST_P
    found: Any = brentq(lambda alpha: half_width(parts, alpha) - size, LEAST_P, 1.0)
    return float(found)


def _ordered(d: Numbers) -> tuple[Numbers, int]:
    """The differences sorted, negated if that is larger: what is drawn from them hangs on neither order nor sign."""
    up, down = np.sort(d), np.sort(-d)
    return (up, 1) if up.tolist() >= down.tolist() else (down, -1)


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
