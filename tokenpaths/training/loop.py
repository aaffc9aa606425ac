"""The training loop, on Hugging Face Accelerate."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from tokenpaths import saving
from tokenpaths.adapter import Adapter
from tokenpaths.attach import working
from tokenpaths.cone import Cone, at_work, common_prefix
from tokenpaths.objectives import Objective
from tokenpaths.training import checkpoints
from tokenpaths.training.checks import check, span_names
from tokenpaths.training.feed import Feed, seed_of
from tokenpaths.training.frozen import frozen_base, trained
from tokenpaths.training.plan import plan
from tokenpaths.training.trust import Probe, TrustRegion

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

MakeOptimizer: TypeAlias = "Callable[[list[nn.Parameter]], Optimizer]"


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `step` counts from 1; `losses` are the goals', `loss` is their weighted sum.

    `weights` are the goals' in this step. With a trust region, `kept` is the share of the step that was taken and
    `trust` the measure of what was taken.
    """

    step: int
    loss: float
    losses: tuple[float, ...]  # NaN for a goal that is not due in this step
    weights: tuple[float, ...]
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # real tokens, of all goals and processes
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
    lr: float | None = None,
    optimizer: MakeOptimizer | None = None,
    schedule: str = "linear",
    warmup: int | float = 0.1,
    clip: int | float | None = 1.0,
    trust: TrustRegion | None = None,
    mixed_precision: Literal["no", "bf16"] | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    drift: Callable[[], float] | None = None,
    drift_every: int = 50,
    cone: Cone | bool = True,
    explain: bool = False,
    tokenizer: Any = None,
    accelerator: Accelerator | None = None,
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
            `peers.PeftAdapter`. Every process starts from those of the first.
        goals: objectives; their weighted losses are added up.
        steps: how many optimizer steps to take.
        epochs: or how often to go through the examples of the first goal.
        batch_size: examples of each goal in one forward, on each process.
        accumulate: forwards of each goal in one step.
        lr: of AdamW without weight decay; 1e-3 unless told.
        optimizer: or a function from the list of parameters to an optimizer: `lambda p: torch.optim.SGD(p, lr=0.1)`.
        schedule: a name that `transformers.get_scheduler` knows.
        warmup: of the schedule, in steps; below 1, a share of all steps.
        clip: the largest norm of the gradient; None for any.
        trust: a bound on how far one step may take the model.
        mixed_precision: "bf16" or "no"; unless told, as Accelerate is configured.
        seed: of the order of examples and of dropout. Torch's own random state is left alone.
        checkpoint: a folder to save in, every `save_every` steps and at the end.
        save_every: in steps.
        resume: continue from the newest checkpoint, bit for bit as if it had never stopped.
        progress: show a progress bar.
        drift: measured every `drift_every` steps and at the end: `lambda: drift(model, trails, texts)["kl"].mean`.
        drift_every: in steps.
        cone: what the trails cannot change (states below the first moved layer, keys and values of an unmoved prefix)
            is computed once for each example, and kept: a `Cone` shared with other runs over this base, True for one of
            this run alone, which keeps what comes often enough for that to pay, False to run everything in every step.
            It changes no result but in its rounding. An adapter without sites has none.
        explain: print the plan before the first step: what is left out, what is kept, and the FLOPs of a step.
        tokenizer: for `Match` rules.
        accelerator: one of your own, for what is not said here (such as fp16).

    Raises:
        ValueError: nothing to train, data that the model or the token rules can do nothing with, or a checkpoint of
            another run.
        FloatingPointError: a loss or gradient is not finite; the trails are as after the last good step.
    """
    parameters = trained(trails)
    check(model, trails, goals, tokenizer)
    if (steps is None) == (epochs is None) or (epochs is not None and epochs <= 0):
        raise ValueError("say how long to train: give either steps= or epochs=, more than 0")
    if optimizer is not None and lr is not None:
        raise ValueError("with optimizer=, the learning rate is part of it: leave lr= out")
    if checkpoint is None and (resume or save_every is not None):
        raise ValueError("resume= and save_every= need checkpoint=, the folder of the run")
    if mixed_precision not in (None, "no", "bf16"):
        raise ValueError(f"mixed_precision={mixed_precision!r} must be 'no' or 'bf16'; for fp16 pass accelerator=")
    counts = dict(steps=steps, batch_size=batch_size, accumulate=accumulate, save_every=save_every)
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator()
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("give steps(accumulate=...), and not an Accelerator that accumulates as well")
    feed = Feed(goals, span_names(trails), batch_size, accumulate, seed, accelerator)
    total = steps or max(1, math.ceil((epochs or 0) * len(goals[0].examples) / feed.in_a_step(0)))
    made = _adamw(parameters, lr) if optimizer is None else optimizer(parameters)
    rates = [float(group["lr"]) for group in made.param_groups]
    share_at = _schedule(schedule, warmup, total)
    folder = None if checkpoint is None else Path(checkpoint)
    settings: dict[str, Any] = {
        "model": None if folder is None else saving.fingerprint(model, trails.parameters()),
        "trails": repr(trails),
        "goals": [_describe(goal) for goal in goals],
        "optimizer": [type(made).__name__, [{**group, "params": len(group["params"])} for group in made.param_groups]],
        **dict(steps=total, batch_size=batch_size, accumulate=accumulate, processes=accelerator.num_processes),
        **dict(schedule=schedule, warmup=warmup, clip=clip, mixed_precision=mixed_precision, seed=seed),
        "trust": None if trust is None else repr(trust),
    }
    found = None if folder is None else checkpoints.find(folder, settings, resume)
    if not isinstance(cone, (Cone, bool)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"cone={cone!r:.80} must be a Cone, True or False")
    used = None if not trails.sites else Cone() if cone is True else cone or None

    def iterate() -> Generator[Step]:
        with ExitStack() as undo:
            undo.enter_context(frozen_base(model, trails))
            undo.callback(made.zero_grad)
            _move(model, trails, accelerator)
            undo.enter_context(working(model, trails, tokenizer))
            if not trails.sites and at_work(model) is not None:
                raise ValueError(
                    "a cone is at work in the model, and keeps what these weights make of it: end it first"
                )
            worker = None if used is None else undo.enter_context(used.over(model, trails.blocks))
            if worker is not None:
                worker.shared = [common_prefix(goal.examples) for goal in goals]
            # a cone that is given may be shared with other runs, so it keeps everything
            pays = [isinstance(cone, Cone) or _pays(goal, feed.draws(i, total)) for i, goal in enumerate(goals)]
            if explain:
                accelerator.print(
                    plan(model, trails, goals, [feed.in_a_step(i) for i in range(len(goals))], used, pays)
                )
            prepared = accelerator.prepare_optimizer(made)
            weights = [goal.weight for goal in goals]
            done = 0 if found is None else checkpoints.read(found, trails, made, weights)
            _share_start(trails, accelerator)
            probe = None if trust is None else Probe(trust, model, trails, parameters)
            bar = undo.enter_context(_bar(done, total, progress and accelerator.is_main_process))
            for number in range(done, total):
                began = time.perf_counter()
                losses = torch.zeros(len(goals), device=accelerator.device, dtype=torch.float32)
                with _own_randomness(accelerator, seed, number), _learning(trails):
                    for place, batch, share in feed.batches(number):
                        weighs = weights[place] > 0
                        if worker is not None:
                            worker.rests = not pays[place]
                        with _precision(mixed_precision, accelerator), torch.set_grad_enabled(weighs):
                            loss = share * goals[place].loss(model, trails, batch)
                        if weighs:
                            _check_reaches(loss, goals, place)
                            accelerator.backward(weights[place] * loss)  # before the next forward changes the masks
                        losses[place] += loss.detach()
                if worker is not None:
                    worker.rests = False
                parts = tuple(_sum(losses, accelerator).tolist())
                _check_finite(number, goals, parts)
                due = [feed.due(place, number) for place in range(len(goals))]
                _sum_gradients(parameters, accelerator)
                norm = _clip(parameters, math.inf if clip is None else clip, accelerator)
                if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips such a step by itself
                    raise FloatingPointError(f"step {number + 1}: the gradient is not finite ({norm}). {_KEPT}")
                for group, rate in zip(made.param_groups, rates, strict=True):
                    group["lr"] = rate * share_at(number)
                prepared.step()
                prepared.zero_grad()
                kept, went = (None, None) if probe is None else probe.hold()
                total_loss = sum(weight * part for weight, part in zip(weights, parts, strict=True))
                weighed = tuple(weights)
                weights = [
                    goal.reweigh(weight, part) if now else weight
                    for goal, weight, part, now in zip(goals, weights, parts, due, strict=True)
                ]
                last = number + 1 == total
                if folder and accelerator.is_main_process and (last or (save_every and (number + 1) % save_every == 0)):
                    checkpoints.write(folder, number + 1, trails, model, made, weights, settings)
                measured = drift() if drift and (last or (number + 1) % drift_every == 0) else None
                step = Step(
                    step=number + 1,
                    loss=total_loss,
                    losses=tuple(part if now else math.nan for part, now in zip(parts, due, strict=True)),
                    weights=weighed,
                    lr=rates[0] * share_at(number),
                    grad_norm=norm,
                    tokens=feed.tokens(number),
                    seconds=time.perf_counter() - began,
                    drift=measured,
                    kept=kept,
                    trust=went,
                )
                _show(bar, step)
                yield step

    return iterate()


_ALONE = 128


def _pays(goal: Objective, draws: float) -> bool:
    """Whether keeping what trails cannot change saves more than it costs.

    A row is computed by itself for that, in all blocks below, which costs about as much more as `_ALONE` tokens of a
    batch do there; each time that it comes again its own tokens are saved.
    """
    some = goal.examples[:: max(1, len(goal.examples) // 256)]
    return (draws - 1) * sum(map(len, some)) / len(some) >= _ALONE


_KEPT = "The trails are as after the step before; a lower lr or a smaller clip may help"


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


def _precision(mixed_precision: str | None, accelerator: Accelerator) -> AbstractContextManager[Any]:
    # Accelerate's own precision is one for the whole process, and a second run may want another
    if mixed_precision is None:
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")


def _schedule(name: str, warmup: int | float, total: int) -> Callable[[int], float]:
    """The share of the learning rate at each step, as a function of nothing but the step."""
    from transformers import get_scheduler

    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    first = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    scheduler: Any = get_scheduler(name, stand_in, num_warmup_steps=first, num_training_steps=total)
    if not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(f"schedule={name!r} depends on more than the step, so a run could not be resumed from it")
    return scheduler.lr_lambdas[0]


def _adamw(parameters: list[nn.Parameter], lr: float | None) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3 if lr is None else lr, weight_decay=0.0)


def _describe(goal: Objective) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in goal.examples:
        digest.update(repr(example).encode())
    rest = {f.name: getattr(goal, f.name) for f in fields(goal) if f.name != "examples"}
    plain = {k: v if isinstance(v, (bool, int, float, str, dict)) else type(v).__name__ for k, v in rest.items()}
    return {"class": type(goal).__name__, "examples": f"{len(goal.examples)} ({digest.hexdigest()[:16]})", **plain}


def _move(model: nn.Module, trails: Adapter, accelerator: Accelerator) -> None:
    if getattr(model, "hf_device_map", None) is None:  # otherwise the model has been placed with care
        model.to(accelerator.device)
        trails.to(accelerator.device)
    if not model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warnings.warn(
            "gradient checkpointing is on, but transformers heeds it in training mode only, and the model is in eval "
            "mode: call model.train() first (which turns on its dropout too, if it has any)",
            stacklevel=2,
        )


@torch.no_grad()
def _share_start(trails: Adapter, accelerator: Accelerator) -> None:
    """All processes start from the trails of the first."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for tensor in trails.state_dict().values():
            tensor.copy_(broadcast(tensor.clone()))


def _sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes. They are small, so the model needs no DDP around it."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    parts = _sum(flat, accelerator).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _sum(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    return cast("Tensor", accelerator.reduce(tensor, "sum"))


def _clip(parameters: Sequence[nn.Parameter], most: int | float, accelerator: Accelerator) -> float:
    return float(cast("Tensor", accelerator.clip_grad_norm_(parameters, most)))


def _check_reaches(loss: Tensor, goals: Sequence[Objective], place: int) -> None:
    if loss.ndim or not loss.requires_grad:
        what = f"has shape {list(loss.shape)}, not one number" if loss.ndim else "does not depend on the trails"
        raise ValueError(f"the loss of goal {place} ({type(goals[place]).__name__}) {what}")


def _check_finite(number: int, goals: Sequence[Objective], losses: Sequence[float]) -> None:
    for place, (goal, loss) in enumerate(zip(goals, losses, strict=True)):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {number + 1}: the loss of goal {place} ({type(goal).__name__}) is {loss}. {_KEPT}"
            )


def _bar(done: int, total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(initial=done, total=total, disable=not shown, unit="step")


def _show(bar: Any, step: Step) -> None:
    bar.set_postfix_str(f"loss {step.loss:.4g}" + ("" if step.drift is None else f", drift {step.drift:.4g}"))
    bar.update()
