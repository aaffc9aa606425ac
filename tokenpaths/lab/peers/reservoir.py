"""A uniform sample of a stream of examples, of a fixed size: what a model that goes on learning rehearses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tokenpaths.data.examples import Example
from tokenpaths.report.records import Record


class Reservoir:
    """At any time each of the n examples seen so far is in it with probability min(1, capacity / n).

    Algorithm R (Vitter 1985): the first `capacity` examples are kept; the n-th after them takes a random place with
    probability capacity / n. The draw of the n-th example follows from the seed and n alone, so a saved reservoir goes
    on as if it had never stopped, whatever groups the examples come in.

        reservoir = Reservoir(500)
        reservoir.extend(first_task)
        goals = [Imitate(second_task), ReplayNear(list(reservoir), memory=memory)]

    Fill it between runs: the examples of a run must stay what they are.

    Args:
        capacity: the most examples to keep, at least 1.
        seed: the seed of every draw.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"Reservoir: capacity={capacity} must be at least 1")
        self.capacity = capacity
        self.seed = seed
        self.seen = 0
        self._kept: list[Example] = []

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._kept)

    def __repr__(self) -> str:
        return f"Reservoir(capacity={self.capacity}, seed={self.seed}): {len(self)} of {self.seen} examples"

    def add(self, example: Example) -> None:
        """See one more example."""
        if len(self._kept) < self.capacity:
            self._kept.append(example)
        else:
            place = int(np.random.default_rng([self.seed, self.seen]).integers(self.seen + 1))
            if place < self.capacity:
                self._kept[place] = example
        self.seen += 1

    def extend(self, examples: Iterable[Example]) -> None:
        """See examples, one after another."""
        for example in examples:
            self.add(example)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        kept = tuple(_Kept(example.ids, example.answer, dict(example.spans)) for example in self._kept)
        _File(self.capacity, self.seed, self.seen, kept).to_json(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reservoir:
        """Read what `save` wrote. Raises `FileNotFoundError`, and `ValueError` for any other file."""
        file = _File.from_json(path)
        made = cls(file.capacity, file.seed)
        made.seen = file.seen
        made._kept = [kept.example() for kept in file.kept]
        return made


@dataclass(frozen=True)
class _Kept:
    ids: tuple[int, ...]
    answer: tuple[bool, ...]
    spans: dict[str, tuple[int, int]]

    def __post_init__(self) -> None:
        self.example()  # refuses what is none

    def example(self) -> Example:
        return Example(self.ids, self.answer, self.spans)


@dataclass(frozen=True)
class _File(Record):
    what: ClassVar[str] = "a whole file of a Reservoir"
    capacity: int
    seed: int
    seen: int
    kept: tuple[_Kept, ...]

    def __post_init__(self) -> None:
        if len(self.kept) != min(self.seen, self.capacity):
            raise ValueError(f"it holds {len(self.kept)} of {self.seen} examples, with room for {self.capacity}")
