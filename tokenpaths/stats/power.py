"""What a test of so many items can see, and how many items would tell.

    mcnemar_power(50, gain=0.2, discordant=0.3)   # the chance that McNemar's exact test rejects
    foresee(found).detectable, foresee(found).tells

Power at the effect that was found says what a larger test would do if that effect were the true one, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenpaths.stats.paired import MCNEMAR, Effect, half_width

MOST_ITEMS = 100_000
"""Beyond this many items, `Power.tells` is None: no test of these arms is worth its cost."""


@dataclass(frozen=True)
class Power:
    """What the test can see, if items are like those seen.

    `detectable` is the smallest true effect that `items` items show with probability `target`; inf where they are too
    few to show any. `tells` is the number of items that show the effect found with that probability, were it the true
    one; None if no number up to `MOST_ITEMS` does. `curve` has the probability for other numbers of items.
    """

    target: float
    detectable: float
    tells: int | None
    curve: tuple[tuple[int, float], ...]


def mcnemar_power(items: int, gain: float, discordant: float, alpha: float = 0.05) -> float:
    """The probability that McNemar's exact test rejects, over how many items differ and how many of them are won.

    sum_m Bin(m; n, psi) P(reject | m), where an item that differs is won with (psi + gain) / (2 psi). `discordant` is
    psi, the share of items that differ, and `gain` is p_b - p_a, at most psi.

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
    last = np.where(binom.cdf(last, m, 0.5) > alpha / 2, last - 1, last)  # reject at most so many wins, or losses
    won = (discordant + gain) / (2 * discordant)
    rejects = binom.cdf(last, m, won) + binom.sf(m - last - 1, m, won)
    return float(min(1.0, (binom.pmf(m, items, discordant) * rejects).sum()))


def foresee(found: Effect, *, alpha: float = 0.05, target: float = 0.8) -> Power:
    """Power of the test behind an effect; exact for McNemar's, else from normal theory on the variances that were seen.

    The variance of seeds does not shrink with items: if it is what blurs the effect, only more seeds tell.

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
    from scipy.stats import norm

    (of_items, _), *of_seeds = found.parts

    def power(n: int, size: float) -> float:
        parts = [(of_items * found.items / n, n - 1), *of_seeds]
        error, half = math.sqrt(sum(variance for variance, _ in parts)), half_width(parts, alpha)
        if error == 0:
            return float(size > 0)
        return float(norm.cdf((size - half) / error) + norm.cdf((-size - half) / error))

    return power


def _detectable(found: Effect, power: Callable[[int, float], float], target: float) -> float:
    """By bisection between 0 and the largest effect: 1 of shares; as far as it takes of other numbers."""
    beyond = 1.0
    while power(found.items, beyond) < target:
        beyond *= 2
        if found.test == MCNEMAR or beyond > 1e12:
            return math.inf
    within = 0.0
    for _ in range(50):
        middle = (within + beyond) / 2
        within, beyond = (within, middle) if power(found.items, middle) >= target else (middle, beyond)
    return beyond


def _first(tells: Callable[[int], bool], most: int) -> int | None:
    """The first number from 2 on, by doubling and bisection: exact tests go up in small steps, so within a step."""
    high = 2
    while not tells(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tells(middle) else (middle, high)
    return high
