"""The losses of a step: forwards and backwards of all goals, and how their weights follow."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenpaths.engine.cone.cone import AtWork
from tokenpaths.engine.cone.prefix import common_prefix
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.descent import KEPT, sum_over_processes
from tokenpaths.training.feed import Feed, seed_of
from tokenpaths.training.objectives.base import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class Losses:
    """Runs the goals of a step, batch by batch, and leaves their gradients in the parameters of the trails.

    `weights` are those of the goals in the next step. `pays` says of each goal whether a cone keeps its examples.
    """

    def __init__(self, model: nn.Module, trails: Adapter, feed: Feed, seed: int, mixed_precision: str | None) -> None:
        self.model, self.trails, self.feed, self.seed = model, trails, feed, seed
        self.goals, self.accelerator = feed.goals, feed.accelerator
        self.mixed_precision = mixed_precision
        self.weights = [goal.weight for goal in feed.goals]
        self.worker: AtWork | None = None
        self.pays = [True] * len(feed.goals)

    def let_rest(self, worker: AtWork | None, pays: Sequence[bool]) -> None:
        """Let a cone rest in the batches of goals whose examples come too seldom to be kept."""
        self.worker, self.pays = worker, list(pays)
        if worker is not None:
            worker.shared = [common_prefix(goal.examples) for goal in self.goals]

    def of_step(self, number: int) -> tuple[float, ...]:
        """The loss of each goal in step `number`, over all processes. Each is propagated back at once.

        Raises:
            FloatingPointError: a loss is not finite.
            ValueError: a loss is not one number, or does not depend on the trails.
        """
        losses = torch.zeros(len(self.goals), device=self.accelerator.device, dtype=torch.float32)
        with _own_randomness(self.accelerator, self.seed, number), _learning(self.trails):
            for place, batch, share in self.feed.batches(number):
                weighs = self.weights[place] > 0
                if self.worker is not None:
                    self.worker.rests = not self.pays[place]
                with self._precision(), torch.set_grad_enabled(weighs):
                    loss = share * self.goals[place].loss(self.model, self.trails, batch)
                if weighs:
                    _check_reaches(loss, self.goals, place)
                    self.accelerator.backward(self.weights[place] * loss)  # before the next forward changes the masks
                losses[place] += loss.detach()
        if self.worker is not None:
            self.worker.rests = False
        parts = tuple(sum_over_processes(losses, self.accelerator).tolist())
        _check_finite(number, self.goals, parts)
        return parts

    def reweigh(self, number: int, parts: Sequence[float]) -> None:
        """Let the weight of each goal that was due in the step follow its loss."""
        for place, (goal, part) in enumerate(zip(self.goals, parts, strict=True)):
            if self.feed.due(place, number):
                self.weights[place] = goal.reweigh(self.weights[place], part)

    def _precision(self) -> AbstractContextManager[Any]:
        # Accelerate's own precision is one for the whole process, and a second run may want another
        if self.mixed_precision is None:
            return self.accelerator.autocast()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")


def describe_goal(goal: Objective) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in goal.examples:
        digest.update(repr(example).encode())
    rest = {f.name: getattr(goal, f.name) for f in fields(goal) if f.name != "examples"}
    plain = {k: v if isinstance(v, (bool, int, float, str, dict)) else type(v).__name__ for k, v in rest.items()}
    return {"class": type(goal).__name__, "examples": f"{len(goal.examples)} ({digest.hexdigest()[:16]})", **plain}


_ALONE = 128


def pays(goal: Objective, draws: float) -> bool:
    """Whether keeping what trails cannot change saves more than it costs.

    A row is computed by itself for that, in all blocks below, which costs about as much more as `_ALONE` tokens of a
    batch do there; each time that it comes again its own tokens are saved.
    """
    some = goal.examples[:: max(1, len(goal.examples) // 256)]
    return (draws - 1) * sum(map(len, some)) / len(some) >= _ALONE


@contextmanager
def _own_randomness(accelerator: Accelerator, seed: int, number: int) -> Generator[None]:
    """Inside, torch's random numbers are those of this step on this process; afterwards the user's go on."""
    devices = list(range(torch.cuda.device_count())) if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(seed, number, accelerator.process_index, -1))
        yield


@contextmanager
def _learning(trails: Adapter) -> Generator[None]:
    modes = [(module, module.training) for module in trails.modules()]
    trails.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_reaches(loss: Tensor, goals: Sequence[Objective], place: int) -> None:
    if loss.ndim or not loss.requires_grad:
        what = f"has shape {list(loss.shape)}, not one number" if loss.ndim else "does not depend on the trails"
        raise ValueError(f"the loss of goal {place} ({type(goals[place]).__name__}) {what}")


def _check_finite(number: int, goals: Sequence[Objective], losses: Sequence[float]) -> None:
    for place, (goal, loss) in enumerate(zip(goals, losses, strict=True)):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {number + 1}: the loss of goal {place} ({type(goal).__name__}) is {loss}. {KEPT}"
            )
