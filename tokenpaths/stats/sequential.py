"""Evidence that stays valid however often the outcomes are looked at, so that a test may stop when it is decided.

    evidence(wins=14, losses=2)                       # 32: a fair bet on this would have paid 32 : 1
    always_valid(wins=14, losses=2, items=50)         # an interval of p_b - p_a that holds at all looks together

If neither arm is better, a won item is as likely as a lost one. A bet that spreads its stake evenly over all chances
theta of a win holds E = int theta^w (1 - theta)^l dtheta / (1/2)^(w + l) after w wins and l losses: a martingale with
mean 1. By Ville's inequality (1939) it ever reaches 1 / alpha with probability alpha at most. So stop when it does.
"""

from __future__ import annotations

import math

from tokenpaths.stats.intervals import Interval, edge
from tokenpaths.stats.paired import likelihood


def log_evidence(wins: int, losses: int) -> float:
    """The logarithm, log E = (w + l) log 2 + log B(w + 1, l + 1)."""
    total = wins + losses
    return total * math.log(2) + math.lgamma(wins + 1) + math.lgamma(losses + 1) - math.lgamma(total + 2)


def evidence(wins: int, losses: int) -> float:
    """E itself, or e^690 if it is more: the largest that a float holds is near e^709."""
    return math.exp(min(690.0, log_evidence(wins, losses)))


def always_valid(wins: int, losses: int, items: int, confidence: float = 0.95) -> Interval:
    """An interval of p_b - p_a that covers it at all looks together with probability `confidence` at least.

    It holds the differences D under which the items' largest likelihood is at least alpha = 1 - confidence times their
    mean likelihood over all shares (won, lost, neither), mixed by Dirichlet(1/2, 1/2, 1/2) (Robbins 1970). It allows
    for any share of items that differ, so it may still hold 0 where `evidence` is beyond 1 / alpha.
    """
    counts = (wins, losses, items - wins - losses)
    mean = math.lgamma(1.5) - math.lgamma(items + 1.5) + sum(math.lgamma(n + 0.5) - math.lgamma(0.5) for n in counts)
    least, estimate = math.log(1 - confidence) + mean, (wins - losses) / items

    def inside(change: float) -> bool:
        return likelihood(wins, losses, items, change) >= least

    return edge(inside, estimate, -1.0), edge(inside, estimate, 1.0)
