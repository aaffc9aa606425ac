"""The losses of a step: the forward and the backward of each goal, and the weights of the next step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenpaths.engine.cone.cone import ActiveCone, Cone, active_cone
from tokenpaths.engine.cone.prefix import common_prefix
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.descent import KEPT, sum_over_processes
from tokenpaths.training.feed import Feed, seed_of
from tokenpaths.training.objectives.base import Objective
from tokenpaths.training.plan import pays

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        self.pays = [True] * len(feed.goals)

    @contextmanager
    def inside(self, cone: Cone | None, steps: int, keep_all: bool) -> Generator[None]:
        """Inside, a cone keeps what the trails cannot change: of all goals, or of those for which it pays."""
        if not self.trails.sites and active_cone(self.model) is not None:
            raise ValueError("a cone is at work in the model, and keeps what these weights make of it: end it first")
        self.pays = [keep_all or pays(goal, self.feed.draws(i, steps)) for i, goal in enumerate(self.goals)]
        with nullcontext() if cone is None else cone.over(self.model, self.trails.blocks) as self.cone:
            if self.cone is not None:
                self.cone.shared = [common_prefix(goal.examples) for goal in self.goals]
            yield

    def of_step(self, number: int) -> tuple[float, ...]:
        """The loss of each goal in step `number`, counted from 0, over all processes; each has been propagated back.

        Raises:
            FloatingPointError: a loss is not finite.
            ValueError: a loss is not one number, or does not depend on the trails.
        """
        losses = torch.zeros(len(self.goals), device=self.accelerator.device, dtype=torch.float32)
        with _own_randomness(self.accelerator, self.seed, number), _learning(self.trails):
            for place, batch, share in self.feed.batches(number):
                weighs = self.weights[place] > 0
                if self.cone is not None:
                    self.cone.rests = not self.pays[place]
                with self._precision(), torch.set_grad_enabled(weighs):
                    loss = share * self.goals[place].loss(self.model, self.trails, batch)
                if weighs:
                    _check_reaches(loss, self.goals, place)
                    self.accelerator.backward(self.weights[place] * loss)  # before the next forward changes the masks
                losses[place] += loss.detach()
        if self.cone is not None:
            self.cone.rests = False
        parts = tuple(sum_over_processes(losses, self.accelerator).tolist())
        _check_finite(number, self.goals, parts)
        return parts

    def reweigh(self, number: int, parts: Sequence[float]) -> None:
        """Let the weight of each goal that was due in step `number` follow its loss."""
        for place, (goal, part) in enumerate(zip(self.goals, parts, strict=True)):
            if self.feed.due(place, number):
                self.weights[place] = goal.reweigh(self.weights[place], part)

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


@contextmanager
def _own_randomness(accelerator: Accelerator, seed: int, number: int) -> Generator[None]:
    """Inside, torch's random numbers are those of this step on this process; afterwards the user's go on."""
    devices = list(range(torch.cuda.device_count())) if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(seed, number, accelerator.process_index, -1))
        yield


@contextmanager
def _learning(trails: Adapter) -> Generator[None]:
    """Inside, the trails are in training mode; afterwards each of their modules is in the mode that it was in."""
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
