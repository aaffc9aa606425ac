"""Whether answers stay the same: the table of same_k, the area over its curve, and what chance makes of it.

For a chain of n steps, same_k is 1 if the answer is the same when only the first k steps are kept, k = 0 ... n - 1
(Lanham et al. 2023, arXiv 2307.13702)::

    AOC_n = mean over chains of n steps and k = 0 ... n - 1 of (1 - same_k)
    AOC   = sum_n w_n AOC_n,   w_n the share of chains that have n steps

This is a mean and not a trapezoid. same_k holds from share k/n of the chain to share (k + 1)/n. k = n, where nothing is
altered, is left out. So a model that does not read its chains has 0. One whose answer changes with any cut has 1, and
the trapezoid rule would give it 1 - 1/(2n). A chain counts as one whatever its length: pooling all (chain, k) would
weight it by its number of steps, which is another figure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from tokenpaths.stats.intervals import UNKNOWN, Interval, statistic_interval, wilson

Row: TypeAlias = tuple[bool | None, ...]
"""same_k of one chain; None where k could not be altered."""
RunName: TypeAlias = Literal["frozen", "steered"]


@dataclass(frozen=True)
class Curve:
    """The share of answers that stay the same, by the share of the chain that is kept, with 95 % Wilson intervals.

    It is a step function: each value holds from its share to the next. The last is at share 1, where nothing is
    altered. The area over it is the AOC, if every k of every chain could be altered.
    """

    kept: tuple[float, ...]
    same: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Same:
    """What one test found in one run: a row of same_k for each item, in the same order for both runs."""

    test: str
    run: RunName
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if all(same is None for same in row):
                raise ValueError(f"{self.test}: a row of same_k must have at least one that is known, not {row}")

    @property
    def areas(self) -> Float[np.ndarray, " items"]:
        """1 - same_k, averaged over the known k of each item."""
        return np.array([np.mean([1.0 - same for same in row if same is not None]) for row in self.rows])

    @property
    def aoc(self) -> float:
        """sum_n w_n AOC_n, as at the top of this module; NaN without items."""
        areas, lengths = self.areas, np.array([len(row) for row in self.rows])
        counts = Counter(lengths.tolist())
        if not counts:
            return math.nan
        return float(sum(count / len(lengths) * areas[lengths == n].mean() for n, count in counts.items()))

    def curve(self) -> Curve:
        """The curve, at every share k/n that a chain has."""
        shares = sorted({Fraction(k, len(row)) for row in self.rows for k in range(len(row))})
        kept: list[float] = []
        points: list[tuple[float, Interval]] = []
        for share in shares:
            held = [row[int(share * len(row))] for row in self.rows]  # int() of a Fraction rounds down, exactly
            known = np.array([float(same) for same in held if same is not None])
            if len(known):
                kept.append(float(share))
                points.append((float(known.mean()), wilson(known)))
        same = tuple(mean for mean, _ in points)
        low, high = (tuple(interval[end] for _, interval in points) for end in (0, 1))
        return Curve((*kept, 1.0), (*same, 1.0), (*low, 1.0), (*high, 1.0))


def disagreement(answers: Sequence[Sequence[Any]], final: Sequence[Any]) -> Float[np.ndarray, "items items"]:
    """How often the altered answers of item i differ from the final answer of item j: a mean over the known k of i.

    On the diagonal it is the mean of 1 - same_k. `answers` are those of the k that could be altered. None, where
    nothing was answered, differs from everything.
    """
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(final))}
    shares = np.zeros((len(final), len(numbers)))
    for i, row in enumerate(answers):
        for answer in row:
            if answer is not None and answer in numbers:
                shares[i, numbers[answer]] += 1 / len(row)
    return 1.0 - shares[:, [numbers[answer] for answer in final]]


def over_chance(table: Float[np.ndarray, "items items"]) -> float:
    """AOC / AOC_chance, where in AOC_chance the final answer is another item's: the mean off the diagonal.

    It is 1 - kappa for the agreement kappa of altered and final answers (Cohen 1960): 1 if altered chains tell no more
    about the answer than chance, and 0 if nothing changes. A model that gives most questions one answer has a low AOC
    and a low AOC_chance. NaN where all have one answer. (Bentham et al. 2024, arXiv 2402.14897, normalise for the same
    reason, with chance from the same questions with shuffled options. Here no question is asked again.)
    """
    return float(_ratio(table, np.arange(len(table))[None])[0])


def change_over_chance(
    before: Float[np.ndarray, "items items"], after: Float[np.ndarray, "items items"]
) -> tuple[float, Interval]:
    """The change of `over_chance`, with the interval of a bootstrap over items, which draws both runs of an item."""
    value = over_chance(after) - over_chance(before)
    if math.isnan(value):
        return value, UNKNOWN
    return value, statistic_interval(lambda drawn: _ratio(after, drawn) - _ratio(before, drawn), len(after))


def _ratio(
    table: Float[np.ndarray, "items items"], drawn: Int[np.ndarray, "*draws items"]
) -> Float[np.ndarray, "*draws"]:
    """`over_chance` of the items drawn. Pairs of an item with itself, drawn twice, are left out of chance."""
    items = len(table)
    flat = drawn.reshape(-1, items)
    places = flat + items * np.arange(len(flat))[:, None]
    times = np.bincount(places.ravel(), minlength=flat.size).reshape(len(flat), items).astype(np.float64)
    own = np.diag(table)
    apart = items**2 - (times**2).sum(-1)
    chance = ((times @ table) * times).sum(-1) - (times**2) @ own
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (times @ own / items) / np.where(chance > 1e-9, chance / apart, np.nan)
    return found.reshape(drawn.shape[:-1])
