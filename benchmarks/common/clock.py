"""How it is timed: arms in alternation, their ratios round by round, FLOPs, exponents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.process import now

Arm = Callable[[], float]
"""Runs once, and says how many seconds it took."""


def timed(call: Callable[[], Any]) -> Arm:
    def run() -> float:
        began = now()
        call()
        return now() - began

    return run


def alternate(arms: Mapping[str, Arm], rounds: int, warm: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, the first `warm` rounds dropped.

    Each round begins with another arm, and every second one turns back, so that no arm always follows the same one.
    """
    names = list(arms)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm + rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order if number % 2 else reversed(order):
            found[name].append(round(arms[name](), 6))
    return {name: seconds[warm:] for name, seconds in found.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios with its interval, and the lowest and highest round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, high = interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high, "min": min(ratios), "max": max(ratios)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, by order statistics: 95 % or more from six values on, and the extremes of fewer."""
    ordered, n = sorted(values), len(values)
    k = max(int(stats.binom.ppf(0.025, n, 0.5)), 1)  # the median is below the k-th of them in under 2.5 %
    return ordered[k - 1], ordered[n - k]


def exponent(sizes: Sequence[float], seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """The slope of log seconds against log size over all rounds."""
    x = [math.log(size) for size, rounds in zip(sizes, seconds, strict=True) for _ in rounds]
    return slope(x, [math.log(value) for rounds in seconds for value in rounds])


def slope(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Of a straight line through the points, with its 95 % interval."""
    fit: Any = stats.linregress(x, y)
    reach = float(stats.t.ppf(0.975, len(x) - 2)) * float(fit.stderr)
    return {"slope": float(fit.slope), "low": float(fit.slope) - reach, "high": float(fit.slope) + reach}


def flops(call: Callable[[], Any]) -> int:
    """By torch's counter, which counts matrix products. Attention on a CPU is added here; QR is in none of it."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        call()
    return counter.get_total_flops()


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[-2] * width  # causality saves nothing, as torch counts it elsewhere


def _attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return _attention(query, key) * 5 // 2


_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
