"""Power: the effect that a number of items can show, and the number of items that would show an effect.

    mcnemar_power(50, gain=0.2, discordant=0.3)   # the probability that McNemar's exact test rejects
    foresee(found).detectable, foresee(found).tells

Power at the effect that was found says what a larger test would do if that effect were the true one, and no more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tokenpaths.stats.intervals import edge, half_width
from tokenpaths.stats.paired import MCNEMAR, Effect

MOST_ITEMS = 100_000
"""The largest number of items that `Power.tells` names."""


@dataclass(frozen=True)
class Power:
    """What a test can show, if further items are like those seen.

    Args:
        target: the probability with which it should show an effect.
        detectable: the smallest true effect that the items seen show with that probability; inf if they show none.
        tells: the number of items that show the effect that was found, were it the true one; None if no number up to
            `MOST_ITEMS` does.
        curve: numbers of items, each with the probability that it shows the effect that was found.
    """

    target: float
    detectable: float = field(metadata={"null": math.inf})
    tells: int | None
    curve: tuple[tuple[int, float], ...]


def mcnemar_power(items: int, gain: float, discordant: float, alpha: float = 0.05) -> float:
    """The probability that McNemar's exact test rejects: sum_m Bin(m; n, psi) P(reject | m items differ).

    An item that differs is won with probability (psi + gain) / (2 psi).

    Args:
        items: n, their number.
        gain: p_b - p_a, at most psi.
        discordant: psi, the probability that an item differs.
        alpha: the level of the test.

    Raises:
        ValueError: |gain| > discordant, or a discordant share outside [0, 1].
    """
    from scipy.stats import binom

    if not abs(gain) <= discordant <= 1:
        raise ValueError(
            f"gain={gain} cannot exceed the share of items that differ, discordant={discordant}, nor that 1"
        )
    if discordant == 0:
        return 0.0
    low, high = binom.ppf([1e-12, 1 - 1e-12], items, discordant)
    m = np.arange(int(low), int(high) + 1)
    last = binom.ppf(alpha / 2, m, 0.5)
    last = np.where(binom.cdf(last, m, 0.5) > alpha / 2, last - 1, last)  # the most wins, or losses, that reject
    won = (discordant + gain) / (2 * discordant)
    rejects = binom.cdf(last, m, won) + binom.sf(m - last - 1, m, won)
    return float(min(1.0, (binom.pmf(m, items, discordant) * rejects).sum()))


def foresee(found: Effect, *, alpha: float = 0.05, target: float = 0.8) -> Power:
    """Power of the test behind an effect: exact for McNemar's, else from normal theory on the variances that were seen.

    The variance of seeds does not shrink with items. Where it hides the effect, only more seeds show it.

    Args:
        found: the effect, and the test that found it.
        alpha: the level of the test.
        target: the probability that `Power.detectable` and `Power.tells` are made for.

    Raises:
        ValueError: alpha or target outside (0, 1).
    """
    if not (0 < alpha < 1 and 0 < target < 1):
        raise ValueError(f"alpha={alpha} and target={target} are probabilities: both must lie between 0 and 1")
    power = _of_mcnemar(found, alpha) if found.test == MCNEMAR else _of_parts(found, alpha)
    size = abs(found.value)
    tells = _first(lambda n: power(n, size) >= target, MOST_ITEMS) if size else None
    most = max(4 * found.items, 10, min(2 * (tells or 0), MOST_ITEMS))
    counts = sorted({round(n) for n in np.geomspace(max(5, found.items // 5), most, 24)})
    curve = tuple((n, power(n, size)) for n in counts)
    return Power(target, _detectable(found, power, target), tells, curve)


def _of_mcnemar(found: Effect, alpha: float) -> Callable[[int, float], float]:
    seen = max(found.wins + found.losses, 1) / found.items
    return lambda n, size: mcnemar_power(n, size, max(seen, size), alpha)


def _of_parts(found: Effect, alpha: float) -> Callable[[int, float], float]:
    """P(|estimate| > half width), the estimate normal around the effect."""
    from scipy.special import ndtr

    (of_items, _), *of_seeds = found.parts

    def power(n: int, size: float) -> float:
        parts = [(of_items * found.items / n, n - 1), *of_seeds]
        error, half = math.sqrt(sum(variance for variance, _ in parts)), half_width(parts, alpha)
        if error == 0:
            return float(size > 0)
        return float(ndtr((size - half) / error) + ndtr((-size - half) / error))

    return power


def _detectable(found: Effect, power: Callable[[int, float], float], target: float) -> float:
    """The least effect that is shown: at most 1 of shares, and any other number up to 1e12."""

    def shows(size: float) -> bool:
        return power(found.items, size) >= target

    most = 1.0
    while not shows(most):
        most *= 2
        if found.test == MCNEMAR or most > 1e12:
            return math.inf
    return edge(shows, most, 0.0)


def _first(tells: Callable[[int], bool], most: int) -> int | None:
    """The first number from 2 on that tells, by doubling and bisection; None beyond `most`.

    The power of exact tests falls a little between its steps, so an earlier number within a step may tell as well.
    """
    high = 2
    while not tells(high):
        high *= 2
        if high > most:
            return None
    return bisect_left(range(high), True, lo=high // 2 + 1, key=tells)
