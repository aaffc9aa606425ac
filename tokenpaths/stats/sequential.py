"""Looking at the outcomes as often as one likes, and stopping when they tell: evidence that stays valid.

    evidence(wins=14, losses=2)                       # 32: a fair bet on this would have paid 32 : 1
    always_valid(wins=14, losses=2, items=50)         # an interval of p_b - p_a that holds at all looks together

If neither arm is better, a won item is as likely as a lost one. A bet that spreads its stake evenly over all chances
theta of a win holds E = int theta^w (1 - theta)^l dtheta / (1/2)^(w + l) after w wins and l losses: a martingale with
mean 1, which by Ville's inequality (1939) ever reaches 1 / alpha with probability alpha at most. So stop when it does.
"""

from __future__ import annotations

import math

from tokenpaths.stats.intervals import Interval
from tokenpaths.stats.paired import edges, likelihood


def log_evidence(wins: int, losses: int) -> float:
    """The logarithm, log E = (w + l) log 2 + log B(w + 1, l + 1)."""
    total = wins + losses
    return total * math.log(2) + math.lgamma(wins + 1) + math.lgamma(losses + 1) - math.lgamma(total + 2)


def evidence(wins: int, losses: int) -> float:
    """E itself, or e^690 if it is more, which a float still holds."""
    return math.exp(min(690.0, log_evidence(wins, losses)))


def always_valid(wins: int, losses: int, items: int, confidence: float = 0.95) -> Interval:
    """An interval of p_b - p_a that covers it at every look with the confidence, all looks together.

    All D for which some shares (won, lost, neither) with won - lost = D are not bet against with success: their
    likelihood is above alpha times the mean likelihood over all shares (mixed by Dirichlet(1/2, 1/2, 1/2); Robbins
    1970). It allows for any share of items that differ, so it may still hold 0 where `evidence` has told.
    """
    counts = (wins, losses, items - wins - losses)
    mean = math.lgamma(1.5) - math.lgamma(items + 1.5) + sum(math.lgamma(n + 0.5) - math.lgamma(0.5) for n in counts)
    least = math.log(1 - confidence) + mean
    return edges(lambda change: likelihood(wins, losses, items, change) >= least, (wins - losses) / items)
