"""Ways to choose a learning rate from the first step of a run, each with the constant that suits it best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Tried = Sequence[Mapping[str, float]]  # what first_step.py tells
Way = Callable[[Tried], float]


def where(name: str, value: float) -> Way:
    """The rate at which something that grows with the rate has a value, on the line in logarithms."""

    def rate(tried: Tried) -> float:
        rows = [row for row in tried if row["rate"] > 0]
        for low, high in zip(rows, rows[1:], strict=False):
            if low[name] < value <= high[name]:
                share = math.log(value / low[name]) / math.log(high[name] / low[name])
                return low["rate"] * (high["rate"] / low["rate"]) ** share
        raise ValueError(f"{name} does not reach {value} at the rates tried")

    return rate


def lowest(times: float) -> Way:
    """So many times the rate at which the first step lowers its own loss most, by the parabola through three rates."""

    def rate(tried: Tried) -> float:
        rows = [row for row in tried if row["rate"] > 0]
        at = min(range(1, len(rows) - 1), key=lambda i: rows[i]["loss"])
        left, middle, right = (rows[at + side]["loss"] for side in (-1, 0, 1))
        octaves = (left - right) / (2 * (left + right - 2 * middle))
        return times * rows[at]["rate"] * 2**octaves

    return rate


WAYS: dict[str, Way] = {
    "the answers move by 1.8 nats": where("nats", 1.8),
    "1.5 times the lowest loss": lowest(1.5),
    "the first trail moves states by 0.1": where("gone_first", 0.1),
}
"""Beside the one that `steps` has, the states of the block that is moved most moving by a share of their length."""
