"""Samples of items: drawn, and never every k-th, which with kinds of items in turn would leave whole kinds out."""

from __future__ import annotations

import numpy as np


def order(count: int, seed: int = 0) -> list[int]:
    """The numbers of `count` items in a random order, which follows from the seed."""
    return np.random.default_rng(seed).permutation(count).tolist()


def some(count: int, most: int, seed: int = 0) -> list[int]:
    """The numbers of `most` of `count` items, drawn without replacement, rising; of all where there are no more."""
    return sorted(order(count, seed)[:most])
