"""A bounded sample of tokens with their states in both runs, the same in whatever order and parts texts are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenpaths.engine.readings import Reading

Keys = np.ndarray[Any, np.dtype[np.uint64]]
_EMPTY = np.uint64(2**64 - 1)  # the key of an empty place


class Sample:
    """The `size` tokens with the smallest keys, where a key is a hash of the token's text and position.

    Such a bottom-k sample is drawn uniformly without replacement. States are kept on the CPU, in their own dtype:
    2 x size x (sum of the widths of all layers) numbers.
    """

    def __init__(self, size: int) -> None:
        self.keys: Keys = np.full(size, _EMPTY)
        self.states: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, key: int, before: Reading, after: Reading, wanted: Tensor) -> None:
        """Add the tokens of a text where the mask `wanted` is set; `key` is the text's `text_key`."""
        keys = token_keys(key, len(before.ids))
        keys[~wanted.cpu().numpy()] = _EMPTY
        self._take(keys, {name: (before.states[name], after.states[name]) for name in before.states})

    def merge(self, other: Sample) -> None:
        self._take(other.keys, other.states)

    def sets(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, the states [tokens, dim] of both runs, in order of the keys."""
        order = torch.from_numpy(np.argsort(self.keys, kind="stable")[: np.count_nonzero(self.keys != _EMPTY)])
        return {name: (x[order], y[order]) for name, (x, y) in self.states.items()}

    def _take(self, keys: Keys, states: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put the new tokens that are among the smallest into the places of those that are so no longer."""
        size = len(self.keys)
        if not self.states:
            self.states = {name: (_places(size, x), _places(size, y)) for name, (x, y) in states.items()}
        smallest = np.argsort(np.concatenate([self.keys, keys]), kind="stable")[
            :size
        ]  # ours first where keys are equal
        new, freed = smallest[smallest >= size] - size, np.setdiff1d(np.arange(size), smallest)
        if not len(new):
            return
        self.keys[freed] = keys[new]
        for name, pair in states.items():
            for mine, theirs in zip(self.states[name], pair, strict=True):
                mine[torch.from_numpy(freed)] = theirs[torch.from_numpy(new).to(theirs.device)].to(mine)


def token_keys(key: int, count: int) -> Keys:
    """A 64-bit key for each token of a text: SplitMix64 (Steele et al. 2014) from the text's key on."""
    z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _places(size: int, like: Tensor) -> Tensor:
    return torch.zeros(size, like.shape[-1], dtype=like.dtype)
