"""Which examples each step is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from tokenpaths.data.examples import Batch, Example, collate
from tokenpaths.data.mixing import Mix
from tokenpaths.training.objectives.base import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class Feed:
    """The examples of each step. They follow from its number alone: each epoch is a permutation made from the seed.

    The examples of a `Mix` come in the order of the mixture, in which each step has its share of originals. A goal is
    named by its place in `goals`, a step by its number, counted from 0.

    Args:
        goals: the objectives.
        spans: the names of the spans that a batch has a mask for.
        batch_size: examples of a goal in one forward of one process, unless the goal has its own number.
        accumulate: forwards of a goal in a step.
        seed: of the permutations.
        accelerator: the run's, which knows the processes and the device.
    """

    def __init__(
        self,
        goals: Sequence[Objective],
        spans: Sequence[str],
        batch_size: int,
        accumulate: int,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.goals = goals
        self.spans = spans
        self.seed = seed
        self.accelerator = accelerator
        self.shapes = [(goal.batch_size, 1) if goal.batch_size else (batch_size, accumulate) for goal in goals]
        self.order = lru_cache(maxsize=2 * len(goals))(self._order)

    def batches(self, number: int) -> Iterator[tuple[int, Batch, float]]:
        """The batches of a step on this process: the place of its goal, the batch, its share of the goal's terms."""
        for place, goal in enumerate(self.goals):
            if not self.due(place, number):
                continue
            # neighbours in length share a micro-batch, so that it is padded little
            examples = sorted(self.examples(place, number), key=len)
            terms = goal.terms(examples)
            size, accumulate = self.shapes[place]
            for micro in range(accumulate):
                first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
                own = examples[first : first + size]
                yield place, collate(own, spans=self.spans).to(self.accelerator.device), goal.terms(own) / terms

    def examples(self, place: int, number: int) -> list[Example]:
        """All examples of a goal in a step, of all processes. An epoch may end in the middle of a step."""
        examples = self.goals[place].examples
        chosen: list[Example] = []
        turn, size = number // self.goals[place].every, self.in_a_step(place)
        if isinstance(examples, Mix):
            return [examples.at(drawn) for drawn in range(turn * size, (turn + 1) * size)]
        for drawn in range(turn * size, (turn + 1) * size):
            epoch, rank = divmod(drawn, len(examples))
            chosen.append(examples[self.order(place, epoch)[rank]])
        return chosen

    def in_a_step(self, place: int) -> int:
        """The number of examples of a goal in a step, of all processes."""
        size, accumulate = self.shapes[place]
        return size * accumulate * self.accelerator.num_processes

    def draws(self, place: int, steps: int) -> float:
        """How often an example of a goal comes in `steps` steps, on average."""
        examples = self.goals[place].examples
        different = len(examples) / examples.epochs if isinstance(examples, Mix) else len(examples)
        return -(-steps // self.goals[place].every) * self.in_a_step(place) / different

    def due(self, place: int, number: int) -> bool:
        """Whether a goal is trained for in a step."""
        return number % self.goals[place].every == 0

    def tokens(self, number: int) -> int:
        """The tokens of a step without padding, of all goals and processes."""
        due = [place for place in range(len(self.goals)) if self.due(place, number)]
        return sum(len(example) for place in due for example in self.examples(place, number))

    def _order(self, place: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, place, epoch))
        return torch.randperm(len(self.goals[place].examples), generator=generator).tolist()


def seed_of(*numbers: int) -> int:
    """One seed made of several numbers; a change of any of them changes it."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")
