"""The losses of a step: the forward and the backward of each goal, and the weights of the next step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.mode import learning
from tokenpaths.data.examples import collate
from tokenpaths.engine.cone.cone import ActiveCone, Cone, active_cone
from tokenpaths.engine.cone.prefix import common_prefix
from tokenpaths.engine.cone.room import Room
from tokenpaths.engine.states import block_places, observing
from tokenpaths.randomness import own_randomness
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.checks import checked_loss
from tokenpaths.training.descent import KEPT, sum_over_processes
from tokenpaths.training.feed import Feed, seed_of
from tokenpaths.training.objectives.base import Objective, host_of
from tokenpaths.training.plan import pays, rooms_of
from tokenpaths.training.rate import RULED, Ruler, See


class Losses:
    """Runs the goals of a step, batch by batch, and leaves their gradients in the parameters of the trails.

    Args:
        model: the model, with the trails attached while `of_step` runs.
        trails: what is trained.
        feed: the goals, and the examples of each step.
        seed: of the random numbers of each step.
        mixed_precision: "bf16" or "no"; None for what the accelerator is configured to do.

    `weights` are those of the goals in the next step. `pays` says of each goal whether a cone keeps its examples.
    """

    def __init__(self, model: nn.Module, trails: Adapter, feed: Feed, seed: int, mixed_precision: str | None) -> None:
        self.model, self.trails, self.feed, self.seed = model, trails, feed, seed
        self.goals, self.accelerator = feed.goals, feed.accelerator
        self.mixed_precision = mixed_precision
        self.weights = [goal.weight for goal in feed.goals]
        self.cone: ActiveCone | None = None
        self.pays, self.rooms = [True] * len(feed.goals), [Room()] * len(feed.goals)

    @contextmanager
    def inside(self, cone: Cone | None, steps: int, keep_all: bool) -> Generator[None]:
        """Inside, a cone keeps what the trails cannot change: of all goals, or of those for which it pays."""
        if not self.trails.sites and active_cone(self.model) is not None:
            raise ValueError("a cone is at work in the model, and keeps what these weights make of it: end it first")
        self.pays = [keep_all or pays(goal, self.feed.draws(i, steps)) for i, goal in enumerate(self.goals)]
        with nullcontext() if cone is None else cone.over(self.model, self.trails.blocks) as self.cone:
            if self.cone is not None:
                self.cone.shared = [common_prefix(goal.examples) for goal in self.goals]
                self.rooms = rooms_of(self.cone, self.goals, self.pays)
            yield

    def of_step(self, number: int) -> tuple[float, ...]:
        """The loss of each goal in step `number`, counted from 0, over all processes; each has been propagated back.

        Raises:
            FloatingPointError: a loss is not finite.
            ValueError: a loss is not one number, or does not depend on the trails.
        """
        parts = self._run(number, learn=True)
        _check_finite(number, self.goals, parts)
        return parts

    def again(self, number: int) -> tuple[float, ...]:
        """The loss of each goal in step `number`, with the parameters as they are now; only read."""
        return self._run(number, learn=False)

    def ruler(self, number: int) -> Ruler:
        """What tells how far states go from where they are now, on the first examples of the first goal in a step.

        All processes run the same ones, however a step is split.
        """
        examples = self.feed.examples(0, number)[:RULED]
        batch = collate(examples, spans=self.feed.spans).to(self.accelerator.device)
        places = block_places(host_of(self.model, self.trails))

        @torch.no_grad()
        def look(see: See) -> None:
            with self._as_in_step(number), self._precision(), observing(places, see):
                if self.cone is not None:
                    self.cone.rests = True
                self.goals[0].loss(self.model, self.trails, batch)
                if self.cone is not None:
                    self.cone.rests = False

        return Ruler(look, batch, lambda tensor: sum_over_processes(tensor, self.accelerator))

    def _run(self, number: int, learn: bool) -> tuple[float, ...]:
        losses = torch.zeros(len(self.goals), device=self.accelerator.device, dtype=torch.float32)
        with self._as_in_step(number):
            for place, batch, share in self.feed.batches(number):
                weighs = learn and self.weights[place] > 0
                if self.cone is not None:
                    self.cone.rests, self.cone.room = not self.pays[place], self.rooms[place]
                with self._precision(), torch.set_grad_enabled(weighs):
                    loss = share * checked_loss(
                        self.goals[place].loss(self.model, self.trails, batch), self.goals[place], place
                    )
                if weighs:
                    _check_reaches(loss, self.goals, place)
                    self.accelerator.backward(self.weights[place] * loss)  # before the next forward changes the masks
                losses[place] += loss.detach()
        if self.cone is not None:
            self.cone.rests, self.cone.room = False, Room()
        return tuple(sum_over_processes(losses, self.accelerator).tolist())

    def reweigh(self, number: int, parts: Sequence[float]) -> None:
        """Let the weight of each goal that was due in step `number` follow its loss."""
        for place, (goal, part) in enumerate(zip(self.goals, parts, strict=True)):
            if self.feed.due(place, number):
                self.weights[place] = goal.reweigh(self.weights[place], part)

    @contextmanager
    def _as_in_step(self, number: int) -> Generator[None]:
        """Inside, random numbers are those of a step on this process, and the trails learn."""
        seed = seed_of(self.seed, number, self.accelerator.process_index, -1)
        with own_randomness(seed, self.accelerator.device), learning(self.trails):
            yield

    def _precision(self) -> AbstractContextManager[Any]:
        # Accelerate's own precision is one for the whole process, and a second run may want another
        if self.mixed_precision is None:
            return self.accelerator.autocast()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")


def describe_goal(goal: Objective) -> dict[str, Any]:
    """What a checkpoint notes of a goal: its class, a digest of its examples, and its settings.

    Of a setting with a `checksum` of its own, such as `Targets`, that is noted; of tensors a digest of their numbers.
    """
    digest = hashlib.sha256()
    for example in goal.examples:
        digest.update(repr(example).encode())
    rest = {f.name: getattr(goal, f.name) for f in fields(goal) if f.name != "examples"}
    plain = {k: v if isinstance(v, (bool, int, float, str, dict)) else _told(v) for k, v in rest.items()}
    return {"class": type(goal).__name__, "examples": f"{len(goal.examples)} ({digest.hexdigest()[:16]})", **plain}


def _told(value: Any) -> Any:
    """What a checkpoint notes of a setting that JSON does not have."""
    if isinstance(value, (list, tuple)):
        return [v if v is None or isinstance(v, (bool, int, float, str)) else _told(v) for v in value]
    told = getattr(value, "checksum", "")
    if isinstance(value, Tensor):
        told = hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
    return f"{type(value).__name__} {told}".rstrip()


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
