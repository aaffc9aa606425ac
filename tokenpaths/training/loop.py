"""The training loop, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from tokenpaths.attachment.forgotten import trains_what_was_named
from tokenpaths.attachment.mode import learning
from tokenpaths.attachment.runs import holding
from tokenpaths.engine.batches import bar
from tokenpaths.engine.cone.cone import Cone
from tokenpaths.site.identity import exact_key
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.checkpoints import Checkpoints
from tokenpaths.training.checks import check, check_options, span_names
from tokenpaths.training.descent import KEPT, Descent, HeldStep, MakeOptimizer
from tokenpaths.training.feed import Feed
from tokenpaths.training.frozen import laid, trained
from tokenpaths.training.losses import Losses, describe_goal
from tokenpaths.training.objectives.base import Objective
from tokenpaths.training.plan import Plan, plan
from tokenpaths.training.processes import agree, by_the_first, share_start
from tokenpaths.training.rate import Alarm
from tokenpaths.training.reach import Reach, standstill
from tokenpaths.training.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator


@runtime_checkable
class StepLimit(Protocol):
    """A bound on every optimizer step, such as `tokenpaths.limits.TrustRegion`."""

    def begin(self, model: nn.Module, trails: Adapter, parameters: Sequence[nn.Parameter]) -> HeldStep:
        """Come into force in a run, before its first step."""
        ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Args:
        step: its number, counted from 1.
        loss: the sum of the goals' losses by their weights.
        losses: the loss of each goal; NaN for one that is not due in this step.
        weights: the weight of each goal in this step.
        lr: the learning rate, of the optimizer's first group.
        grad_norm: the norm of the gradient before clipping.
        tokens: tokens without padding, of all goals and processes.
        seconds: the time that it took, with the writing of its checkpoint, without the reading of `drift`.
        drift: what `drift` returned, in the steps in which it is measured.
        kept: with `trust`, the share of the step that was taken.
        trust: with `trust`, the measure of what was taken.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    drift: float | None = None
    kept: float | None = None
    trust: float | None = None


def steps(
    model: nn.Module,
    trails: Adapter,
    goals: Sequence[Objective],
    *,
    steps: int | None = None,
    epochs: int | float | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    seed: int = 0,
    lr: float | None = None,
    optimizer: MakeOptimizer | None = None,
    schedule: str = "linear",
    warmup: int | float = 0.1,
    clip: int | float | None = 1.0,
    trust: StepLimit | None = None,
    checkpoint: str | PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    explain: bool = False,
    drift: Callable[[], float] | None = None,
    drift_every: int = 50,
    mixed_precision: Literal["no", "bf16"] | None = None,
    accelerator: Accelerator | None = None,
    cone: Cone | bool = True,
    tokenizer: Any = None,
) -> Generator[Step]:
    """Train the trails; yields a `Step` after each optimizer step, with the trails attached.

    The trails are attached at the first step unless they are attached already, and the base is frozen, until the
    iteration ends: after the last step, at `break`, or at an error. The base keeps the mode that it is in.

    A step draws `batch_size * accumulate * processes` examples of each goal, from a new permutation in each epoch, and
    the loss is the mean over all of their answer tokens: how the examples are split changes nothing but rounding. They
    are split by length, so that little is padded.

    Args:
        model: a Hugging Face model. It is moved to Accelerate's device, unless it is spread over several.
        trails: what is trained: a `TrailMap`, or another `Adapter` that lies in the model, such as
            `lab.peers.PeftAdapter`. Every process starts from those of the first.
        goals: objectives; their losses are added up by their weights.

        steps: the number of optimizer steps.
        epochs: or how often to go through the examples of the first goal.
        batch_size: examples of each goal in one forward, on each process.
        accumulate: forwards of each goal in one step.
        seed: of the order of examples and of dropout. Torch's own random state is left alone.

        lr: the learning rate of AdamW without weight decay. Unless given, the run has the rate at which its first step,
            without warm-up, moves the states by 0.3 of their length (`training.rate.Found`): so it holds on
            models of other scales. It costs three or four losses of the first goal on 8 examples before the first step.
        optimizer: or a function from the list of parameters to an optimizer: `lambda p: torch.optim.SGD(p, lr=0.1)`.
        schedule: a name that `transformers.get_scheduler` knows.
        warmup: the steps of the schedule's warm-up; below 1, their share of all steps. Step k of w of them, counted
            from 1, has k/w of the learning rate, so the first step trains (in transformers it has k - 1 of w, and not).
        clip: the largest norm of the gradient; None for any.
        trust: a bound on how far one step may take the model, such as `limits.TrustRegion`.

        checkpoint: a folder to save the run in, after every `save_every` steps and at the end.
        save_every: in steps; only at the end unless given.
        resume: continue from the newest checkpoint, bit for bit as if the run had never stopped.

        progress: show a progress bar.
        explain: print the plan before the first step: what is left out, what is kept, and the FLOPs of a step; and
            after it the learning rate, if it was sought, and why.
        drift: a function that is called after every `drift_every` steps and at the end, such as
            `lambda: measure_drift(model, trails, texts)["kl"].mean`.
        drift_every: in steps.

        mixed_precision: "bf16" or "no"; unless given, as Accelerate is configured.
        accelerator: one of your own, for what has no argument here, such as fp16.
        cone: where to keep what the trails cannot change (the states below the first moved layer, the keys and values
            of an unmoved prefix), which is computed once for each example. True keeps it for this run, where examples
            come often enough for that to pay; a `Cone` is shared with other runs over this base and keeps everything;
            False computes everything in every step. Results differ by rounding only. An adapter without sites has no
            cone.
        tokenizer: for `Match` rules.

    Raises:
        ValueError: nothing to train, data that the model or the token rules can do nothing with, or a checkpoint of
            another run.
        FileNotFoundError: there is no checkpoint to resume from.
        FloatingPointError: a loss or gradient is not finite; the trails are as after the last good step.
    """
    parameters = trained(trails)
    check(model, trails, goals, tokenizer)
    whole = dict(steps=steps, batch_size=batch_size, accumulate=accumulate, save_every=save_every, seed=seed)
    whole["drift_every"] = drift_every
    check_options(whole, dict(epochs=epochs, lr=lr, warmup=warmup, clip=clip), optimizer)
    _check_options(steps, epochs, batch_size, accumulate, mixed_precision, checkpoint, save_every, resume, clip)
    used = _cone_of(cone, trails)
    accelerator = _accelerator(accelerator)
    feed = Feed(goals, span_names(trails), batch_size, accumulate, seed, accelerator)
    total = steps or max(1, math.ceil((epochs or 0) * len(goals[0].examples) / feed.in_a_step(0)))
    descent = Descent(parameters, optimizer, lr, schedule, warmup, clip, total, accelerator, explain)
    losses = Losses(model, trails, feed, seed, mixed_precision)
    settings: dict[str, Any] = {}
    if checkpoint is not None or accelerator.num_processes > 1:
        settings = {
            "model": exact_key(model, trails.parameters()),
            "trails": repr(trails),
            "goals": [describe_goal(goal) for goal in goals],
            "optimizer": descent.describe(),
            **dict(steps=total, batch_size=batch_size, accumulate=accumulate, processes=accelerator.num_processes),
            **dict(schedule=schedule, warmup=warmup, clip=clip, mixed_precision=mixed_precision, seed=seed),
            "trust": None if trust is None else repr(trust),
        }
    saved = None if checkpoint is None else Checkpoints(Path(checkpoint), settings, save_every, resume)
    name = f"steps(steps={total})"

    def iterate(close: Callable[[], None]) -> Generator[Step]:
        begun = None if saved is None or saved.newest is None else saved.newest.name
        agree(accelerator, {**settings, "checkpoint": checkpoint is not None, "every": save_every, "resumed": begun})
        with (
            holding(model, trails, name, close),
            laid(model, trails, tokenizer, accelerator),
            losses.inside(used, total, keep_all=isinstance(cone, Cone)),
            descent.ready(),
            trains_what_was_named(descent.optimizer),
        ):
            if stands := standstill(model, trails):
                warnings.warn(stands, stacklevel=3)
            if explain:
                accelerator.print(_plan(model, trails, goals, losses, used))
            done = 0 if saved is None else saved.restore(trails, descent.optimizer, losses.weights, descent.rates)
            share_start(trails, accelerator)
            descent.held = None if trust is None else trust.begin(model, trails, parameters)
            reach = Reach(trails, told=stands is not None)
            alarm = Alarm(parameters, tuple(losses.weights), descent.advice)
            with bar("training", progress and accelerator.is_main_process, done=done, total=total) as shown:
                for number in range(done, total):
                    began, last = time.perf_counter(), number + 1 == total
                    step = _take(number, losses, descent, reach, alarm)
                    if saved is not None and saved.due(step.step, last):
                        state = (trails, model, descent.optimizer, losses.weights, descent.rates)
                        by_the_first(accelerator, partial(saved.write, step.step, *state))
                    step = replace(step, seconds=time.perf_counter() - began)
                    if drift and (last or step.step % drift_every == 0):
                        step = replace(step, drift=drift())
                    _show(shown, step)
                    yield step
            reach.end(feed.draws(0, total) >= 1)

    return Run(iterate, name)


def _plan(model: nn.Module, trails: Adapter, goals: Sequence[Objective], losses: Losses, cone: Cone | None) -> Plan:
    in_a_step = [losses.feed.in_a_step(place) for place in range(len(goals))]
    with learning(trails):
        return plan(model, trails, goals, in_a_step, cone, losses.pays)


def _take(number: int, losses: Losses, descent: Descent, reach: Reach, alarm: Alarm) -> Step:
    """Take step `number`, counted from 0. The time is not measured yet."""
    weights, feed = tuple(losses.weights), losses.feed
    parts = losses.of_step(number)
    alarm.hear(step=number + 1, parts=parts, again=lambda: losses.again(number))
    reach.step()
    rate, norm, kept, went = _step_soundly(number, losses, descent)
    losses.reweigh(number, parts)
    return Step(
        step=number + 1,
        loss=sum(weight * part for weight, part in zip(weights, parts, strict=True)),
        losses=tuple(part if feed.due(place, number) else math.nan for place, part in enumerate(parts)),
        weights=weights,
        lr=rate,
        grad_norm=norm,
        tokens=feed.tokens(number),
        seconds=0.0,
        kept=kept,
        trust=went,
    )


def _step_soundly(number: int, losses: Losses, descent: Descent) -> tuple[float, float, float | None, float | None]:
    """Take the optimizer's step `number`; take it back if it breaks the trails, as no later loss may tell."""
    before = [parameter.detach().clone() for parameter in descent.parameters]
    taken = descent.step(number, lambda: losses.ruler(number))
    if not bool(torch.stack([p.isfinite().all().to(before[0].device) for p in descent.parameters]).all()):
        with torch.no_grad():
            for parameter, good in zip(descent.parameters, before, strict=True):
                parameter.copy_(good)
        raise FloatingPointError(f"step {number + 1}: the optimizer made the trails infinite or NaN. {KEPT}")
    return taken


def _check_options(
    steps: int | None,
    epochs: int | float | None,
    batch_size: int,
    accumulate: int,
    mixed_precision: str | None,
    checkpoint: object,
    save_every: int | None,
    resume: bool,
    clip: int | float | None,
) -> None:
    if (steps is None) == (epochs is None) or (epochs is not None and epochs <= 0):
        raise ValueError("say how long to train: give either steps= or epochs=, more than 0")
    if checkpoint is None and (resume or save_every is not None):
        raise ValueError("resume= and save_every= need checkpoint=, the folder of the run")
    if mixed_precision not in (None, "no", "bf16"):
        raise ValueError(f"mixed_precision={mixed_precision!r} must be 'no' or 'bf16'; for fp16 pass accelerator=")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be above 0, or None for gradients of any norm: nothing would be learned")
    for name, value in dict(steps=steps, batch_size=batch_size, accumulate=accumulate, save_every=save_every).items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _cone_of(cone: Cone | bool, trails: Adapter) -> Cone | None:
    """The cone of a run; none for an adapter without sites, which may change every state."""
    found = Cone.of(cone)
    return found if trails.sites else None


def _accelerator(given: Accelerator | None) -> Accelerator:
    if given is None:
        from accelerate import Accelerator

        given = Accelerator()
    if given.gradient_accumulation_steps != 1:
        raise ValueError("give steps(accumulate=...), and not an Accelerator that accumulates as well")
    return given


def _show(bar: Any, step: Step) -> None:
    bar.set_postfix_str(f"loss {step.loss:.4g}" + ("" if step.drift is None else f", drift {step.drift:.4g}"))
    bar.update()
