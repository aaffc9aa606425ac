"""Numbers that stream by, summarised in memory that does not grow, in any order and in parts that can be added up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tokenpaths.drift.report import OFFSETS, Summary
from tokenpaths.stats.intervals import streamed_interval

REPLICATES = 1000
ACCURACY = 0.005
"""The relative error of a quantile."""

_STEP = 2 * np.log1p(ACCURACY)  # log gamma
_SMALLEST, _LARGEST = 1e-12, 1e6  # quantiles beyond them are given as these
_FIRST, _LAST = (int(np.rint(np.log(x) / _STEP)) for x in (_SMALLEST, _LARGEST))
_ZERO = _LAST - _FIRST + 1  # the middle bucket, for exact zeros
_BUCKETS = 2 * _ZERO + 1

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]
Places = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(eq=False)
class Tally:
    """Rows of numbers (a row for each layer), of which only summaries are kept.

    - Mean and maximum, in float64.
    - The 95 % interval of the mean, which is `stats.intervals.streamed_interval`: on each side the wider of Student's t
      and of percentiles of a Poisson bootstrap over texts, expanded for few texts. In each of its 1,000 replicates a
      text counts Poisson(1) times, which is the bootstrap's multinomial without its fixed total, so that texts need not
      be known beforehand (Hanley & MacGibbon 2006; Chamandy et al. 2012).
    - Quantiles from counts in buckets gamma^(i - 1/2) < |x| < gamma^(i + 1/2), gamma = (1 + a)^2, whose middle gamma^i
      is within a = 0.5 % of each number in it, for |x| from 1e-12 to 1e6. Smaller and larger numbers are pooled at
      these ends. Zeros have their own bucket. This is DDSketch (Masson et al. 2019), its buckets moved so that 1 is
      exact.
    - Means by position, for each of `OFFSETS`.

    Every array but the maximum adds up, so two tallies merge by addition.
    """

    texts: Counts  # rows; with at least one number
    count: Counts  # rows
    total: Numbers  # rows
    maximum: Numbers  # rows
    replicate_count: Numbers  # rows x replicates
    replicate_total: Numbers  # rows x replicates
    buckets: Counts  # rows x buckets
    position_count: Counts  # rows x offsets
    position_total: Numbers  # rows x offsets

    @classmethod
    def empty(cls, rows: int) -> Tally:
        return cls(
            texts=np.zeros(rows, np.int64),
            count=np.zeros(rows, np.int64),
            total=np.zeros(rows),
            maximum=np.full(rows, -np.inf),
            replicate_count=np.zeros((rows, REPLICATES)),
            replicate_total=np.zeros((rows, REPLICATES)),
            buckets=np.zeros((rows, _BUCKETS), np.int64),
            position_count=np.zeros((rows, len(OFFSETS)), np.int64),
            position_total=np.zeros((rows, len(OFFSETS))),
        )

    def add(self, values: Numbers, offsets: Places, weights: Numbers) -> None:
        """Add a text: values [rows, n], the offset of each token from the prompt's end, and `text_weights` of the text.

        NaN is no number, and is left out.
        """
        known = ~np.isnan(values)
        numbers = np.where(known, values, 0.0)
        count, total = known.sum(1), numbers.sum(1)
        self.texts += count > 0
        self.count += count
        self.total += total
        np.maximum(self.maximum, np.where(known, values, -np.inf).max(1), out=self.maximum)
        self.replicate_count += np.outer(count, weights)
        self.replicate_total += np.outer(total, weights)
        rows, tokens = np.nonzero(known)
        found = numbers[rows, tokens]
        np.add.at(self.buckets.reshape(-1), rows * _BUCKETS + _bucket(found), 1)
        place = rows * len(OFFSETS) + np.clip(offsets, OFFSETS[0], OFFSETS[-1])[tokens] - OFFSETS[0]
        np.add.at(self.position_count.reshape(-1), place, 1)
        np.add.at(self.position_total.reshape(-1), place, found)

    def merge(self, other: Tally) -> None:
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            combine = np.maximum if field.name == "maximum" else np.add
            combine(mine, theirs, out=mine)

    def summaries(self) -> tuple[Summary, ...]:
        return tuple(self._summary(row) for row in range(len(self.count)))

    def by_position(self) -> tuple[tuple[float | None, ...], ...]:
        pairs = zip(self.position_total, self.position_count, strict=True)
        return tuple(tuple(float(t / c) if c else None for t, c in zip(*pair, strict=True)) for pair in pairs)

    def _summary(self, row: int) -> Summary:
        count = int(self.count[row])
        if not count:
            return Summary(np.nan, (-np.inf, np.inf), np.nan, np.nan, np.nan, 0)
        largest = float(self.maximum[row])
        p50, p99 = (min(_quantile(self.buckets[row], q), largest) for q in (0.5, 0.99))
        total, texts = float(self.total[row]), int(self.texts[row])
        interval = streamed_interval(total, float(count), self.replicate_total[row], self.replicate_count[row], texts)
        return Summary(total / count, interval, p50, p99, largest, count)


@dataclass(eq=False)
class Calibration:
    """Confidence against correctness in 15 equal bins: counts, and sums of both."""

    count: Numbers
    confidence: Numbers
    correct: Numbers

    @classmethod
    def empty(cls, bins: int = 15) -> Calibration:
        return cls(np.zeros(bins), np.zeros(bins), np.zeros(bins))

    def add(self, confidence: Numbers, correct: Numbers) -> None:
        bins = len(self.count)
        place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # bins are (lower, upper]
        np.add.at(self.count, place, 1)
        np.add.at(self.confidence, place, confidence)
        np.add.at(self.correct, place, correct)

    def merge(self, other: Calibration) -> None:
        for field in fields(self):
            mine = getattr(self, field.name)
            mine += getattr(other, field.name)

    def error(self) -> float:
        """Expected calibration error, sum_bins |sum correct - sum confidence| / count (Naeini et al. 2015)."""
        count = self.count.sum()
        return float(np.abs(self.correct - self.confidence).sum() / count) if count else np.nan


def text_key(content: bytes, seed: int) -> int:
    """64 bits that text and seed determine: what is drawn for a text does not depend on when or where it is read."""
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "little")


def text_weights(key: int) -> Numbers:
    """How often a text counts in each bootstrap replicate."""
    return np.random.default_rng(key).poisson(1.0, REPLICATES).astype(np.float64)


def _bucket(values: Numbers) -> Counts:
    size = np.clip(np.abs(values), _SMALLEST, _LARGEST)
    steps = np.rint(np.log(size) / _STEP).astype(np.int64) - _FIRST + 1
    return _ZERO + np.sign(values).astype(np.int64) * steps


def _quantile(buckets: Counts, q: float) -> float:
    """The middle of the bucket that holds number floor(q (count - 1)), counted from 0 in order of size."""
    upto = np.cumsum(buckets)
    steps = int(np.searchsorted(upto, int(q * (upto[-1] - 1)), side="right")) - _ZERO
    if not steps:
        return 0.0
    return float(np.sign(steps) * np.exp(_STEP * (abs(steps) - 1 + _FIRST)))
