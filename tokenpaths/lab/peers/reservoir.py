"""A uniform sample of a stream of examples, of a fixed size: what a model that goes on learning rehearses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenpaths.data.examples import Example
from tokenpaths.files import write_text


class Reservoir:
    """At any time each of the n examples seen so far is in it with probability min(1, capacity / n).

    Algorithm R (Vitter 1985): the first `capacity` are kept; the n-th after them takes a random place with probability
    capacity / n. The draw of the n-th example follows from the seed and n alone, so a reservoir that was saved goes on
    as if it had never stopped, however the examples come in.

        reservoir = Reservoir(500)
        reservoir.extend(first_task)
        goals = [Imitate(second_task), ReplayNear(list(reservoir), memory)]

    Fill it between runs: the examples of a run must stay what they are.

    Raises `ValueError` for a capacity below 1.
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
        """See one example more."""
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
        kept = [{"ids": e.ids, "answer": e.answer, "spans": dict(e.spans)} for e in self._kept]
        note = {"tokenpaths reservoir": 1, "capacity": self.capacity, "seed": self.seed, "seen": self.seen}
        write_text(path, json.dumps({**note, "kept": kept}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reservoir:
        """Read what `save` wrote. Raises `FileNotFoundError`, and `ValueError` for any other file."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            note = json.loads(text)
            if note["tokenpaths reservoir"] != 1:
                raise ValueError(f"it is of version {note['tokenpaths reservoir']!r:.20}")
            made = cls(note["capacity"], note["seed"])
            made.seen = int(note["seen"])
            made._kept = [_example(entry) for entry in note["kept"]]
            if len(made) != min(made.seen, made.capacity):
                raise ValueError(f"it holds {len(made)} of {made.seen} examples, with room for {made.capacity}")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a whole file of a Reservoir ({error!r:.120})") from error
        return made


def _example(entry: dict[str, Any]) -> Example:
    spans = {name: (start, stop) for name, (start, stop) in entry["spans"].items()}
    return Example(tuple(entry["ids"]), tuple(entry["answer"]), spans)
